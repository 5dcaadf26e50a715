"""LoRA+: an optimizer with a larger learning rate for the factors B."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of, default_backend
from tfimm_lora.config import LORA_WEIGHT_NAMES
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.validation import check_number

_RATIO = "_loraplus_ratio"

_classes: dict[type, type] = {}


class LoRAPlus:
    """Mixin for optimizers that multiplies the learning rate of factors B.

    ``loraplus_optimizer`` converts an optimizer to a subclass of this.

    Args:
        loraplus_ratio: The learning rate of B divided by that of all other variables.
    """

    def __init__(self, *args: Any, loraplus_ratio: float = 16.0, **kwargs: Any) -> None:
        check_ratio(loraplus_ratio)
        self.__dict__[_RATIO] = float(loraplus_ratio)
        super().__init__(*args, **kwargs)

    @property
    def loraplus_ratio(self) -> float:
        """The learning rate of B divided by that of all other variables."""
        return float(self.__dict__[_RATIO])

    def _rate_factors(self, variables: Any) -> list[float]:
        backend = backend_of(self)
        is_b = [backend.variable_name(v) == LORA_WEIGHT_NAMES[1] for v in variables]
        if not any(is_b):
            raise ValueError(
                f"Received {len(is_b)} variables for a LoRA+ optimizer "
                f"({type(self).__name__}); expected a factor {LORA_WEIGHT_NAMES[1]} among "
                "them. Inject LoRA into the model first, or use an ordinary optimizer."
            )
        return [self.loraplus_ratio if b else 1.0 for b in is_b]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "loraplus_ratio": self.loraplus_ratio}  # type: ignore[misc]


def loraplus_optimizer(model: Any, optimizer: Any, ratio: float = 16.0) -> Any:
    """Convert an optimizer to LoRA+, which trains the factors B at a higher learning rate.

    The optimizer is converted in place to a subclass of its class: ``Adam`` becomes
    ``LoRAPlusAdam``. Its rule, state, schedule, clipping and weight decay stay the same. For
    every ``kernel_lora_b`` it uses ``ratio`` times the learning rate, also in decoupled weight
    decay, like a parameter group in PyTorch. Setting ``learning_rate`` (``ReduceLROnPlateau``)
    changes both. It is compiled, saved and loaded like any other optimizer.

    Args:
        model: The LoRA model to train.
        optimizer: A new optimizer of the model's Keras, or its name. It may be inside a
            LossScaleOptimizer.
        ratio: The learning rate of B divided by that of all other variables, positive. Default
            16, as in the paper, which recommends a smaller base learning rate with it.

    Returns:
        The same optimizer.

    Raises:
        TypeError: If ``optimizer`` is not an optimizer of the model's Keras that updates one
            variable at a time (old optimizers and MultiOptimizer do not), or the ratio is not
            a number.
        ValueError: If the model has no LoRA, or has LoHa, the ratio is not positive, or the
            optimizer has been used already or is a LoRA+ optimizer.

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
    arXiv:2402.12354, section 4. PEFT's create_loraplus_optimizer also uses the larger rate
    for biases and all other vectors; here only B has it.
    """
    check_ratio(ratio)
    backend = backend_of(model)
    layers = lora_layers(model)  # or it raises
    loha = [path for path, layer in layers.items() if layer.lora.lora_use_loha]
    if loha:
        raise ValueError(
            f"Received a model with LoHa in {', '.join(loha[:5])}; expected LoRA, for whose "
            "factor B the larger rate is meant. Use the optimizer as it is."
        )
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
            f"Received a LoRA+ optimizer already, with the ratio {rule.loraplus_ratio:g}; "
            "expected an ordinary optimizer. Pass for example AdamW(1e-4)."
        )
    if backend.is_built_optimizer(rule) or backend.is_built_optimizer(optimizer):
        raise ValueError(
            f"Received an optimizer ({type(rule).__name__}) that has been used already; "
            "expected a new one. Create another optimizer of this class."
        )
    rule.__class__ = loraplus_class(backend.optimizer_rule(rule))
    rule.__dict__[_RATIO] = float(ratio)
    return optimizer


def loraplus_class(cls: type) -> type:
    """Return the LoRA+ class of an optimizer class, and register it with Keras for loading.

    Call it for your own optimizer classes before loading a model that was compiled with their
    LoRA+ version. Keras' own optimizers are registered already.

    Args:
        cls: ``Adam``, ``SGD``, ... of either Keras, or a subclass.

    Returns:
        The class, which is the same for every call.

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
    check_number(ratio, "ratio", 0, exclusive=True)


for _cls in default_backend().optimizer_classes():
    loraplus_class(_cls)
