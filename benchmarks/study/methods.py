"""The methods of the study: what is trained, and from which start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import prototypes
from plan import RATES
from prototypes import freeze_statistics, train_only

import tfimm_lora as lora
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.training.loraplus import loraplus_optimizer


@dataclasses.dataclass(frozen=True)
class Method:
    """How a model becomes one to train.

    Attributes:
        prepare: Changes a pretrained model with a new classifier. It is given the model, the
            training data and the preprocessing.
        optimizer: Changes the optimizer of a model.
        callback: Makes a Keras callback for a model and the number of steps.
    """

    prepare: Callable[[Any, Any, Any], None]
    optimizer: Callable[[Any, Any], Any] = lambda model, optimizer: optimizer
    callback: Callable[[Any, int], Any] | None = None


def everything(model: Any, data: Any, preprocess: Any) -> None:
    """Everything but the statistics of batch normalization, which stay as they are."""
    freeze_statistics(model)


def everything_and_statistics(model: Any, data: Any, preprocess: Any) -> None:
    """Everything, with batch normalization in training mode."""


def only(*names: str) -> Callable:
    """The variables of these names, and the classifier."""

    def prepare(model: Any, data: Any, preprocess: Any) -> None:
        freeze_statistics(model)
        train_only(model, lambda name: name.split(":")[0] in names)

    return prepare


def with_lora(**arguments: Any) -> Callable:
    def prepare(model: Any, data: Any, preprocess: Any) -> None:
        settings = {"lora_rank": 8, "lora_train_classifier": True, **arguments}
        lora.inject_lora(model, **settings)

    return prepare


def eva(model: Any, data: Any, preprocess: Any) -> None:
    with_lora(lora_init="eva")(model, data, preprocess)
    lora.initialize_eva(model, [preprocess(data[0][:256])])


def lora_and_normalization(model: Any, data: Any, preprocess: Any) -> None:
    """LoRA, with batch normalization trained as usual: gamma, beta and the statistics."""
    kind = prototypes.keras.layers.BatchNormalization
    names = {x.name.rpartition("/")[2] for x in model._flatten_layers() if isinstance(x, kind)}
    with_lora(lora_train_modules=tuple(sorted(names)))(model, data, preprocess)


def loha_as_lora(model: Any, data: Any, preprocess: Any) -> None:
    """LoHa whose first steps are as large as LoRA's: A starts as in LoRA, and A2 B2 with
    entries of variance one."""
    with_lora(lora_use_loha=True)(model, data, preprocess)
    for layer in lora_layers(model).values():
        inputs, rank = layer.kernel_lora_a.shape[-2:]
        starts = {"a": (3 * inputs) ** -0.5, "a2": 1.0, "b2": rank**-0.5}
        for name, deviation in starts.items():
            factor = getattr(layer, f"kernel_lora_{name}")
            normal = prototypes.keras.initializers.RandomNormal(stddev=deviation)
            factor.assign(normal(factor.shape))


def loraplus(model: Any, optimizer: Any) -> Any:
    return loraplus_optimizer(model, optimizer, ratio=4)


def allocator(model: Any, steps: int) -> Any:
    """From rank 12 to a mean of 8, and a third of the training after that."""
    return lora.RankAllocator(
        model, 8, end=2 * steps // 3, warmup=steps // 10, interval=max(1, steps // 50)
    )


METHODS = {
    "classifier only": Method(only()),
    "biases": Method(only("bias", "beta")),
    "normalization": Method(only("gamma", "beta", "bias")),
    "everything": Method(everything),
    "everything, statistics too": Method(everything_and_statistics),
    **{f"LoRA, rank {r}": Method(with_lora(lora_rank=r)) for r in (1, 4, 8, 16, 64)},
    "LoRA, statistics too": Method(lora_and_normalization),
    "LoRA, all convolutions": Method(with_lora(lora_targets="all")),
    "LoRA, all convolutions, rank 4": Method(with_lora(lora_targets="all", lora_rank=4)),
    "LoRA and biases": Method(with_lora(lora_train_bias="all")),
    "rsLoRA": Method(with_lora(lora_use_rslora=True)),
    "DoRA": Method(with_lora(lora_use_dora=True)),
    "PiSSA": Method(with_lora(lora_init="pissa")),
    "EVA": Method(eva),
    "LoRA+": Method(with_lora(), optimizer=loraplus),
    "AdaLoRA": Method(with_lora(lora_rank=12), callback=allocator),
    "LoHa": Method(with_lora(lora_use_loha=True)),
    "LoHa, rank 4": Method(with_lora(lora_use_loha=True, lora_rank=4)),
    "LoHa, start of LoRA": Method(loha_as_lora),
    "LoKr": Method(prototypes.with_kronecker(8)),
    "CoLoRA": Method(prototypes.with_shared_rank(8)),
    "LoRA-GA": Method(prototypes.gradient_start(8)),
}
assert METHODS.keys() == RATES.keys(), METHODS.keys() ^ RATES.keys()
