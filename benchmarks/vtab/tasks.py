"""The 19 tasks, and the folders in which they lie."""

import dataclasses
import hashlib
from pathlib import Path

#: Group -> task -> number of classes, in the order of the literature.
GROUPS = {
    "natural": {
        "cifar100": 100,
        "caltech101": 102,
        "dtd": 47,
        "oxford_flowers102": 102,
        "oxford_iiit_pet": 37,
        "svhn": 10,
        "sun397": 397,
    },
    "specialized": {
        "patch_camelyon": 2,
        "eurosat": 10,
        "resisc45": 45,
        "diabetic_retinopathy": 5,
    },
    "structured": {
        "clevr_count": 8,
        "clevr_dist": 6,
        "dmlab": 6,
        "kitti": 4,
        "dsprites_loc": 16,
        "dsprites_ori": 16,
        "smallnorb_azi": 18,
        "smallnorb_ele": 9,
    },
}
CLASSES = {task: n for tasks in GROUPS.values() for task, n in tasks.items()}

#: Other names of folders in published archives.
FOLDERS = {"cifar100": ("cifar100", "cifar")}

TRAIN, VAL, BOTH, TEST = "train800.txt", "val200.txt", "train800val200.txt", "test.txt"


@dataclasses.dataclass(frozen=True)
class Part:
    """Some pictures of a task: paths and labels."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task in a folder: pictures, and four lists with a path and a label in each line."""

    name: str
    folder: Path

    @property
    def classes(self):
        return CLASSES[self.name]

    def part(self, file):
        """Read one of the lists.

        Raises:
            ValueError: If a line has no label, or a label that the task does not have.
        """
        paths, labels = [], []
        for number, line in enumerate(self._text(file).splitlines(), 1):
            if not line.strip():
                continue
            path, _, label = line.strip().rpartition(" ")
            if not path or not label.isdecimal() or int(label) >= self.classes:
                raise ValueError(
                    f"Received the line {line!r} ({self.folder / file}, line {number}); expected "
                    f"a path and a label from 0 to {self.classes - 1}, separated by a space."
                )
            paths.append(self.folder / path.strip())
            labels.append(int(label))
        if not paths:
            raise ValueError(f"Received an empty list {self.folder / file}; expected pictures.")
        return Part(tuple(paths), tuple(labels))

    def digest(self):
        """A hash of the four lists, to tell one selection of pictures from another."""
        lists = "\0".join(self._text(file) for file in (TRAIN, VAL, BOTH, TEST))
        return hashlib.sha256(lists.encode()).hexdigest()

    def check(self):
        """Check that the lists fit each other. The labels of the test part are not looked at.

        Raises:
            ValueError: If the 1,000 pictures are not the 800 and the 200, or if one is in two
                parts.
        """
        train, val, both = (self._lines(file) for file in (TRAIN, VAL, BOTH))
        if sorted(train + val) != sorted(both):
            raise ValueError(
                f"Received lists in {self.folder} that do not fit: {BOTH} has {len(both)} "
                f"pictures, {TRAIN} and {VAL} have {len(train)} and {len(val)}; expected the "
                "same pictures with the same labels."
            )
        counts = [_paths(lines) for lines in (train, val, self._lines(TEST))]
        twice = (counts[0] & counts[1]) | (counts[2] & (counts[0] | counts[1]))
        if twice:
            raise ValueError(
                f"Received lists in {self.folder} with the picture {min(twice)} in two parts; "
                "expected training, validation and test pictures to differ."
            )

    def _lines(self, file):
        return [" ".join(x.split()) for x in self._text(file).splitlines() if x.strip()]

    def _text(self, file):
        return (self.folder / file).read_text("utf-8")


def _paths(lines):
    return {line.rpartition(" ")[0] for line in lines}


def find_task(name, data):
    """Find a task in the folder of all.

    Raises:
        FileNotFoundError: If its folder or one of its lists is missing.
        ValueError: As ``Task.check``.
    """
    folders = [Path(data) / x for x in FOLDERS.get(name, (name,))]
    folder = next((x for x in folders if x.is_dir()), None)
    missing = [x for x in (TRAIN, VAL, BOTH, TEST) if folder and not (folder / x).is_file()]
    if folder is None or missing:
        raise FileNotFoundError(
            f"Received --data {data}, where {missing[0] if missing else folders[0].name} of the "
            f"task {name!r} is missing; expected a folder {folders[0].name}/ with pictures and "
            f"{TRAIN}, {VAL}, {BOTH} and {TEST}. Unpack an archive of VTAB-1k there, or add "
            "--tfds to write it with tensorflow_datasets."
        )
    task = Task(name, folder)
    task.check()
    return task
