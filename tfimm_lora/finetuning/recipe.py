"""``finetune_pictures``: fine-tune a model on picture files as a ``Recipe`` specifies."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.backend import default_backend
from tfimm_lora.backend.interface import Backend
from tfimm_lora.config import LoRAConfig, lora_field_names
from tfimm_lora.finetuning.base.early import check_model
from tfimm_lora.finetuning.base.names import canonical_name, is_model_file
from tfimm_lora.finetuning.base.opened import NORMALISATIONS
from tfimm_lora.finetuning.data.augmentation import Augmentation
from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.data.check import check_data
from tfimm_lora.finetuning.data.dataset import PictureSet, Split, list_split
from tfimm_lora.finetuning.data.findings import ERROR, Problem, warn
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.data.targets import Targets
from tfimm_lora.finetuning.distributed.devices import Devices
from tfimm_lora.finetuning.distributed.processes import noted_failure
from tfimm_lora.finetuning.distributed.strategy import (
    check_name,
    check_strategy,
    is_chief,
    open_strategy,
)
from tfimm_lora.finetuning.evaluation import outputs_on
from tfimm_lora.finetuning.optimizer import CLIP_NORM, LEARNING_RATE
from tfimm_lora.finetuning.run import (
    BASE_WEIGHTS,
    CONFIG,
    FACTS,
    LABELS,
    RECIPE,
    TUNING,
    Run,
    base_digest,
    base_hash,
    is_new,
    one_writer,
    open_recipe_base,
    search_summary,
)
from tfimm_lora.finetuning.tasks.named import DEFAULT, targets_of, task_named
from tfimm_lora.finetuning.tensorboard_logs import tensorboard
from tfimm_lora.finetuning.training import EPOCHS, Trained, finetune
from tfimm_lora.model.checkpointing import (
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
    repeated_blocks,
)
from tfimm_lora.model.inject import inject_lora
from tfimm_lora.model.state import record_task
from tfimm_lora.training.eva import initialize_eva
from tfimm_lora.validation import (
    check_bool,
    check_choice,
    check_integer,
    check_keywords,
    check_number,
)
from tfimm_lora.version import __version__

#: Settings that runs of earlier versions do not have, with what these did.
_ADDED = {
    **{"task": DEFAULT, "columns": None, "accumulate": 1, "clip_norm": 0},
    **{"masks": None, "classes": None, "gradient_checkpointing": False},
}

#: The default rank; see docs/explanation/study.md for the choice of this and of the rate.
RANK = 8
POLICIES = (None, "mixed_float16", "mixed_bfloat16")


@dataclass
class Recipe:
    """All settings of a fine-tuning run, which ``config.yaml`` of the run contains.

    Args:
        model: The model to fine-tune: a name or path, as for ``open_base_model``.
        data: Class folders, or a CSV file with path and label; see ``find_pictures``.
        task: What the model is fine-tuned for: "classification" (default), "multilabel",
            "regression" or "segmentation".
        columns: For several labels and regression, the columns of the CSV file with the labels
            or numbers. Default: all except path and split.
        masks: For a segmentation, the folder of the masks. Default: inside ``data``.
        classes: For a segmentation, a table of the classes; see ``read_classes``. Default: each
            index in the masks is a class, except 255.
        pretrained: Whether a named model starts with its pretrained weights (default), or with
            random ones. It is False if ``weights`` or the path of a saved model is given.
        weights: A weight file instead.
        input_size: The height and width of the input. Default: those of the model.
        normalisation: The normalization, required for a saved model; see ``open_base_model``.
        validation: The share of each class for validation, if the data are not split already.
            Default: 0.2.
        on_error: What to do with pictures that cannot be read: "skip" (default) or "refuse".
        augmentation: "none", "light" or "strong". Default: "light".
        lora: Fields of ``LoRAConfig``, with the prefix "lora_". Default: rank 8, and the other
            defaults of ``LoRAConfig``.
        epochs, learning_rate, weight_decay, warmup, clip_norm, monitor, patience: As for
            ``finetune``.
        batch_size: The number of pictures in a step, over all devices. Default: 32.
        accumulate: The number of parts in which a batch is computed, as for ``finetune``.
        gradient_checkpointing: Whether the blocks of the model are computed again in the
            backward pass, which takes less memory; see ``enable_gradient_checkpointing``.
        balanced: Whether all classes have the same weight in the loss, however many pictures
            they have; for several labels, whether the pictures with and without a label do.
        mixed_precision: "mixed_float16", "mixed_bfloat16" or None (default) for float32.
        strategy: The devices to train on: "none" (default), "mirrored", "multiworker", "tpu",
            "data-parallel" or "multihost"; see docs/how-to/several-devices.md. It may change
            when a run is resumed.
        seed: The random seed of the split, the order, the augmentation, the factors A and
            dropout.

    Raises:
        TypeError: for a value of the wrong type, or an unknown field in ``lora``.
        ValueError: for a value that is out of range or not one of the choices.
    """

    model: str
    data: str
    task: str = DEFAULT
    columns: list[str] | None = None
    masks: str | None = None
    classes: str | None = None
    pretrained: bool = True
    weights: str | None = None
    input_size: tuple[int, int] | None = None
    normalisation: str | None = None
    validation: float = 0.2
    on_error: str = "skip"
    augmentation: str = "light"
    lora: dict[str, Any] = field(default_factory=dict)
    epochs: int = EPOCHS
    batch_size: int = 32
    accumulate: int = 1
    gradient_checkpointing: bool = False
    learning_rate: float = LEARNING_RATE
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip_norm: float = CLIP_NORM
    monitor: str = "val_loss"
    patience: int | None = None
    balanced: bool = False
    mixed_precision: str | None = None
    strategy: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        check_keywords(self.lora, lora_field_names(), "lora")
        LoRAConfig(**self.lora)
        Augmentation.named(self.augmentation)
        check_name(self.strategy)
        if self.lora.get("lora_init") == "eva" and self.strategy != "none":
            raise ValueError(
                f"Received lora_init='eva' with strategy={self.strategy!r}; expected "
                "strategy='none'. Each device would compute another initialization."
            )
        check_integer(self.epochs, "epochs", 1)
        check_integer(self.batch_size, "batch_size", 1)
        check_bool(self.gradient_checkpointing, "gradient_checkpointing")
        check_integer(self.accumulate, "accumulate", 1)
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"Received batch_size={self.batch_size} and accumulate={self.accumulate}; "
                "expected a batch size that is a multiple, to be computed in as many parts."
            )
        check_number(self.learning_rate, "learning_rate", 0, exclusive=True)
        check_number(self.clip_norm, "clip_norm", 0)
        check_choice(self.mixed_precision, "mixed_precision", POLICIES)
        check_choice(self.monitor, "monitor", task_named(self.task).monitored)
        if self.balanced and not task_named(self.task).balances:
            raise ValueError(
                f"Received balanced=True with the task {self.task!r}; expected False. There "
                "are no classes to balance."
            )
        if self.columns is not None:
            self.columns = list(self.columns)
        self.targets()
        self.lora = {"lora_rank": RANK, **self.lora}
        if self.patience is not None:
            check_integer(self.patience, "patience", 1)
        if self.normalisation is not None:
            check_choice(self.normalisation, "normalisation", NORMALISATIONS)
        self.model = canonical_name(self.model)
        if self.weights is not None or is_model_file(self.model):
            self.pretrained = False
        for name in ("data", "masks", "classes", "weights", "model"):
            value = getattr(self, name)
            is_path = name != "model" or is_model_file(self.model)
            if value is not None and is_path and os.path.exists(value):
                setattr(self, name, os.path.abspath(value))
        if self.input_size is not None:
            self.input_size = _sides(self.input_size)

    def targets(self) -> Targets:
        """What the pictures are labelled with."""
        return targets_of(self.task, self.columns, self.masks, self.classes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Create a recipe from the result of ``to_dict``.

        Raises:
            TypeError: for unknown names, and as ``Recipe``.
            ValueError: if the model or the data are missing, and as ``Recipe``.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        check_keywords(values, known, "a recipe")
        missing = [name for name in ("model", "data") if not values.get(name)]
        if missing:
            raise ValueError(
                f"Received a recipe without {' and '.join(missing)}; expected both model and "
                "data."
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for YAML."""
        values = dataclasses.asdict(self)
        size = values["input_size"]
        return {**values, "input_size": list(size) if size else None}


