"""LoRA+: an optimizer that has another learning rate for the factors B."""

from __future__ import annotations

import math
import numbers
from typing import Any

from tfimm_lora.backend import backend_of, default_backend
from tfimm_lora.config import LORA_WEIGHT_NAMES
from tfimm_lora.model.merge import lora_layers

_RATIO = "_loraplus_ratio"

_classes: dict[type, type] = {}


class LoRAPlus:
    """Mixin that makes an optimizer's learning rate for factors B ``loraplus_ratio`` times
    that for everything else. ``loraplus_optimizer`` makes an optimizer one of these."""

    def __init__(self, *args: Any, loraplus_ratio: float = 16.0, **kwargs: Any) -> None:
        check_ratio(loraplus_ratio)
        self.__dict__[_RATIO] = float(loraplus_ratio)
        super().__init__(*args, **kwargs)

    @property
    def loraplus_ratio(self) -> float:
        """The learning rate of B over that of everything else."""
        return self.__dict__[_RATIO]

    def _rate_factors(self, variables: Any) -> list[float]:
        backend = backend_of(self)
        is_b = [backend.variable_name(v) == LORA_WEIGHT_NAMES[1] for v in variables]
        if not any(is_b):
            raise ValueError(
                f"Received {len(is_b)} variables to train, of which none is a factor "
                f"{LORA_WEIGHT_NAMES[1]}, for a LoRA+ optimizer ({type(self).__name__}). Put "
                "LoRA into the model first, or train it with an ordinary optimizer."
            )
        return [self.loraplus_ratio if b else 1.0 for b in is_b]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "loraplus_ratio": self.loraplus_ratio}  # type: ignore[misc]


def loraplus_optimizer(model: Any, optimizer: Any, ratio: float = 16.0) -> Any:
    """Let an optimizer train the factors B at a multiple of its learning rate (LoRA+).

    The optimizer becomes one of a class made from its own, in place: ``Adam`` becomes
    ``LoRAPlusAdam``. Its rule, state, schedule, clipping and weight decay stay as they are;
    for every ``kernel_lora_b`` it just uses ``ratio`` times the learning rate, in decoupled
    weight decay too, as a parameter group of PyTorch does. Setting ``learning_rate``
    (``ReduceLROnPlateau``) moves both. It is compiled, saved and loaded like any other.

    Args:
        model: The model with LoRA that it will train.
        optimizer: A new optimizer of the model's Keras, also within a LossScaleOptimizer; or
            the name of one.
        ratio: The learning rate of B over that of everything else, positive. Default 16, as
            in the paper, which advises a smaller learning rate than otherwise with it.

    Returns:
        The same optimizer.

    Raises:
        TypeError: for what is no optimizer of the model's Keras with a rule for single
            variables (old optimizers, MultiOptimizer), or a ratio that is no number.
        ValueError: if the model has no LoRA, the ratio is not positive, or the optimizer has
            been used already or is one of LoRA+.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> from tfimm_lora.training.loraplus import loraplus_optimizer
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> optimizer = loraplus_optimizer(model, tf.keras.optimizers.AdamW(1e-4), ratio=16)
        >>> model.compile(optimizer, "mse")
        >>> type(optimizer).__name__, optimizer.loraplus_ratio
        ('LoRAPlusAdamW', 16.0)

    Reference: Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models",
    arXiv:2402.12354, section 4. PEFT's create_loraplus_optimizer also gives the larger rate
    to biases and all other vectors; here it is for B alone.
    """
    check_ratio(ratio)
    backend = backend_of(model)
    lora_layers(model)  # or it raises
    if isinstance(optimizer, str):
        optimizer = backend.keras.optimizers.get(optimizer)
    rule = getattr(optimizer, "inner_optimizer", optimizer)
    if not isinstance(rule, backend.keras.optimizers.Optimizer) or not backend.has_rule(
        type(rule)
    ):
        raise TypeError(
            f"Received optimizer={optimizer!r}; expected an optimizer of "
            f"{backend.keras.__name__} that updates one variable at a time, for example "
            f"{backend.keras.__name__}.optimizers.AdamW(1e-4)."
        )
    if isinstance(rule, LoRAPlus):
        raise ValueError(
            f"Received an optimizer of LoRA+ already, with the ratio {rule.loraplus_ratio:g}. "
            "Pass an ordinary one."
        )
    if backend.is_built_optimizer(rule) or backend.is_built_optimizer(optimizer):
        raise ValueError(
            f"Received an optimizer ({type(rule).__name__}) that has been used already; "
            "expected a new one, which no function was compiled for."
        )
    rule.__class__ = loraplus_class(backend.optimizer_rule(rule))
    rule.__dict__[_RATIO] = float(ratio)
    return optimizer


def loraplus_class(cls: type) -> type:
    """The LoRA+ class of an optimizer class; made once, registered with Keras for loading.

    For an optimizer class of your own call it before you load a file of a model that was
    compiled with one; the classes of Keras are known already.

    Args:
        cls: ``Adam``, ``SGD``, ... of either Keras, or a subclass.

    Returns:
        The class.

    Example:
        >>> import tensorflow as tf
        >>> from tfimm_lora.training.loraplus import loraplus_class
        >>> loraplus_class(tf.keras.optimizers.SGD)(0.1, loraplus_ratio=4).loraplus_ratio
        4.0
    """
    if cls not in _classes:
        backend = backend_of(cls)
        namespace = {"__module__": __name__, "__doc__": LoRAPlus.__doc__}
        made = type(
            f"LoRAPlus{cls.__name__}", (LoRAPlus, backend.VariableRates, cls), namespace
        )
        backend.register(made, "LoRAPlus", cls)
        _classes[cls] = made
    return _classes[cls]


def check_ratio(ratio: Any) -> None:
    """Raise unless ``ratio`` is a positive number."""
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real):
        raise TypeError(f"Received ratio={ratio!r}; expected a number, for example 16.")
    if not 0 < float(ratio) < math.inf:
        raise ValueError(f"Received ratio={ratio!r}; expected a positive number.")


for _cls in default_backend().optimizer_classes():
    loraplus_class(_cls)
