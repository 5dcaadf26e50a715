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

    def pairs(self):
        return list(zip(self.paths, self.labels))


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
                    f"Received the line {line!r} ({self.folder / file}, line {number}); "
                    f"expected a path, a space and a label from 0 to {self.classes - 1}."
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
        """Check that the lists fit each other, and that their pictures exist.

        Raises:
            ValueError: If a line is not valid, if the 1,000 pictures are not the 800 and the
                200, or if a picture is in two parts.
            FileNotFoundError: If a picture is missing.
        """
        train, val, both, test = (self.part(file) for file in (TRAIN, VAL, BOTH, TEST))
        if sorted(train.pairs() + val.pairs()) != sorted(both.pairs()):
            raise ValueError(
                f"Received lists in {self.folder} that do not fit: {BOTH} differs from {TRAIN} "
                f"and {VAL} together; expected the same pictures with the same labels."
            )
        paths = [set(part.paths) for part in (train, val, test)]
        twice = (paths[0] & paths[1]) | (paths[2] & (paths[0] | paths[1]))
        if twice:
            raise ValueError(
                f"Received lists in {self.folder} with the picture {min(twice)} in two parts; "
                "expected training, validation and test pictures to differ."
            )
        missing = [path for path in set().union(*paths) if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} pictures in the lists of {self.folder} are missing, for "
                f"example {min(missing)}. Unpack the archive again."
            )

    def _text(self, file):
        return (self.folder / file).read_text("utf-8")


def folder_of(name, data):
    """The folder of a task in the folder of all; None if there is none."""
    folders = [Path(data) / x for x in FOLDERS.get(name, (name,))]
    return next((x for x in folders if x.is_dir()), None)


def find_task(name, data):
    """Find a task in the folder of all.

    Raises:
        FileNotFoundError: If its folder, one of its lists or a picture is missing.
        ValueError: As ``Task.check``.
    """
    folder = folder_of(name, data)
    missing = [x for x in (TRAIN, VAL, BOTH, TEST) if folder and not (folder / x).is_file()]
    if folder is None or missing:
        raise FileNotFoundError(
            f"Received --data {data}, which lacks {missing[0] if missing else 'the folder'} of "
            f"the task {name!r}; expected a folder {name}/ with pictures and {TRAIN}, {VAL}, "
            f"{BOTH} and {TEST}. Unpack an archive of VTAB-1k there, or add --tfds to write it "
            "with tensorflow_datasets."
        )
    task = Task(name, folder)
    task.check()
    return task