def _sides(size: Any) -> tuple[int, int]:
    """A height and a width, checked."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(
            f"Received input_size={size!r}; expected a height and a width, such as (224, 224)."
        )
    for side in size:
        check_integer(side, "input_size", 1)
    return int(size[0]), int(size[1])


def finetune_pictures(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    verbose: str = "lines",
    say: Callable[[str], None] = lambda message: None,
) -> Run:
    """Fine-tune a model on picture files and write all results to a folder.

    All pictures are read once before training, so that a damaged one does not stop the training
    later.

    Args:
        recipe: The settings.
        out: The folder for the run. It must be new or empty, or contain the run to resume.
        resume: Whether to resume the run in ``out``, which must have the same recipe. On a CPU,
            the weights are then bitwise identical to those of a run without interruption. Only
            the number of epochs may be larger: the rate then continues on the schedule of the
            larger number. If there is no run in ``out``, a new one is started.
        verbose: As for ``finetune``.
        say: A function that is called with a message about each step.

    Returns:
        The run. ``run.model()`` is the model of the best epoch.

    Raises:
        FileExistsError: if ``out`` contains something else.
        RuntimeError: if another process writes to ``out``.
        TypeError, ValueError, OSError, ImportError, RuntimeError: as raised by the individual
            steps. Nothing outside the folder of the run is changed.
    """
    folder = Path(out)
    check_strategy(recipe.strategy)
    check_model(recipe.model, pretrained=recipe.pretrained, weights=recipe.weights)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"Received out={str(folder)!r}, a file; expected a new folder.")
    with noted_failure(), contextlib.ExitStack() as stack:
        if is_chief(recipe.strategy):  # of several workers, only the chief writes
            stack.enter_context(one_writer(folder))
        return _finetune(recipe, folder, _existing(folder, recipe, resume), verbose, say)


def _finetune(
    recipe: Recipe, folder: Path, run: Run | None, verbose: str, say: Callable[[str], None]
) -> Run:
    backend, devices = default_backend(), open_strategy(recipe.strategy)
    devices.check_batch(recipe.batch_size)
    if devices.replicas > 1:
        say(f"training on {devices}")
    with backend.dtype_policy(recipe.mixed_precision), devices.scope(), devices.together():
        devices.agree("recipe", _shared_settings(recipe))
        if run is None:
            run, split, model = _begin(backend, recipe, folder, devices, say)
        else:
            _say_what_is_left(run, recipe, say)
            run.recipe["epochs"] = recipe.epochs
            split = run.split
            # For a new classifier, which is not stored before the first epoch is complete.
            backend.keras.utils.set_random_seed(recipe.seed)
            model = run.base()
            inject_recipe_lora(backend, recipe, model, run.facts["new_classifier"])
            initialize_from_pictures(recipe, model, split.train, run.preprocessing)
            # What was chosen on the validation pictures belongs to the former weights.
            record = dataclasses.replace(run.task.record(), chosen={})
            record_task(model, record)
            run.facts["task"] = record.to_dict()
        trained, seconds = _train(recipe, run, model, split, devices, verbose)
    if trained.stopped_early and len(trained.history) < recipe.epochs:
        say(
            f"stopped early after epoch {len(trained.history)} of {recipe.epochs}: no "
            f"improvement for {recipe.patience} epochs"
        )
    facts = {
        "best_epoch": trained.best_epoch,
        "stopped_early": trained.stopped_early,
        "seconds": round(run.facts.get("seconds", 0) + seconds, 1),
    }
    if devices.is_chief:
        run.add_facts(**facts)
        if run.task.uses_validation:
            _use_validation(run, split.val)
    run.facts.update(facts)
    return run


def _use_validation(run: Run, pictures: PictureSet) -> None:
    """Record what the task chooses on the validation pictures, in the run and its adapter."""
    outputs, labels = outputs_on(
        run.model(),
        pictures,
        run.preprocessing,
        run.task,
        batch_size=run.recipe["batch_size"],
    )
    record = run.task.with_validation(outputs, labels).record()
    dataclasses.replace(Adapter.load(run.adapter), task=record).save(run.adapter)
    run.add_facts(task=record.to_dict())


def _say_what_is_left(run: Run, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Say where a resumed run continues."""
    done = len(run.history)
    if done >= recipe.epochs:
        say(f"the run in {run.path} has all {done} epochs already; pass more to train on")
        return
    before = run.recipe["epochs"]
    longer = f" instead of {before}" if recipe.epochs != before else ""
    say(f"resuming the run in {run.path} after epoch {done} of {recipe.epochs}{longer}")


