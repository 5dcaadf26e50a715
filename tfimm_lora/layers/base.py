"""``LoRALayer``: what every adapted layer has in common."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer, MeshAxes, OriginalLayer, Tensor, Variable
from tfimm_lora.config import (
    LOHA_WEIGHT_NAMES,
    LORA_VARIABLE_NAMES,
    LORA_WEIGHT_NAMES,
    LayerSettings,
)
from tfimm_lora.initializers import from_kernel
from tfimm_lora.layers import dora, kernel_hook, loha, mixed_batch
from tfimm_lora.layers.call_signature import check_super_calls
from tfimm_lora.layers.depthwise import DepthwiseRoutine
from tfimm_lora.layers.forward import LoRAForward
from tfimm_lora.layers.state import (
    AdaptedState,
    Converted,
    drop_state,
    original_class,
    set_state,
)

#: The same for every layer, so that Python shows it once.
_MERGED_IN_TRAINING = (
    "A merged LoRA model is called with training=True. While it is merged, its factors have no "
    "effect and get no gradient. Call unmerge_lora_weights before you train it."
)

_building_for_other_weights: ContextVar[bool] = ContextVar("building", default=False)


@contextlib.contextmanager
def building_for_other_weights() -> Iterator[None]:
    """Within this block layers are built that get the weights of another model later: factors
    that depend on the kernel are left for the caller to initialize (``initialize_factors``)."""
    token = _building_for_other_weights.set(True)
    try:
        yield
    finally:
        _building_for_other_weights.reset(token)


class NotAdaptable(ValueError):
    """The class of a layer rules out what was asked of it."""


class LoRALayer(LoRAForward, Converted):
    """Mixin that adapts a Keras layer: y = x (W + s A B), W frozen, s = alpha / rank.

    The variables are named ``kernel_lora_a`` and ``kernel_lora_b`` and are float32. B is
    initialized to zero, so that the layer computes what its base computes. DoRA, LoHa, a bias
    of the branch and some initializations add others (``config.LORA_VARIABLE_NAMES``).
    Everything else (strides, padding, groups, data format, activation, constraints) is the
    base layer's.

    Args:
        {settings}

    Raises:
        ValueError, TypeError: for a setting out of its range or of the wrong type.

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
    """

    #: Which variable is the kernel: a key of ``Backend.kernel_attributes``.
    _kernel_role = "kernel"
    #: The class of Keras that the kind of layer is named after; see ``conversion``.
    _keras_class: type

    built: bool
    activation: Any
    kernel_lora_a: Any
    kernel_lora_b: Any
    _sync_trainability: Callable[[], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        lora = {k: kwargs.pop(k) for k in list(kwargs) if k in LayerSettings.names()}
        settings = LayerSettings.from_arguments(lora, backend_of(self).keras)
        super().__init__(*args, **kwargs)
        self.check_support(self, settings)
        self._attach(settings)

    # -- attaching LoRA to a layer -----------------------------------------------------

    def _attach(self, settings: LayerSettings, original: OriginalLayer | None = None) -> None:
        """Give the layer its state, and its variables as soon as it has a kernel."""
        backend = backend_of(self)
        set_state(self, AdaptedState(original, settings=settings))
        if settings.lora_dropout:
            dropout = backend.keras.layers.Dropout(settings.lora_dropout, name="lora_dropout")
            backend.add_sublayer(self, "lora_branch_dropout", dropout)
        if self.built:
            self._after_build()

    def _detach(self) -> None:
        """Undo ``_attach``: remove variables, dropout and state."""
        backend = backend_of(self)
        for attribute in self._lora_variables():
            backend.remove_weight(self, attribute)
        if self.lora.lora_dropout:
            backend.remove_sublayer(self, "lora_branch_dropout")
        drop_state(self)

    def _after_build(self) -> None:
        if "_lora_state" not in self.__dict__ or "kernel_lora_a" in self.__dict__:
            return
        backend, settings = backend_of(self), self.lora
        kernel = self._kernel_variable
        mesh_axes = backend.mesh_axes(kernel)
        placed = self._variable_axes(mesh_axes) if mesh_axes is not None else {}
        with backend.variable_scope(kernel):
            for name, shape in self._variable_shapes().items():
                if name in placed:
                    backend.place(name, shape, placed[name], beside=kernel)
                backend.add_weight(
                    self,
                    name,
                    shape,
                    beside=kernel,
                    initializer=self._initializer_of(name),
                    regularizer=settings.lora_regularizer
                    if name in (*LORA_WEIGHT_NAMES, *LOHA_WEIGHT_NAMES)
                    else None,
                )
        self._sync_trainability()
        if not _building_for_other_weights.get():
            self.initialize_factors()

    def initialize_factors(self) -> None:
        """Initialize A and B again as ``lora_init`` says, for the current kernel.

        Raises:
            ValueError: if the layer is merged or disabled, or the initialization is not
                defined for its kernel and rank.
        """
        init = self.lora.lora_init
        if init in ("default", "eva"):
            return
        self._require_enabled("initialized again")
        if self.merged:
            raise ValueError(f"Layer '{self.name}' is merged. Call unmerge_weights first.")
        kernel = backend_of(self).to_numpy(self._kernel_variable).astype("float32")
        # Follows keras.utils.set_random_seed, which seeds NumPy.
        rng = np.random.default_rng(np.random.randint(2**31))
        try:
            a, b = self._initial_factors(kernel, rng)
        except ValueError as error:
            raise ValueError(f"Layer '{self.name}': {error}") from error
        values = {"kernel_lora_a": a, "kernel_lora_b": b}
        if from_kernel.subtracts_initial_update(init):
            values.update(kernel_lora_a0=a, kernel_lora_b0=b)
        self.assign_update(values)

    def _variable_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the layer's LoRA variables by name."""
        settings, kernel_shape = self.lora, tuple(self._kernel_variable.shape)
        a, b = self._factor_shapes(kernel_shape, settings.lora_rank)
        shapes = {"kernel_lora_a": a, "kernel_lora_b": b}
        if settings.lora_use_loha:
            shapes.update(kernel_lora_a2=a, kernel_lora_b2=b)
        if settings.lora_use_dora:
            shapes["kernel_lora_magnitude"] = dora.shape(kernel_shape, self._summed_axes())
        if settings.lora_bias:
            shapes["kernel_lora_shift"] = tuple(self.bias.shape)
        if from_kernel.subtracts_initial_update(settings.lora_init):
            shapes.update(kernel_lora_a0=a, kernel_lora_b0=b)
        return shapes

    def _variable_axes(self, kernel_axes: MeshAxes) -> dict[str, MeshAxes]:
        """The axes of a device mesh of the layer's LoRA variables, for those of its kernel."""
        a, b = self._factor_axes(kernel_axes)
        summed = self._summed_axes()
        outputs = tuple(x for i, x in enumerate(kernel_axes) if i not in summed)
        axes = {"kernel_lora_a": a, "kernel_lora_b": b, "kernel_lora_magnitude": outputs}
        axes.update(kernel_lora_a0=a, kernel_lora_b0=b, kernel_lora_a2=a, kernel_lora_b2=b)
        bias = backend_of(self).mesh_axes(self.bias) if self.lora.lora_bias else None
        return axes if bias is None else {**axes, "kernel_lora_shift": bias}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in LORA_VARIABLE_NAMES and self.__dict__.get(name, value) is not value:
            raise AttributeError(
                f"Received a {type(value).__name__} for the variable {name} of layer "
                f"'{self.name}', which cannot be replaced. Assign values to it: "
                f"layer.{name}.assign(values)."
            )
        super().__setattr__(name, value)

    def _note_trainable(self, value: bool) -> None:
        """Warn if ``trainable = True`` has no effect on an adapted layer."""
        if value and backend_of(self).raw_trainable(self) and "_lora_state" in self.__dict__:
            warnings.warn(
                f"Received trainable=True for layer '{self.name}', which is adapted: its "
                "factors are trained already, and its kernel stays frozen. To train the whole "
                "layer, name it in lora_train_modules when you inject LoRA.",
                stacklevel=3,
            )

    def _initializer_of(self, name: str) -> Any:
        """The initializer of one of the layer's LoRA variables."""
        settings, initializers = self.lora, backend_of(self).keras.initializers
        if settings.lora_use_loha and name in loha.DEVIATIONS:
            given = settings.lora_initializer
            if given is not None:
                return _with_another_seed(given, list(loha.DEVIATIONS).index(name))
            return initializers.RandomNormal(stddev=loha.DEVIATIONS[name])
        # Otherwise ``initialize_factors`` gives A its values.
        if name == "kernel_lora_a" and settings.lora_init in ("default", "eva"):
            return settings.lora_initializer or self._default_initializer()
        return initializers.Zeros()

    def _default_initializer(self) -> Any:
        return backend_of(self).default_initializer()

    def _is_shown_to_others(self) -> bool:
        """Whether the kernel attribute shows W + s A B to whatever reads it now: while another
        layer is called."""
        return "kernel_lora_a" in self.__dict__ and backend_of(self).is_called()

    @property
    def _kernel_variable(self) -> Variable:
        """The frozen variable W itself, also while a call is shown something else."""
        return self.__dict__[backend_of(self).kernel_attributes[self._kernel_role]]

    def _is_trained(self, variable: Variable) -> bool:
        name = backend_of(self).variable_name(variable)
        if name in LORA_VARIABLE_NAMES:
            frozen = ("kernel_lora_a0", "kernel_lora_b0")
            return name not in (
                ("kernel_lora_a", *frozen) if self.lora.lora_freeze_a else frozen
            )
        return self.lora.lora_train_bias and backend_of(self).is_bias_like(variable)

    # -- what cannot be adapted --------------------------------------------------------

    @classmethod
    def check_support(cls, layer: Layer, settings: LayerSettings) -> None:
        """Raise a ValueError with the reason if ``layer`` cannot become one of this class."""
        check_super_calls(original_class(type(layer)), layer.name)
        reason = backend_of(layer).refusal(layer)
        if reason is None and settings.lora_qkv:
            reason = cls._qkv_refusal(layer, settings)
            if reason:
                reason += "; pass lora_qkv=None"
        if reason is None and (settings.lora_dropout or settings.lora_bias):
            reason = cls._branch_refusal(layer)
            if reason:
                reason += "; pass lora_dropout=0 and lora_bias=False"
        if reason is None and settings.lora_bias:
            reason = cls._bias_refusal(layer)
            if reason:
                reason += "; pass lora_bias=False"
        if reason is None and settings.lora_use_loha:
            reason = cls._loha_refusal(layer)
            if reason:
                reason += "; pass lora_use_loha=False"
        if reason:
            raise NotAdaptable(
                f"Layer '{layer.name}' ({type(layer).__name__}) cannot be adapted: {reason}, "
                "or leave the layer out of lora_targets."
            )

    @classmethod
    def _branch_refusal(cls, layer: Layer) -> str | None:
        """Why the branch of a layer cannot have dropout or a bias, or None."""
        if has_keras_call(cls):
            return None
        return (
            "its class has a call of its own, which has no branch for lora_dropout or lora_bias"
        )

    @classmethod
    def _bias_refusal(cls, layer: Layer) -> str | None:
        """Why the branch of a layer cannot have a bias, or None."""
        if getattr(layer, "use_bias", False):
            return None
        return "it has no bias into which that of the branch could be merged"

    @classmethod
    def _loha_refusal(cls, layer: Layer) -> str | None:
        """Why the update of a layer cannot be that of LoHa, or None."""
        return None

    def shift_refusal(self) -> str | None:
        """Why no bias can be added to the outputs of the layer, or None."""
        if getattr(self, "bias", None) is None:
            return "it has no bias"
        return self._bias_refusal(self)

    def mixed_batch_refusal(self) -> str | None:
        """Why each example of a batch cannot use an adapter of its own here, or None."""
        if self._computes_mixed_batches():
            return None
        cls = original_class(type(self)).__name__
        return f"is of the class {cls}, whose own call does not support mixed batches"

    def _computes_mixed_batches(self) -> bool:
        """Whether the call is known to compute with the values of a source."""
        return has_keras_call(type(self))

    @classmethod
    def _qkv_refusal(cls, layer: Layer, settings: LayerSettings) -> str | None:
        """Why the kernel of a layer does not consist of fused blocks, or None."""
        return "lora_qkv is for the fused kernels of dense layers only"

    def _probe_shape(self) -> tuple[int, ...] | None:
        """The shape of a smallest input, or None if a trial call is of no use."""
        return None

    def check_call(self) -> None:
        """Try the ``call`` of a subclass on zeros, to see whether it uses the kernel.

        Raises:
            NotAdaptable: if it does not. A call that needs more than one input is not
                tried; it is checked when it is first called.
        """
        shape = self._probe_shape()
        if has_keras_call(type(self)) or shape is None:
            return
        backend = backend_of(self)
        zeros: Any = np.zeros(shape, "float32")
        try:
            self.call(backend.ops.cast(zeros, backend.compute_dtype(self)))
        except NotAdaptable:
            raise
        except Exception:  # noqa: BLE001 - a user's call may do anything with zeros
            return

    # -- the layer ---------------------------------------------------------------------

    def call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The call of a class of its own, which is shown the effective kernel."""
        if self.merged and backend_of(self).is_called_in_training():
            warnings.warn(_MERGED_IN_TRAINING, stacklevel=2)
        with kernel_hook.kernel_shown_as(self, self._shown_kernel()) as running:
            outputs = self._base_call(inputs, *args, **kwargs)
        # Once is enough: a call that Keras or the user compiled runs no Python again.
        state = self._lora_state
        state.kernel_read = state.kernel_read or running.read_kernel
        if not state.kernel_read:
            raise NotAdaptable(
                f"{self._call_name()} never reads its kernel attribute, so it cannot be "
                "adapted. Leave the layer out of lora_targets, or let its call use the kernel "
                "attribute."
            )
        if not running.reached_product:
            own = f"{original_class(type(self)).__name__} has a call of its own"
            why = "it is merged" if self.merged else own + ", which does not support it"
            mixed_batch.require_none(self, why)
        # The product of a merged layer is not ours, so it does not show.
        transformed = running.read_kernel and not running.reached_product and not self.merged
        state.kernel_transformed = state.kernel_transformed or transformed
        if (self.lora.lora_dropout or self.lora.lora_bias) and transformed:
            raise NotAdaptable(
                f"{self._call_name()} transforms its kernel, so it has no low-rank branch for "
                "dropout or a bias. Pass lora_dropout=0 and lora_bias=False, or leave the "
                "layer out of lora_targets."
            )
        return outputs

    def _shown_kernel(self) -> Tensor:
        """What the base layer's ``call`` sees as its kernel."""
        if self.merged:
            return self._kernel_variable
        backend = backend_of(self)
        return backend.ops.cast(self._effective_kernel(), backend.compute_dtype(self))

    def _call_name(self) -> str:
        return f"The call of {original_class(type(self)).__name__} (layer '{self.name}')"

    def _base_call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's own ``call``."""
        return super().call(inputs, *args, **kwargs)  # type: ignore[misc]

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        return {**config, **self.lora.to_config(backend_of(self).keras)}


def _with_another_seed(initializer: Any, number: int) -> Any:
    """A copy of an initializer that draws other values: one instance repeats itself. Functions
    are used as they are."""
    if not hasattr(initializer, "get_config"):
        return initializer
    config = initializer.get_config()
    if isinstance(config.get("seed"), int):
        config["seed"] += number
    return type(initializer).from_config(config)


def has_keras_call(lora_cls: type, method: str = "call", or_of: str = "") -> bool:
    """Whether a method of the base layer is that of the Keras class that its kind is named
    after, which is known, and not of a subclass: a user's, or Keras' ReversibleEmbedding.

    That of the class ``or_of``, "module.Name", counts as well.
    """
    for cls in lora_cls.__mro__:
        ours = issubclass(cls, (LoRALayer, DepthwiseRoutine))
        if method in cls.__dict__ and not ours:
            known = cls in lora_cls._keras_class.__mro__  # type: ignore[attr-defined]
            return known or f"{cls.__module__}.{cls.__qualname__}" == or_of
    return False
