"""``plan``: which layers LoRA will adapt and train, and its cost, before any training."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tfimm_lora.adapters.save import save_adapter
from tfimm_lora.adapters.torch_layout import kind_of
from tfimm_lora.backend import backend_of
from tfimm_lora.config import LORA_VARIABLE_NAMES
from tfimm_lora.layer_paths import matches, resolve
from tfimm_lora.layers.base import LoRALayer, building_for_other_weights
from tfimm_lora.layers.conversion import supported
from tfimm_lora.layers.frozen import FrozenLayer
from tfimm_lora.layers.state import original_class
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.inject import inject_lora, remove_lora
from tfimm_lora.model.merge import has_lora, lora_layers
from tfimm_lora.model.registry import presets
from tfimm_lora.model.state import config_of
from tfimm_lora.model.targeting import (
    FULLY_TRAINED,
    NOT_TARGETED,
    not_in_qkv,
    require_built,
)
from tfimm_lora.model.trainable_weights import inside_paths

#: The number of values that an optimizer keeps for each trained parameter; SGD with momentum.
OPTIMIZER_SLOTS = {"adamw": 2, "adam": 2, "lion": 1, "rmsprop": 1, "sgd": 1}

#: The size of a float32, the type of factors, gradients and optimizer slots.
_BYTES = 4


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that will be adapted.

    Attributes:
        path: Its path in the model.
        kind: The kind of its update; see ``LayerUpdate.kind``.
        shape: The shape of its kernel in Keras.
        rank: The rank of its update.
        scale: The scale of its update.
        parameters: The number of parameters that LoRA adds to it.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    parameters: int

    @property
    def kernel(self) -> int:
        """The number of parameters of its kernel."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LeftOut:
    """A layer with weights that will not be adapted.

    Attributes:
        path: Its path; "" for the model itself, which may have its own weights.
        type: The name of its class.
        parameters: The number of its parameters.
        trained: The number of its parameters that are trained nevertheless.
        reason: Why it is not adapted.
    """

    path: str
    type: str
    parameters: int
    trained: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """The result of ``plan``. All counts are numbers of parameters, unless they are in bytes.

    Attributes:
        layers: The layers that will be adapted.
        left_out: The other layers that have weights.
        total: Parameters of the model without LoRA.
        trainable: Parameters that will be trained.
        factors, classifier, biases, modules: The trainable parameters by kind: LoRA factors,
            the classifier, biases, and the modules in ``lora_train_modules``.
        classifier_total: Parameters of the classifier, trained or not.
        full: Parameters that full fine-tuning trains.
        adapter_files: File name -> size in bytes, for each file of the adapter.
    """

    layers: tuple[PlannedLayer, ...]
    left_out: tuple[LeftOut, ...]
    total: int
    trainable: int
    factors: int
    classifier: int
    biases: int
    modules: int
    classifier_total: int
    full: int
    adapter_files: Mapping[str, int]

    @property
    def share(self) -> float:
        """The trainable parameters as a fraction of the model's parameters."""
        return self.trainable / self.total

    @property
    def adapter_bytes(self) -> int:
        """The size in bytes of the folder that ``save_adapter`` writes."""
        return sum(self.adapter_files.values())

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> number of layers that are left out for it, the most frequent first."""
        return dict(Counter(x.reason for x in self.left_out).most_common())

    def memory(self, optimizer: str = "adamw") -> dict[str, dict[str, int]]:
        """Compute the memory of training without activations, in float32.

        Args:
            optimizer: One of "adamw", "adam", "lion", "rmsprop" and "sgd" (with momentum).

        Returns:
            A dictionary with the keys "lora" and "full" (full fine-tuning). Its values have
            the sizes in bytes of "weights", "gradients" and "optimizer", and their sum,
            "together".

        Raises:
            ValueError: If the optimizer is unknown.
        """
        slots = OPTIMIZER_SLOTS.get(optimizer)
        if slots is None:
            raise ValueError(
                f"Received optimizer={optimizer!r}; expected one of "
                f"{', '.join(OPTIMIZER_SLOTS)}."
            )

        def bytes_of(weights: int, trained: int) -> dict[str, int]:
            counts = {"weights": weights, "gradients": trained, "optimizer": slots * trained}
            counts["together"] = sum(counts.values())
            return {name: _BYTES * count for name, count in counts.items()}

        return {
            "lora": bytes_of(self.total + self.factors, self.trainable),
            "full": bytes_of(self.total, self.full),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain Python objects, for JSON."""
        values = asdict(self)
        more = {name: getattr(self, name) for name in ("share", "adapter_bytes", "reasons")}
        return {**values, **more}