def _existing(folder: Path, recipe: Recipe, resume: bool) -> Run | None:
    """The run to resume, if there is one."""
    if is_new(folder):
        return None
    if not (folder / CONFIG).is_file():
        unfinished = (folder / LABELS).is_file() or (folder / TUNING).is_dir()
        if resume and unfinished:
            return None  # interrupted while it was created, or after the search for settings
        raise FileExistsError(
            f"Received out={str(folder)!r}, which exists and is not a finetune run; expected a "
            "new folder."
        )
    if not resume:
        raise FileExistsError(
            f"Received out={str(folder)!r}, which contains a run; expected a new folder. Pass "
            "--resume (resume=True) to resume the run."
        )
    run, settings = Run.open(folder), recipe.to_dict()
    before = settings_of(run)
    changed = [
        name
        for name in settings
        # Other devices compute the same results, up to rounding. For more epochs, the rate
        # continues on the longer schedule.
        if name not in ("strategy", "epochs") and before.get(name) != settings[name]
    ]
    if changed:
        listed = [f"{n}={before.get(n)!r}, now {settings[n]!r}" for n in changed]
        raise ValueError(
            f"The run in {folder} was started with other settings: {'; '.join(listed)}. Resume "
            "it with the same settings, or start a new run in another folder."
        )
    done = len(run.history)
    if recipe.epochs < done:
        raise ValueError(
            f"Received epochs={recipe.epochs} for the run in {folder}, which has {done} epochs "
            f"already; expected at least {done}."
        )
    return run


