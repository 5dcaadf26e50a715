"""``finetune_pictures``: from a folder of pictures to a run, by a ``Recipe``."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfimm_lora.backend import backend_of, default_backend, installed
from tfimm_lora.config import LoRAConfig, check_keywords, lora_field_names
from tfimm_lora.finetuning.data.augmentation import Augmentation
from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.data.dataset import PictureSet, Split, find_pictures
from tfimm_lora.finetuning.data.pictures import check_pictures
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.distributed.devices import Devices
from tfimm_lora.finetuning.distributed.strategy import check_name, check_strategy, open_strategy
from tfimm_lora.finetuning.optimizer import check_number, check_whole
from tfimm_lora.finetuning.run import (
    BASE_WEIGHTS,
    CONFIG,
    FACTS,
    RECIPE,
    Run,
    base_hash,
    open_recipe_base,
)
from tfimm_lora.finetuning.training import Trained, finetune
from tfimm_lora.model.inject import inject_lora
from tfimm_lora.training.eva import initialize_eva
from tfimm_lora.version import __version__

POLICIES = (None, "mixed_float16", "mixed_bfloat16")


@dataclass
class Recipe:
    """Everything that decides a fine-tuning; ``config.yaml`` of a run holds it.

    Args:
        model: What to fine-tune, as ``open_base`` takes it.
        data: Class folders, or a CSV file of path and label; see ``find_pictures``.
        pretrained: Whether to load the weights that the model's name stands for.
        weights: A file with weights instead.
        input_size: Height and width of the input. Default: the model's.
        normalisation: Where the model does not tell; see ``open_base``.
        validation: Share of each class that is kept to validate on, where the data are not
            split already. Default 0.2.
        on_error: What to do with pictures that cannot be read: "skip" (default) or "refuse".
        augmentation: "none", "light" or "default".
        lora: Fields of ``LoRAConfig``, with their prefix. Default: its defaults.
        epochs, learning_rate, weight_decay, warmup, monitor, patience: Of ``finetune``.
        batch_size: Pictures in a step, over all devices. Default 32.
        balanced: Whether rare classes weigh more in the loss, so that all weigh the same.
        mixed_precision: "mixed_float16", "mixed_bfloat16" or None (default) for float32.
        strategy: The devices to train on: "none" (default), "mirrored", "multiworker", "tpu"
            or "data-parallel"; see docs/scaling.md. A run may go on with another one.
        seed: Of everything that is random: split, order, augmentation, A, dropout.
    """

    model: str
    data: str
    pretrained: bool = False
    weights: str | None = None
    input_size: tuple[int, int] | None = None
    normalisation: str | None = None
    validation: float = 0.2
    on_error: str = "skip"
    augmentation: str = "default"
    lora: dict[str, Any] = field(default_factory=dict)
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
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
                "strategy='none': every device would start at what it found by itself."
            )
        check_whole("epochs", self.epochs, 1)
        check_whole("batch_size", self.batch_size, 1)
        check_number("learning_rate", self.learning_rate, 0, above=True)
        if self.mixed_precision not in POLICIES:
            raise ValueError(
                f"Received mixed_precision={self.mixed_precision!r}; expected mixed_float16, "
                "mixed_bfloat16, or None for float32."
            )
        for name in ("data", "weights", "model"):
            value = getattr(self, name)
            if value is not None and os.path.exists(value):
                setattr(self, name, os.path.abspath(value))
        if self.input_size is not None:
            self.input_size = (int(self.input_size[0]), int(self.input_size[1]))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The reverse of ``to_dict``; unknown names are refused."""
        known = [f.name for f in dataclasses.fields(cls)]
        check_keywords(values, known, "a recipe")
        missing = [name for name in ("model", "data") if not values.get(name)]
        if missing:
            raise ValueError(f"The recipe does not say {' and '.join(missing)}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML."""
        values = dataclasses.asdict(self)
        size = values["input_size"]
        return {**values, "input_size": list(size) if size else None}


def finetune_pictures(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    verbose: str = "lines",
    say: Callable[[str], None] = lambda message: None,
) -> Run:
    """Fine-tune a model on pictures in files, and leave all that came of it in a folder.

    The pictures are read once before anything else, so that a damaged one does not end the
    training after an hour.

    Args:
        recipe: What to do.
        out: The folder for the run. It must not be there, be empty, or hold the interrupted
            run to go on with.
        resume: Whether to go on with the run in ``out``, which was started by the same
            recipe. The weights are then, on a CPU, the same to the last bit as those of a run
            that was never interrupted. Without a run there it begins one.
        verbose: As in ``finetune``.
        say: Called with a line about each step.

    Returns:
        The run: ``run.model()`` is the model of the best epoch.

    Raises:
        FileExistsError: if something else is in ``out``.
        ValueError, OSError, ImportError, RuntimeError: as the steps, of which
            nothing but the run's own folder is changed.
    """
    folder = Path(out)
    check_strategy(recipe.strategy)
    run = _existing(folder, recipe, resume)
    backend, devices = default_backend(), open_strategy(recipe.strategy)
    devices.check_batch(recipe.batch_size)
    if devices.replicas > 1:
        say(f"training on {devices}")
    with backend.dtype_policy(recipe.mixed_precision), devices.scope(), devices.together():
        if run is None:
            run, split, model = _begin(backend, recipe, folder, devices, say)
        else:
            say(f"going on with the run in {folder}")
            split = run.split
            # For weights that are not kept: a new classifier, if no epoch was finished.
            backend.keras.utils.set_random_seed(recipe.seed)
            model = run.base()
            _inject(backend, recipe, model, split, run.facts)
        trained, seconds = _train(recipe, run, model, split, devices, verbose)
    facts = {
        "best_epoch": trained.best_epoch,
        "stopped_early": trained.stopped_early,
        "seconds": round(run.facts.get("seconds", 0) + seconds, 1),
    }
    if devices.is_chief:
        run.tell(**facts)
    run.facts.update(facts)
    return run


def _existing(folder: Path, recipe: Recipe, resume: bool) -> Run | None:
    """The run to go on with, if there is one."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / CONFIG).is_file():
        unfinished = folder.is_dir() and (folder / "labels.txt").is_file()
        if resume and unfinished:
            return None  # killed while it was begun
        raise FileExistsError(
            f"Received out={str(folder)!r}, which exists and is no run of finetune. Pass "
            "another folder."
        )
    if not resume:
        raise FileExistsError(
            f"Received out={str(folder)!r}, in which there is a run. Pass --resume "
            "(resume=True) to go on with it, or another folder."
        )
    run, asked = Run.open(folder), recipe.to_dict()
    differing = [
        name
        for name in asked
        # Other devices give the same, but for the last digits.
        if name != "strategy" and run.recipe.get(name) != asked[name]
    ]
    if differing:
        told = [f"{n}={run.recipe.get(n)!r}, now {asked[n]!r}" for n in differing]
        raise ValueError(
            f"The run in {folder} was started otherwise: {'; '.join(told)}. Go on with "
            "the same values, or start anew in another folder."
        )
    return run


def _pictures(recipe: Recipe, say: Callable[[str], None]) -> tuple[Split, list[Any]]:
    found = find_pictures(recipe.data, validation=recipe.validation, seed=recipe.seed)
    say(
        f"checking {len(found.train) + len(found.val)} pictures of {len(found.labels)} "
        f"classes: {len(found.train)} to train on, {len(found.val)} to validate on"
    )
    split, problems = check_pictures(found, recipe.on_error)
    for problem in problems:
        say(f"left out {problem.path}: {problem.reason}")
    return split, problems


def _begin(
    backend: Any, recipe: Recipe, folder: Path, devices: Devices, say: Callable[[str], None]
) -> tuple[Run, Split, Any]:
    """A new run, its pictures and its model. The folder is made as the last thing."""
    split, skipped = _pictures(recipe, say)
    say(f"opening {recipe.model}")
    backend.keras.utils.set_random_seed(recipe.seed)
    base = open_recipe_base(recipe.to_dict(), len(split.labels))
    facts = {
        "preprocessing": base.preprocessing.to_dict(),
        "new_classifier": base.new_classifier,
        "base_sha256": base_hash(recipe.to_dict()),
        "trained_on": split.train.counts(),
        "validated_on": split.val.counts(),
        "versions": _versions(backend),
    }
    if base.from_scratch:
        say("its weights are random: pass --pretrained or --weights for those that it learned")
    random_head = base.new_classifier and not _trains_classifier(recipe, base.new_classifier)
    with tempfile.TemporaryDirectory() as temporary:
        kept = None
        if base.from_scratch or random_head:
            kept = Path(temporary) / BASE_WEIGHTS
            base.model.save_weights(kept)
        _inject(backend, recipe, base.model, split, facts)
        facts.update(_sizes(base.model))
        devices.agree("recipe and pictures", _told(recipe, split, facts))
        if devices.is_chief:
            run = Run.create(folder, recipe.to_dict(), split, skipped, kept, **facts)
        else:
            run = Run(folder, {RECIPE: recipe.to_dict(), FACTS: facts})
    return run, split, base.model


def _told(recipe: Recipe, split: Split, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for all workers, whatever their folders are called."""
    told = {**recipe.to_dict(), **facts}
    for part, pictures in (("train", split.train), ("val", split.val)):
        told[part] = [(os.path.basename(p.path), p.label) for p in pictures.pictures]
    return {name: told[name] for name in told if name not in ("model", "data", "weights")}


def _trains_classifier(recipe: Recipe, is_new: bool) -> bool:
    asked = recipe.lora.get("lora_train_classifier")
    return is_new if asked is None else asked


def _inject(
    backend: Any, recipe: Recipe, model: Any, split: Split, facts: Mapping[str, Any]
) -> None:
    backend.keras.utils.set_random_seed(recipe.seed)  # for A, whatever happened before
    trained = _trains_classifier(recipe, facts["new_classifier"])
    inject_lora(model, **{**recipe.lora, "lora_train_classifier": trained})
    if recipe.lora.get("lora_init") == "eva":
        preprocessing = Preprocessing.from_dict(facts["preprocessing"])
        batches = PictureBatches(
            split.train, preprocessing, recipe.batch_size, seed=recipe.seed
        )
        initialize_eva(model, batches.epoch(0))


def _sizes(model: Any) -> dict[str, Any]:
    def count(variables: Any) -> int:
        total = 0
        for variable in variables:
            size = 1
            for side in variable.shape:
                size *= int(side)
            total += size
        return total

    return {"parameters": count(model.weights), "trainable": count(model.trainable_weights)}


def _train(
    recipe: Recipe, run: Run, model: Any, split: Split, devices: Devices, verbose: str
) -> tuple[Trained, float]:
    preprocessing = Preprocessing.from_dict(run.facts["preprocessing"])
    batches = PictureBatches(
        split.train,
        preprocessing,
        recipe.batch_size,
        augmentation=Augmentation.named(recipe.augmentation),
        seed=recipe.seed,
    )
    size = devices.validation_batch(len(split.val), recipe.batch_size)
    validation = PictureBatches(split.val, preprocessing, size).in_order()
    started = time.monotonic()
    trained = finetune(
        model,
        batches,
        validation,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup=recipe.warmup,
        class_weight=class_weights(split.train) if recipe.balanced else None,
        monitor=recipe.monitor,
        patience=recipe.patience,
        callbacks=tensorboard(model, run.path / "logs") if devices.is_chief else [],
        out=run.path,
        resume=True,
        seed=recipe.seed,
        verbose=verbose,
    )
    return trained, time.monotonic() - started


def tensorboard(model: Any, folder: Path) -> list[Any]:
    """The Keras callback that writes logs for TensorBoard, where that is installed."""
    if not installed("tensorboard"):
        return []
    callback = backend_of(model).keras.callbacks.TensorBoard
    return [callback(str(folder), write_graph=False)]


def class_weights(pictures: PictureSet) -> dict[int, float]:
    """Weights with which every class counts the same: n / (classes * n of the class).

    Example:
        >>> from tfimm_lora.finetuning.data.dataset import Picture, PictureSet
        >>> from tfimm_lora.finetuning.recipe import class_weights
        >>> labels = [0, 0, 0, 1]
        >>> found = tuple(Picture(str(i), label) for i, label in enumerate(labels))
        >>> {k: round(v, 3) for k, v in class_weights(PictureSet(found, ("a", "b"))).items()}
        {0: 0.667, 1: 2.0}
    """
    counts = list(pictures.counts().values())
    return {i: len(pictures) / (len(counts) * n) for i, n in enumerate(counts) if n}


def _versions(backend: Any) -> dict[str, str]:
    versions = {
        "tfimm_lora": __version__,
        "python": platform.python_version(),
        "keras": f"{backend.keras.__name__} {backend.keras.__version__}",
    }
    framework = backend.framework()
    for name in {"tensorflow": 0, "tfimm": 0, framework: 0}:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "__version__"):
            versions[name] = module.__version__
    return versions