def plan(model: Any, **lora_arguments: Any) -> Plan:
    """Plan what LoRA will adapt and train in a model, and its cost, before any training.

    ``inject_lora`` is applied and removed again, so the plan always agrees with it. The model
    is restored exactly.

    Args:
        model: A built model that is not compiled. Or a LoRA model, compiled or not, which is
            described as it is.
        **lora_arguments: As for ``inject_lora``; none for a LoRA model.

    Returns:
        A ``Plan``: the adapted layers, the layers that are left out and the reasons, numbers
        of parameters, and sizes in bytes.

    Raises:
        TypeError, ValueError: As ``inject_lora``. Also ValueError if the model was trained,
            since it would have to be compiled again.
        ImportError: If safetensors, which measures the adapter, is not installed.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> from tfimm_lora.training.plan import plan
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((64,)), tf.keras.layers.Dense(32, name="fc1"),
        ...     tf.keras.layers.Dense(10, name="head")])
        >>> found = plan(model, lora_rank=4)
        >>> found.trainable, found.total, f"{found.share:.0%}"
        (384, 2410, '16%')
        >>> found.reasons
        {'classifier, not trained': 1}
    """
    backend = backend_of(model)
    if has_lora(model) and not lora_arguments:
        return _plan_of(model)
    require_built(model)
    backend.keras.initializers.get(lora_arguments.get("lora_initializer"))  # or it raises
    if not has_lora(model) and any(
        backend.is_model(x) and backend.is_compiled(x) and backend.has_built_optimizer(x)
        for _, x in backend.walk(model)
    ):
        raise ValueError(
            f"Received model '{model.name}', which was trained; expected a new model, since it "
            "would have to be compiled again. Plan before training, or pass the LoRA model: "
            "plan(lora_model)."
        )
    # Without drawing random numbers, so that those of the training do not change.
    init = lora_arguments.get("lora_init", "default")
    if init == "default" or (init == "eva" and "lora_initializer" not in lora_arguments):
        lora_arguments = {**lora_arguments, "lora_init": "default", "lora_initializer": "zeros"}
    with building_for_other_weights():
        inject_lora(model, **lora_arguments)
    try:
        return _plan_of(model)
    finally:
        remove_lora(model, merge=False)


def _plan_of(model: Any) -> Plan:
    """Return the plan of a LoRA model as it is."""
    backend = backend_of(model)
    adapted = lora_layers(model)
    walked = list(backend.walk(model))
    heads = inside_paths(walked, classifier_paths(model))
    trained = {id(v) for v in model.trainable_weights}
    seen: set[int] = set()
    counts: Counter[str] = Counter()
    left_out = []
    for path, layer in walked:
        own = [v for v in backend.own_variables(layer) if id(v) not in seen]
        seen |= {id(v) for v in own}
        factors = [v for v in own if backend.variable_name(v) in LORA_VARIABLE_NAMES]
        plain = [v for v in own if not any(v is f for f in factors)]
        open_to_training = {id(v) for v in backend.trainable_own_variables(layer)}
        counts["factors"] += _size(factors)
        counts["total"] += _size(plain)
        counts["full"] += _size(v for v in plain if id(v) in open_to_training)
        trainable = _size(v for v in plain if id(v) in trained)
        counts["trainable"] += trainable + _size(v for v in factors if id(v) in trained)
        is_head = id(layer) in heads
        if isinstance(layer, (LoRALayer, FrozenLayer)):
            counts["biases"] += trainable
        else:
            counts["classifier" if is_head else "modules"] += trainable
        counts["classifier_total"] += _size(plain) if is_head else 0
        if plain and not isinstance(layer, LoRALayer):
            reason = _reason(model, path, layer, is_head, trainable)
            name = original_class(type(layer)).__name__
            left_out.append(LeftOut(path, name, _size(plain), trainable, reason))
    return Plan(
        layers=tuple(_planned(path, layer) for path, layer in adapted.items()),
        left_out=tuple(left_out),
        adapter_files=_files_of_adapter(model),
        **{
            name: counts[name]
            for name in (
                *("total", "trainable", "factors", "classifier", "biases", "modules"),
                *("classifier_total", "full"),
            )
        },
    )


def _planned(path: str, layer: Any) -> PlannedLayer:
    factors = list(layer._lora_variables().values())
    return PlannedLayer(
        path=path,
        kind=kind_of(layer),
        shape=tuple(layer._kernel_variable.shape),
        rank=layer.lora.rank,
        scale=layer.lora.scale,
        parameters=_size(factors),
    )


def _reason(model: Any, path: str, layer: Any, is_head: bool, trained: int) -> str:
    """Return the reason why a layer is not adapted."""
    if not isinstance(layer, FrozenLayer) and trained:
        return f"classifier, {FULLY_TRAINED}" if is_head else FULLY_TRAINED
    if is_head:
        return "classifier, not trained"
    if any(True for inside, _ in backend_of(layer).walk(layer) if inside):
        return "own weights of a layer with sublayers"
    if not supported(layer):
        return f"no LoRA for {original_class(type(layer)).__name__}"
    config = config_of(model)  # none if layers were adapted one by one
    if config is not None and config.lora_qkv:
        targets, _ = resolve(config.lora_targets, presets(original_class(type(model))))
        if targets is None or matches(path, targets):
            return not_in_qkv(config.lora_qkv)
    return NOT_TARGETED


def _files_of_adapter(model: Any) -> dict[str, int]:
    """Measure the files by writing them, since their size also depends on names."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        return {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}


def _size(variables: Any) -> int:
    return sum(math.prod(v.shape) for v in variables)