def settings_of(run: Run) -> dict[str, Any]:
    """The settings of a run, also if an earlier version that had fewer of them started it."""
    settings = {**_ADDED, **run.recipe}
    if settings["augmentation"] == "default":
        settings["augmentation"] = "strong"  # its name in earlier versions
    return settings


def _pictures(recipe: Recipe, say: Callable[[str], None]) -> tuple[Split, Sequence[Problem]]:
    checked = check_data(
        recipe.data,
        validation=recipe.validation,
        seed=recipe.seed,
        targets=recipe.targets(),
        on_error=recipe.on_error,
        say=say,
    )
    for problem in checked.problems:
        say(f"skipped {problem.path}: {problem.reason}")
    warn(checked.findings, stacklevel=2)
    return checked.usable(), checked.problems


def _begin(
    backend: Backend,
    recipe: Recipe,
    folder: Path,
    devices: Devices,
    say: Callable[[str], None],
) -> tuple[Run, Split, Any]:
    """Create a run, with its pictures and its model. The folder is created last.

    The model is opened and adapted before the pictures are read, so that what cannot work is
    reported first. The listing of the pictures gives the number of classes.
    """
    listed, findings = list_split(
        recipe.data,
        validation=recipe.validation,
        seed=recipe.seed,
        targets=recipe.targets(),
    )
    if listed is None or any(x.level == ERROR for x in findings):
        _pictures(recipe, say)  # raises all errors at once
    classes = len(listed.labels) if listed is not None else 0
    with tempfile.TemporaryDirectory() as temporary:
        model, facts, kept = _open(backend, recipe, classes, Path(temporary), say)
        split, skipped = _pictures(recipe, say)
        if len(split.labels) != classes:
            model, facts, kept = _open(backend, recipe, len(split.labels), Path(temporary), say)
        facts.update(trained_on=split.train.counts(), validated_on=split.val.counts())
        if split.test is not None:
            facts["tested_on"] = split.test.counts()
        facts["pictures"] = {name: len(part) for name, part in split.parts().items()}
        task = task_named(recipe.task).of(split.train)
        facts["task"] = task.record().to_dict()
        record_task(model, task.record())
        preprocessing = Preprocessing.from_dict(facts["preprocessing"])
        initialize_from_pictures(recipe, model, split.train, preprocessing)
        devices.agree("model and pictures", {**facts, **_names_and_labels(split)})
        searched = search_summary(folder)
        if searched is not None:
            facts["tuning"] = searched
        if devices.is_chief:
            run = Run.create(folder, recipe.to_dict(), split, skipped, kept, **facts)
        else:
            run = Run(folder, {RECIPE: recipe.to_dict(), FACTS: facts})
    return run, split, model


