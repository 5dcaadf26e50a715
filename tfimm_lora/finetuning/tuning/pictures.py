"""``tune_pictures``: search for the settings of a recipe, using only its training pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.backend import default_backend
from tfimm_lora.config import LoRAConfig
from tfimm_lora.finetuning.base.early import check_model
from tfimm_lora.finetuning.base.names import is_model_file
from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.data.dataset import Picture, PictureSet, list_split
from tfimm_lora.finetuning.data.findings import raise_errors
from tfimm_lora.finetuning.data.pictures import check_pictures
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.recipe import (
    Recipe,
    initialize_from_pictures,
    inject_recipe_lora,
    training_batches,
)
from tfimm_lora.finetuning.run import CONFIG, TUNING, is_new, one_writer, open_recipe_base
from tfimm_lora.finetuning.tasks.named import task_named
from tfimm_lora.finetuning.tuning.learning_rate_finder import (
    FEWEST_STEPS,
    LearningRateCurve,
    find_learning_rate,
)
from tfimm_lora.finetuning.tuning.record import JOURNAL, Tuned, read_search
from tfimm_lora.finetuning.tuning.rungs import rungs
from tfimm_lora.finetuning.tuning.search import Search
from tfimm_lora.finetuning.tuning.space import RATES, Space, usual_ranks
from tfimm_lora.finetuning.tuning.storage import check_settings, open_study, require_optuna
from tfimm_lora.finetuning.tuning.trainer import Trainer
from tfimm_lora.finetuning.tuning.tune import (
    Trainers,
    conclude,
    direction,
    number_of_trials,
    search_settings,
)
from tfimm_lora.validation import check_number

#: The share of the training pictures of each class that the settings are compared on.
HELD_OUT = 0.2


def tune_pictures(
    recipe: Recipe,
    out: str | os.PathLike[str] | None = None,
    *,
    minutes: float,
    learning_rate: bool | Sequence[float] = True,
    rank: bool | Sequence[int] = True,
    trials: int | None = None,
    storage: str | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Tuned:
    """Search for the learning rate and the rank of a recipe, using only its training pictures.

    A fifth of the training pictures of each class is held out to compare the settings on. The
    validation and test pictures of the recipe are not used, so their accuracies remain honest.
    The search itself is that of ``tune``.

    Args:
        recipe: The settings. Its rate and rank are tried first.
        out: The folder of the run that is to follow. The search is written to its subfolder
            ``tuning``: ``trials.csv``, ``search.json`` and the journal from which it continues.
            Default: nothing is written.
        minutes, trials: As for ``tune``.
        learning_rate: True (default) for the usual range of rates, the lowest and the highest
            rate to search, or False for the rate of the recipe.
        rank: True (default) for the usual ranks, the ranks to choose from, or False for the
            rank of the recipe.
        storage: The path of a journal file or the URL of a database, which several machines can
            share. Default: the journal in ``out``.
        resume: Whether to continue the search in ``out``. If it is complete, its result is
            returned and nothing is trained. The minutes that it took before count.
        say: A function that is called with a message about each step.

    Returns:
        The result, with the recipe for ``finetune_pictures(tuned.recipe, out, resume=True)``.

    Raises:
        FileExistsError: if ``out`` is in use and ``resume`` is False.
        TypeError, ValueError: as ``tune``; if the recipe has a strategy of several devices; if
            the search in ``out`` has other settings.
        ImportError: without Optuna.

    Example:
        >>> import tfimm_lora as lora
        >>> recipe = lora.Recipe(model="MobileNetV2", data="pictures")
        >>> lora.tune_pictures(recipe, minutes=-1)
        Traceback (most recent call last):
        ValueError: Received minutes=-1; expected a number above 0.
    """
    check_number(minutes, "minutes", 0, exclusive=True)
    space = _space(recipe, learning_rate, rank)
    count = number_of_trials(trials, space)
    _check_recipe(recipe, "A search")
    require_optuna()
    folder = None if out is None else Path(out)
    with one_writer(folder) if folder is not None else contextlib.nullcontext():
        if folder is not None:
            _check_folder(folder, resume)
        pictures, classes = _training_pictures(recipe)
        seen, held_out = held_out_pictures(pictures, recipe.seed)
        ladder = rungs(count, recipe.epochs, math.ceil(len(seen) / recipe.batch_size))
        monitor = recipe.monitor
        monitor = monitor if monitor.startswith("val_") else f"val_{monitor}"
        settings = {
            **search_settings(space, ladder, recipe.epochs, monitor, recipe.seed),
            **_other_settings(recipe, space),
            "pictures": {
                name: list(x.counts().values())
                for name, x in (("seen", seen), ("held_out", held_out))
            },
        }
        before = read_search(folder) if folder is not None else None
        if before is not None:
            check_settings(before[1], settings, f"in {folder}")
            say(f"the search in {folder} is complete: {_chosen(before[0])}")
            return dataclasses.replace(before[0], recipe=_with(recipe, before[0], space))
        is_shared = storage is not None
        created = None
        if folder is not None and storage is None:
            created = None if (folder / TUNING).exists() else folder / TUNING
            storage = str(folder / TUNING / JOURNAL)
        study = open_study(storage, settings, direction=direction(monitor))
        say(
            f"searching {space} for at most {minutes:g} minutes: up to {ladder[0].count} "
            f"settings, trained on {len(seen)} of the {len(pictures)} training pictures and "
            f"compared on the other {len(held_out)}"
        )
        open_trainer = _opener(recipe, classes, seen, held_out, say)
        backend = default_backend()
        with (
            _removed_after_an_error(created, study),
            backend.dtype_policy(recipe.mixed_precision),
            Trainers(open_trainer, recipe.warmup, monitor) as trainers,
        ):
            search = Search(
                study,
                space,
                space.starts(recipe.learning_rate, _rank(recipe)),
                ladder,
                monitor=monitor,
                train=trainers.train,
                seconds=60 * minutes,
                seed=recipe.seed,
                say=say,
            )
            if not is_shared:
                search.continue_alone()
            search.run()
        sizes = len(seen), len(held_out)
        tuned = conclude(search, recipe.epochs, pictures=sizes)
        if folder is not None:
            tuned.write(folder, settings)
    return dataclasses.replace(tuned, recipe=_with(recipe, tuned, space))


def find_rate_for_pictures(
    recipe: Recipe, *, say: Callable[[str], None] = lambda message: None
) -> LearningRateCurve:
    """Run ``find_learning_rate`` on the training pictures of a recipe.

    If there are fewer than 20 batches in them, smaller batches are used, which is said.

    Raises:
        ValueError: for fewer than 20 training pictures, and as ``find_learning_rate``.
    """
    _check_recipe(recipe, "The learning-rate finder")
    pictures, classes = _training_pictures(recipe)
    size = min(recipe.batch_size, math.ceil(len(pictures) / FEWEST_STEPS))
    while size > 1 and math.ceil(len(pictures) / size) < FEWEST_STEPS:
        size -= 1
    if size < recipe.batch_size:
        say(
            f"finding the learning rate with batches of {size} instead of {recipe.batch_size}, "
            f"because it needs {FEWEST_STEPS} batches in {len(pictures)} pictures"
        )
    smaller = dataclasses.replace(recipe, batch_size=size)
    with default_backend().dtype_policy(recipe.mixed_precision):
        model, preprocessing = _open(smaller, classes, pictures)
        task = task_named(recipe.task).of(pictures)
        return find_learning_rate(
            model,
            training_batches(smaller, pictures, preprocessing),
            weight_decay=recipe.weight_decay,
            clip_norm=recipe.clip_norm,
            task=task,
            class_weight=task.balanced_weights(pictures) if recipe.balanced else None,
            seed=recipe.seed,
        )


def held_out_pictures(pictures: PictureSet, seed: int) -> tuple[PictureSet, PictureSet]:
    """Divide pictures at random into those to train on and a fifth to compare on, by class.

    A class with one picture has none to compare on. Pictures that are not in classes are
    divided as a whole.

    Raises:
        ValueError: if no class has two pictures.
    """
    rng = np.random.default_rng(seed)
    kept: list[Picture] = []
    out: list[Picture] = []
    groups = [pictures.pictures]
    if pictures.targets.is_exclusive:
        labels = range(len(pictures.labels))
        groups = [tuple(x for x in pictures.pictures if x.label == label) for label in labels]
    for of_label in groups:
        n = len(of_label)
        count = min(max(math.floor(n * HELD_OUT + 0.5), 1), n - 1) if n else 0
        order = rng.permutation(n)
        out += [of_label[i] for i in sorted(order[:count])]
        kept += [of_label[i] for i in sorted(order[count:])]
    if not out:
        raise ValueError(
            "Received one training picture in each class; expected at least two in some class "
            "to search for settings, one of them to compare the settings on."
        )
    first, second = (
        dataclasses.replace(pictures, pictures=tuple(part)) for part in (kept, out)
    )
    return first, second


# -- the recipe -----------------------------------------------------------------------------


def _space(recipe: Recipe, learning_rate: Any, rank: Any) -> Space:
    rates = RATES if learning_rate is True else learning_rate
    ranks = usual_ranks() if rank is True else rank
    return Space.of(
        recipe.learning_rate if rates is False else tuple(rates),
        _rank(recipe) if ranks is False else tuple(ranks),
    )


def _rank(recipe: Recipe) -> int:
    return int(LoRAConfig(**recipe.lora).lora_rank)


def _with(recipe: Recipe, tuned: Tuned, space: Space) -> Recipe:
    """The recipe with the settings that were chosen."""
    lora = {**recipe.lora, "lora_rank": tuned.rank} if space.searches_rank else recipe.lora
    rate = tuned.learning_rate if space.searches_rate else recipe.learning_rate
    return dataclasses.replace(recipe, learning_rate=rate, lora=lora)


def _chosen(tuned: Tuned) -> str:
    return f"rate {tuned.learning_rate:g}, rank {tuned.rank}"


def _other_settings(recipe: Recipe, space: Space) -> dict[str, Any]:
    """The settings that are not searched. Paths may differ between machines."""
    settings = recipe.to_dict()
    for name in ("learning_rate", "epochs", "monitor", "patience", "strategy", "data", "seed"):
        del settings[name]
    for name in ("model", "weights"):
        if settings[name] is not None and (name == "weights" or is_model_file(recipe.model)):
            settings[name] = os.path.basename(settings[name])
    lora = dict(settings["lora"])
    if space.searches_rank:
        lora.pop("lora_rank", None)
    return {**settings, "lora": lora}


def _check_recipe(recipe: Recipe, what: str) -> None:
    if recipe.strategy != "none":
        raise ValueError(
            f"Received strategy={recipe.strategy!r}; expected 'none'. {what} trains on one "
            "device. Search first without a strategy, on several machines with a common "
            "storage (--tune-storage), and train with what was found: --lr and --rank, or "
            f"--config with the {CONFIG} of that run."
        )
    if recipe.accumulate != 1:
        raise ValueError(
            f"Received accumulate={recipe.accumulate}; expected 1. {what} computes whole "
            "batches. Leave it out, and train with it and what was found."
        )
    if recipe.gradient_checkpointing:
        raise ValueError(
            f"Received gradient_checkpointing=True; expected False. {what} keeps what it "
            "computes. Leave it out, and train with it and what was found."
        )
    check_model(recipe.model, pretrained=recipe.pretrained, weights=recipe.weights)


def _check_folder(folder: Path, resume: bool) -> None:
    if is_new(folder):
        return
    if not resume:
        raise FileExistsError(
            f"Received out={str(folder)!r}, which is not empty; expected a new folder. Pass "
            "--resume (resume=True) to continue the search or the run in it."
        )
    if not (folder / TUNING).is_dir():
        raise ValueError(
            f"Received out={str(folder)!r} with a search for settings; expected a new folder, "
            "or one with such a search. Resume without a search (without auto), or use another "
            "folder."
        )


@contextlib.contextmanager
def _removed_after_an_error(folder: Path | None, study: Any) -> Iterator[None]:
    """Remove the folder of a new search if an error ends it before any training is complete.

    Otherwise the call could not be repeated with what the error says.
    """
    try:
        yield
    except Exception:
        trials = study.get_trials(deepcopy=False)
        if folder is not None and not any(trial.intermediate_values for trial in trials):
            shutil.rmtree(folder)
        raise


# -- pictures and models --------------------------------------------------------------------


def _training_pictures(recipe: Recipe) -> tuple[PictureSet, int]:
    """The training pictures that can be read, and the number of classes."""
    split, findings = list_split(
        recipe.data,
        validation=recipe.validation,
        seed=recipe.seed,
        targets=recipe.targets(),
    )
    raise_errors(findings)
    assert split is not None
    # The run that follows reports what is wrong with its pictures.
    usable, _ = check_pictures(split.train, recipe.on_error)
    return usable, len(split.labels)


def _open(recipe: Recipe, classes: int, pictures: PictureSet) -> tuple[Any, Preprocessing]:
    """The LoRA model of a recipe with the values that a run starts with."""
    backend = default_backend()
    backend.keras.utils.set_random_seed(recipe.seed)
    base = open_recipe_base(recipe.to_dict(), classes)
    inject_recipe_lora(backend, recipe, base.model, base.new_classifier)
    preprocessing = task_named(recipe.task)().preprocessing(base.preprocessing)
    initialize_from_pictures(recipe, base.model, pictures, preprocessing)
    return base.model, preprocessing


def _opener(
    recipe: Recipe,
    classes: int,
    seen: PictureSet,
    held_out: PictureSet,
    say: Callable[[str], None],
) -> Callable[[int], Trainer]:
    def open_trainer(rank: int) -> Trainer:
        say(f"opening {recipe.model} with rank {rank}")
        own = dataclasses.replace(recipe, lora={**recipe.lora, "lora_rank": rank})
        model, preprocessing = _open(own, classes, seen)
        task = task_named(recipe.task).of(seen)
        return Trainer(
            model,
            training_batches(recipe, seen, preprocessing),
            PictureBatches(held_out, preprocessing, recipe.batch_size).in_order(),
            weight_decay=recipe.weight_decay,
            clip_norm=recipe.clip_norm,
            task=task,
            class_weight=task.balanced_weights(seen) if recipe.balanced else None,
            seed=recipe.seed,
        )

    return open_trainer