def _open(
    backend: Backend,
    recipe: Recipe,
    classes: int,
    temporary: Path,
    say: Callable[[str], None],
) -> tuple[Any, dict[str, Any], Path | None]:
    """Open the model and inject LoRA.

    Returns:
        The model, the facts about it, and a file with its weights, if nobody can create them
        again.
    """
    advice = task_named(recipe.task)().advice(Augmentation.named(recipe.augmentation))
    if advice is not None:
        say(f"note: {advice}")
    say(f"opening {recipe.model}")
    backend.keras.utils.set_random_seed(recipe.seed)
    base = open_recipe_base(recipe.to_dict(), classes)
    task = task_named(recipe.task)
    task().check_model(base.model)
    say(base.weights + (" (--from-scratch)" if base.from_scratch else ""))
    if base.returned_probabilities:
        returned = "probabilities again" if task.activation else "numbers"
        say(
            "the softmax or sigmoid at the end of the model is left out in training, which "
            f"uses the {task.loss_name}; exports return {returned}"
        )
    random_head = base.new_classifier and not _trains_classifier(recipe, base.new_classifier)
    kept = temporary / BASE_WEIGHTS if base.from_scratch or random_head else None
    sha256 = base_hash(recipe.to_dict())
    facts = {
        "preprocessing": task().preprocessing(base.preprocessing).to_dict(),
        "new_classifier": base.new_classifier,
        "base_returned_probabilities": base.returned_probabilities,
        "base_origin": base.weights,
        "base_sha256": sha256,
        "base_digest": None if sha256 else base_digest(base, stored=kept is not None),
        "base_in_run": kept is not None,
        "versions": _versions(backend),
    }
    if kept is not None:
        base.model.save_weights(kept)
    inject_recipe_lora(backend, recipe, base.model, base.new_classifier)
    if recipe.gradient_checkpointing:
        repeated_blocks(base.model)  # an error before the run begins if there are none
    facts.update(_sizes(base.model))
    return base.model, facts, kept


def _shared_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that must be the same for all workers; their folders may differ."""
    paths = ("model", "data", "masks", "classes", "weights")
    return {name: value for name, value in recipe.to_dict().items() if name not in paths}


def _names_and_labels(split: Split) -> dict[str, Any]:
    return {
        part: [(os.path.basename(p.path), p.label) for p in pictures.pictures]
        for part, pictures in split.parts().items()
    }


def _trains_classifier(recipe: Recipe, is_new: bool) -> bool:
    setting = recipe.lora.get("lora_train_classifier")
    by_default = is_new or task_named(recipe.task).trains_classifier
    return by_default if setting is None else bool(setting)


def inject_recipe_lora(
    backend: Backend, recipe: Recipe, model: Any, new_classifier: bool
) -> None:
    """Inject the LoRA of a recipe into its base model."""
    # So that the factors A do not depend on what was computed before.
    backend.keras.utils.set_random_seed(recipe.seed)
    trained = _trains_classifier(recipe, new_classifier)
    inject_lora(model, **{**recipe.lora, "lora_train_classifier": trained})


def initialize_from_pictures(
    recipe: Recipe, model: Any, pictures: PictureSet, preprocessing: Preprocessing
) -> None:
    """Initialize the factors from training pictures, if the recipe says so (EVA)."""
    if recipe.lora.get("lora_init") == "eva":
        batches = PictureBatches(pictures, preprocessing, recipe.batch_size, seed=recipe.seed)
        initialize_eva(model, batches.epoch(0))


def _sizes(model: Any) -> dict[str, int]:
    def count(variables: Any) -> int:
        return sum(math.prod(int(size) for size in v.shape) for v in variables)

    return {"parameters": count(model.weights), "trainable": count(model.trainable_weights)}


def _train(
    recipe: Recipe, run: Run, model: Any, split: Split, devices: Devices, verbose: str
) -> tuple[Trained, float]:
    preprocessing, task = Preprocessing.from_dict(run.facts["preprocessing"]), run.task
    batches = training_batches(recipe, split.train, preprocessing)
    validation = PictureBatches(split.val, preprocessing, recipe.batch_size)
    started = time.monotonic()
    with _checkpointing(recipe, model):
        trained = finetune(
            model,
            batches,
            validation,
            epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            warmup=recipe.warmup,
            clip_norm=recipe.clip_norm,
            task=task,
            class_weight=task.balanced_weights(split.train) if recipe.balanced else None,
            accumulate=recipe.accumulate,
            monitor=recipe.monitor,
            patience=recipe.patience,
            callbacks=tensorboard(model, run.path / "logs") if devices.is_chief else [],
            out=run.path,
            resume=True,
            seed=recipe.seed,
            verbose=verbose,
        )
    return trained, time.monotonic() - started


@contextlib.contextmanager
def _checkpointing(recipe: Recipe, model: Any) -> Iterator[None]:
    """Gradient checkpointing within this block, if the recipe says so."""
    if not recipe.gradient_checkpointing:
        yield
        return
    enable_gradient_checkpointing(model)
    try:
        yield
    finally:
        disable_gradient_checkpointing(model)


def training_batches(
    recipe: Recipe, pictures: PictureSet, preprocessing: Preprocessing
) -> PictureBatches:
    """The batches of a recipe for training."""
    return PictureBatches(
        pictures,
        preprocessing,
        recipe.batch_size,
        augmentation=Augmentation.named(recipe.augmentation),
        seed=recipe.seed,
    )


def _versions(backend: Backend) -> dict[str, str]:
    versions = {
        "tfimm_lora": __version__,
        "python": platform.python_version(),
        "keras": f"{backend.keras.__name__} {backend.keras.__version__}",
    }
    framework = backend.framework()
    for name in {"tensorflow": 0, "tfimm": 0, framework: 0}:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "__version__"):
            versions[name] = str(module.__version__)  # torch's is a subclass, unknown to YAML
    return versions
