"""``LoRALayer``: what every adapted layer shares. Its kinds add only their product."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfimm_lora import config, validation
from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Found
from tfimm_lora.initializers import from_kernel
from tfimm_lora.layers import dora, forms, kernel_hook, mixed_batch, products, qkv
from tfimm_lora.layers.state import LayerValues, State


@dataclass(frozen=True)
class LayerSettings:
    """The settings of one adapted layer, validated.

    Attributes:
        rank, alpha, dropout, freeze_a, use_dora, init, initializer, regularizer: as in
            ``LoRAConfig``.
        train_bias: whether the layer's own bias is trained.
        qkv: the parts of a fused kernel that are adapted; None for the kernel as one.
        qkv_layout: the parts that a fused kernel consists of.
        use_rslora: whether alpha is divided by sqrt(rank).
        branch_bias: whether the branch has a bias of its own.
        scale: alpha / rank, or alpha / sqrt(rank).
    """

    rank: int
    alpha: float | None
    dropout: float
    initializer: Any
    regularizer: Any
    train_bias: bool
    qkv: str | None = None
    qkv_layout: str = "qkv"
    use_rslora: bool = False
    freeze_a: bool = False
    use_dora: bool = False
    branch_bias: bool = False
    init: str = "default"

    def __post_init__(self) -> None:
        validation.check_rank(self.rank)
        validation.check_alpha(self.alpha)
        validation.check_dropout(self.dropout)
        validation.check_qkv(self.qkv)
        validation.check_variant(self.use_dora, self.branch_bias)
        config.check_start(self.init, self.initializer)
        qkv.check_layout(self.qkv, self.qkv_layout)

    @property
    def scale(self) -> float:
        return config.scale(self.rank, self.alpha, self.use_rslora)


#: The arguments that LoRA adds to a layer's own, with their defaults.
LAYER_ARGUMENTS: dict[str, Any] = {
    "lora_rank": 4,
    "lora_alpha": None,
    "lora_use_rslora": False,
    "lora_use_dora": False,
    "lora_bias": False,
    "lora_init": "default",
    "lora_dropout": 0.0,
    "lora_freeze_a": False,
    "lora_initializer": None,
    "lora_regularizer": None,
    "lora_train_bias": False,
    "lora_qkv": None,
    "lora_qkv_layout": "qkv",
}


def layer_settings(backend: Any, arguments: dict[str, Any]) -> LayerSettings:
    """A ``LayerSettings`` from lora_* arguments; missing ones take their defaults."""
    config.check_keywords(arguments, LAYER_ARGUMENTS, "a LoRA layer")
    values = {**LAYER_ARGUMENTS, **arguments}
    return LayerSettings(
        rank=values["lora_rank"],
        alpha=values["lora_alpha"],
        dropout=values["lora_dropout"],
        initializer=backend.keras.initializers.get(values["lora_initializer"]),
        regularizer=backend.keras.regularizers.get(values["lora_regularizer"]),
        train_bias=bool(values["lora_train_bias"]),
        qkv=values["lora_qkv"],
        qkv_layout=values["lora_qkv_layout"],
        use_rslora=bool(values["lora_use_rslora"]),
        freeze_a=bool(values["lora_freeze_a"]),
        use_dora=bool(values["lora_use_dora"]),
        branch_bias=bool(values["lora_bias"]),
        init=values["lora_init"],
    )


_building = threading.local()


@contextlib.contextmanager
def building_for_other_weights() -> Iterator[None]:
    """Within this block layers are built that get the weights of another model: what their
    factors start at (``start_factors``) is left to whoever gives them these."""
    _building.for_other_weights = True
    try:
        yield
    finally:
        _building.for_other_weights = False


class LoRALayer(LayerValues):
    """Mixin that adapts a Keras layer: y = x(W + s A B), W frozen, s = alpha / rank.

    The variables are named ``kernel_lora_a`` and ``kernel_lora_b`` and are float32; B
    starts at zero, so the layer starts as its base. DoRA, a bias of the branch and some ways
    to start add others (``config.LORA_VARIABLE_NAMES``). Everything else (strides, padding,
    dilation, groups, data format, activation, bias, constraints) is the base layer's.

    Args:
        lora_rank: Rank r, a positive integer. Default 4.
        lora_alpha: Numerator of the scale s; None (default) for a scale of 1.
        lora_use_rslora: Whether s is alpha / sqrt(rank). Default False.
        lora_use_dora: Whether the norms of the kernel's columns are variables (DoRA); see
            ``layers.magnitude``. Default False.
        lora_bias: Whether the branch has a bias c: y = x(W + s A B) + s c. Default False.
        lora_dropout: Rate in [0, 1) of the dropout on the branch's input. Default 0.
        lora_init: How A and B start; see ``LoRAConfig``. Default "default".
        lora_freeze_a: Whether B alone is trained (LoRA-FA). Default False.
        lora_initializer: Initializer of A. None (default): uniform, +-1/sqrt(fan_in).
        lora_regularizer: Regularizer of A and of B. Default none.
        lora_train_bias: Whether the layer's bias is trained too. Default False.
        lora_qkv, lora_qkv_layout: Of dense layers; see ``LoRADense``.

    Raises:
        ValueError, TypeError: for an argument out of range or of the wrong type.

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
    """

    #: Which variable is the kernel: a key of ``Backend.kernel_attributes``.
    _kernel_role = "kernel"

    # Of the layer that this is mixed into, and its factors.
    name: str
    built: bool
    bias: Any
    activation: Any
    lora_branch_dropout: Any
    kernel_lora_a: Any
    kernel_lora_b: Any
    _sync_trainability: Callable[[], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        lora = {k: kwargs.pop(k) for k in list(kwargs) if k in LAYER_ARGUMENTS}
        settings = layer_settings(backend_of(self), lora)
        super().__init__(*args, **kwargs)
        self.check_support(self, settings)
        self._attach(settings)

    # -- state -----------------------------------------------------------------------

    @property
    def lora(self) -> LayerSettings:
        """The layer's settings: rank, alpha, scale, dropout, ..."""
        return self._lora_state.settings

    def _attach(self, settings: LayerSettings, found: Found | None = None) -> None:
        """Give the layer its state, and its factors as soon as it has a kernel."""
        backend = backend_of(self)
        self.__dict__["_lora_state"] = State(settings, found)
        if settings.dropout:
            dropout = backend.keras.layers.Dropout(settings.dropout, name="lora_dropout")
            backend.add_sublayer(self, "lora_branch_dropout", dropout)
        if self.built:
            self._after_build()

    def _detach(self) -> Found | None:
        """Undo ``_attach``: drop state, factors and dropout."""
        backend = backend_of(self)
        for attribute in self._lora_variables():
            backend.remove_weight(self, attribute)
        if self.lora.dropout:
            backend.remove_sublayer(self, "lora_branch_dropout")
        return self.__dict__.pop("_lora_state").found

    def _after_build(self) -> None:
        if "_lora_state" not in self.__dict__ or "kernel_lora_a" in self.__dict__:
            return
        backend, settings = backend_of(self), self.lora
        kernel = self._kernel_variable
        zeros = backend.keras.initializers.Zeros()
        with backend.variable_scope(kernel):
            for name, shape in self._variable_shapes().items():
                is_a = name == "kernel_lora_a"
                initializer = settings.initializer or self._default_initializer()
                regularizer = settings.regularizer if name in config.LORA_WEIGHT_NAMES else None
                backend.add_weight(
                    self,
                    name,
                    shape,
                    beside=kernel,
                    initializer=initializer if is_a else zeros,
                    regularizer=regularizer,
                )
        self._sync_trainability()
        if not getattr(_building, "for_other_weights", False):
            self.start_factors()

    def start_factors(self) -> None:
        """Draw A and B anew as ``lora_init`` says, for the kernel as it is now.

        Raises:
            ValueError: if the layer is merged or disabled, or the start is not defined for
                its kernel and rank.
        """
        if self.lora.init in ("default", "eva"):
            return
        self._require_enabled("started anew")
        if self.merged:
            raise ValueError(f"Layer '{self.name}' is merged. Call unmerge_weights first.")
        kernel = backend_of(self).to_numpy(self._kernel_variable).astype("float32")
        # Follows keras.utils.set_random_seed, which seeds NumPy.
        rng = np.random.default_rng(np.random.randint(2**31))
        try:
            a, b = self._started(kernel, rng)
        except ValueError as error:
            raise ValueError(f"Layer '{self.name}': {error}") from error
        values = {"kernel_lora_a": a, "kernel_lora_b": b}
        if from_kernel.subtracts_initial_update(self.lora.init):
            values.update(kernel_lora_a0=a, kernel_lora_b0=b)
        self.assign_update(values)

    def _started(
        self, kernel: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A and B as ``lora_init`` says, in their shapes."""
        settings = self.lora
        shape_a, shape_b = self._factor_shapes(kernel.shape, settings.rank)
        matrix = kernel.reshape(-1, shape_b[-1])
        found = from_kernel.initial_factors(
            settings.init, matrix, settings.rank, settings.scale, rng
        )
        return found.a.reshape(shape_a), found.b.reshape(shape_b)

    def _variable_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the layer's LoRA variables by name."""
        settings, kernel_shape = self.lora, tuple(self._kernel_variable.shape)
        a, b = self._factor_shapes(kernel_shape, settings.rank)
        shapes = {"kernel_lora_a": a, "kernel_lora_b": b}
        if settings.use_dora:
            axes = self._summed_axes()
            shapes["kernel_lora_magnitude"] = dora.shape(kernel_shape, axes)
        if settings.branch_bias:
            shapes["kernel_lora_shift"] = tuple(self.bias.shape)
        if from_kernel.subtracts_initial_update(settings.init):
            shapes.update(kernel_lora_a0=a, kernel_lora_b0=b)
        return shapes

    def _default_initializer(self) -> Any:
        return backend_of(self).default_initializer()

    @property
    def _kernel_variable(self) -> Any:
        """The frozen variable W itself, also while a call shows something else."""
        return self.__dict__[backend_of(self).kernel_attributes[self._kernel_role]]

    def _is_trained(self, variable: Any) -> bool:
        name = backend_of(self).variable_name(variable)
        if name in config.LORA_VARIABLE_NAMES:
            frozen = ("kernel_lora_a0", "kernel_lora_b0")
            return name not in (("kernel_lora_a", *frozen) if self.lora.freeze_a else frozen)
        return self.lora.train_bias and backend_of(self).is_bias_like(variable)

    @classmethod
    def check_support(cls, layer: Any, settings: LayerSettings) -> None:
        """Raise a ValueError with the reason if ``layer`` cannot become one of this class."""
        reason = backend_of(layer).refusal(layer)
        if reason is None and settings.qkv:
            reason = cls._parts_refusal(layer, settings)
            if reason:
                reason += "; pass lora_qkv=None"
        if reason is None and (settings.dropout or settings.branch_bias):
            reason = cls._branch_refusal(layer)
            if reason:
                reason += "; pass lora_dropout=0 and lora_bias=False"
        if reason is None and settings.branch_bias:
            reason = cls._bias_refusal(layer)
            if reason:
                reason += "; pass lora_bias=False"
        if reason:
            raise NotAdaptable(
                f"Layer '{layer.name}' ({type(layer).__name__}) cannot be adapted: {reason}, "
                "or leave the layer out of lora_targets."
            )

    @classmethod
    def _branch_refusal(cls, layer: Any) -> str | None:
        """Why a layer has no branch to drop from or to give a bias, or None."""
        if has_keras_call(cls):
            return None
        return (
            "its class has a call of its own, in which lora_dropout and lora_bias have no place"
        )

    @classmethod
    def _bias_refusal(cls, layer: Any) -> str | None:
        """Why the branch of a layer cannot have a bias, or None."""
        if getattr(layer, "use_bias", False):
            return None
        return "it has no bias into which that of the branch could be merged"

    @classmethod
    def _parts_refusal(cls, layer: Any, settings: LayerSettings) -> str | None:
        """Why a layer's kernel is not one of fused parts, or None."""
        return "only the kernel of a dense layer is taken apart by lora_qkv"

    def _probe_shape(self) -> tuple[int, ...] | None:
        """The shape of a smallest input, or None where a trial call is of no use."""
        return None

    def check_call(self) -> None:
        """Try a call of a subclass's own on zeros, to see that it uses the kernel.

        Raises:
            NotAdaptable: if it does not. A call that needs more than one input is not
                tried; it is checked when it first runs.
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
        except Exception:  # noqa: BLE001 - a stranger's call may do anything to zeros
            return

    # -- formulas --------------------------------------------------------------------

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for a kernel of this shape."""
        raise NotImplementedError

    def _product(self, inputs: Any = None) -> products.Product:
        """The layer's product (on ``inputs``); see ``update.Product``."""
        raise NotImplementedError

    def _plain_product(self, inputs: Any = None) -> Any:
        """The product of the base layer, of which A and B are not taken apart."""
        return self._product(inputs)

    def _factors(self) -> tuple[Any, Any]:
        """A and B as float32 tensors; with a start that is taken off, those of A B - A0 B0."""
        backend = backend_of(self)
        a, b = (backend.full_precision(self.__dict__[n]) for n in config.LORA_WEIGHT_NAMES)
        if "kernel_lora_a0" not in self.__dict__:
            return a, b
        a0, b0 = (
            backend.ops.stop_gradient(backend.full_precision(self.__dict__[n]))
            for n in ("kernel_lora_a0", "kernel_lora_b0")
        )
        return self._side_by_side(backend.ops, (a, b), (a0, -b0))

    def _side_by_side(
        self, ops: Any, one: tuple[Any, Any], two: tuple[Any, Any]
    ) -> tuple[Any, Any]:
        """The factors, of both ranks together, of the sum of two updates."""
        return (
            ops.concatenate([one[0], two[0]], axis=-1),
            ops.concatenate([one[1], two[1]], axis=self._rank_axis_of_b()),
        )

    def _apart(
        self, ops: Any, both: tuple[Any, Any]
    ) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """The reverse of ``_side_by_side``, for two of one rank."""
        one_a, two_a = ops.split(both[0], 2, axis=-1)
        one_b, two_b = ops.split(both[1], 2, axis=self._rank_axis_of_b())
        return (one_a, one_b), (two_a, two_b)

    def _rank_axis_of_b(self) -> int:
        return 0

    def _summed_axes(self) -> tuple[int, ...]:
        """The axes of the kernel that the product sums over: all but those of the output."""
        return tuple(range(len(self._kernel_variable.shape) - 1))

    def _wide_kernel(self) -> Any:
        """W in float32, or in its own type if that is wider."""
        backend = backend_of(self)
        kernel = backend.ops.stop_gradient(backend.full_precision(self._kernel_variable))
        if backend.dtype_of(kernel) in ("float16", "bfloat16"):
            kernel = backend.ops.cast(kernel, "float32")
        return kernel

    def _effective_kernel(self) -> Any:
        """W + s A B (with DoRA, of its magnitude) in the type of ``_wide_kernel``."""
        kernel = self._wide_kernel()
        adapted = self._directed_kernel(kernel)
        return adapted * self._gain(kernel, adapted) if self.lora.use_dora else adapted

    def _directed_kernel(self, kernel: Any) -> Any:
        """W + s A B, from W."""
        backend = backend_of(self)
        a, b = (backend.ops.cast(f, backend.dtype_of(kernel)) for f in self._factors())
        return products.effective_kernel(self._product(), kernel, a, b, self.lora.scale)

    def _gain(self, kernel: Any, adapted: Any) -> Any:
        """DoRA's factor for each output; see ``magnitude.gain``."""
        backend = backend_of(self)
        offset = backend.full_precision(self.__dict__["kernel_lora_magnitude"])
        offset = backend.ops.cast(offset, backend.dtype_of(kernel))
        return dora.gain(backend.ops, kernel, adapted, offset, self._summed_axes())

    def _shown_kernel(self) -> Any:
        """What the base layer's ``call`` sees as its kernel."""
        if self.merged:
            return self._kernel_variable
        backend = backend_of(self)
        return backend.ops.cast(self._effective_kernel(), backend.compute_dtype(self))

    def _adapted(self, inputs: Any, places: int) -> Any:
        """The product with the adapted kernel at so many places of the inputs, in the form
        that suits (see ``forms``)."""
        backend, settings, product = backend_of(self), self.lora, self._product(inputs)
        dtype = backend.compute_dtype(self)
        kernel = backend.ops.stop_gradient(backend.full_precision(self._kernel_variable))
        route = mixed_batch.current()
        if route is not None:
            plain = self._plain_product(inputs)
            return mixed_batch.routed(self, backend, plain, inputs, kernel, dtype, route)
        kernel, a, b = (backend.ops.cast(t, dtype) for t in (kernel, *self._factors()))
        if settings.dropout or not self._splits(inputs):
            branch = self.lora_branch_dropout(inputs) if settings.dropout else inputs
            outputs = products.dropped(product, inputs, branch, kernel, a, b, settings.scale)
        else:
            work = self._work(inputs, places, a.shape[-1])
            form = forms.choose(work, dtype in ("float16", "bfloat16"))
            train_a = not settings.freeze_a
            outputs = products.adapted(
                backend, product, inputs, kernel, a, b, settings.scale, form, train_a
            )
        return self._finished(outputs)

    def _splits(self, inputs: Any) -> bool:
        """Whether the product on ``inputs`` has all that ``update.adapted`` needs of it."""
        return True

    def _work(self, inputs: Any, places: int, rank: int) -> forms.Work:
        """How much there is to do; here for a kernel of shape (*window, units)."""
        *window, units = self._kernel_variable.shape
        return forms.Work(places, math.prod(window), window[-1], units, rank)

    def _finished(self, outputs: Any) -> Any:
        """Outputs of the product with DoRA's factor, or with the bias of the branch."""
        backend, settings = backend_of(self), self.lora
        if settings.use_dora:
            kernel = self._wide_kernel()
            gain = self._gain(kernel, self._directed_kernel(kernel))
            narrow = backend.dtype_of(outputs) in ("float16", "bfloat16")
            factor = self._along_outputs(gain, len(outputs.shape))
            return dora.scaled(backend.ops, outputs, factor, narrow)
        if settings.branch_bias:
            shift = backend.full_precision(self.__dict__["kernel_lora_shift"])
            shift = self._along_outputs(settings.scale * shift, len(outputs.shape))
            return outputs + backend.ops.cast(shift, backend.dtype_of(outputs))
        return outputs

    def _along_outputs(self, values: Any, rank: int) -> Any:
        """A value for each output, in a shape that goes with outputs of a rank."""
        channels_first = getattr(self, "data_format", None) == "channels_first"
        shape = [1] * rank
        shape[1 if channels_first else -1] = -1
        return backend_of(self).ops.reshape(values, shape)

    # -- the layer -------------------------------------------------------------------

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with kernel_hook.kernel_shown_as(self, self._shown_kernel) as frame:
            outputs = self._base_call(inputs, *args, **kwargs)
        # Once seen is enough: a call that Keras or the user compiled runs no Python again.
        state = self._lora_state
        state.kernel_seen = state.kernel_seen or frame.effective is not None
        if not state.kernel_seen:
            raise NotAdaptable(
                f"{self._call_name()} never reads its kernel attribute, so it cannot be "
                "adapted. Leave the layer out of lora_targets, or let its call use the kernel "
                "attribute."
            )
        self._require_routed()
        # A merged layer goes past the product that would tell.
        transformed = (
            frame.effective is not None and not frame.reached_product and not self.merged
        )
        state.kernel_transformed = state.kernel_transformed or transformed
        if (self.lora.dropout or self.lora.branch_bias) and transformed:
            raise NotAdaptable(
                f"{self._call_name()} transforms its kernel, so there is no low-rank branch "
                "to drop from or to give a bias. Pass lora_dropout=0 and lora_bias=False, or "
                "leave the layer out of lora_targets."
            )
        return outputs

    def _require_routed(self) -> None:
        """Raise if adapters were chosen by example and this layer did not go by them."""
        route = mixed_batch.current()
        if route is not None and id(self) not in route.used:
            why = (
                "it is merged: call unmerge_lora_weights first"
                if self.merged
                else ("its own call has no place for that")
            )
            raise ValueError(
                f"Layer '{self.name}' ({base_of(type(self)).__name__}) cannot take an adapter "
                f"for each example; {why}."
            )

    def _call_name(self) -> str:
        return f"The call of {base_of(type(self)).__name__} (layer '{self.name}')"

    def _base_call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The base layer's own ``call``."""
        return super().call(inputs, *args, **kwargs)  # type: ignore[misc]

    def get_config(self) -> dict[str, Any]:
        backend, settings = backend_of(self), self.lora
        initializers, regularizers = backend.keras.initializers, backend.keras.regularizers
        return {
            **super().get_config(),  # type: ignore[misc]
            "lora_rank": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_use_rslora": settings.use_rslora,
            "lora_use_dora": settings.use_dora,
            "lora_bias": settings.branch_bias,
            "lora_init": settings.init,
            "lora_dropout": settings.dropout,
            "lora_freeze_a": settings.freeze_a,
            "lora_initializer": initializers.serialize(settings.initializer)
            if settings.initializer is not None
            else None,
            "lora_regularizer": regularizers.serialize(settings.regularizer)
            if settings.regularizer is not None
            else None,
            "lora_train_bias": settings.train_bias,
            "lora_qkv": settings.qkv,
            "lora_qkv_layout": settings.qkv_layout,
        }


def base_of(lora_cls: type) -> type:
    """The ordinary layer class below a LoRA class."""
    return next(
        cls
        for cls in lora_cls.__mro__
        if not issubclass(cls, LoRALayer) and _is_layer_class(cls)
    )


def _is_layer_class(cls: type) -> bool:
    try:
        return issubclass(cls, backend_of(cls).keras.layers.Layer)
    except TypeError:
        return False


def has_keras_call(lora_cls: type, method: str = "call") -> bool:
    """Whether a method of the base layer is that of the Keras layer that its kind is named
    after, which we know, or a subclass's: a user's, or Keras' own ReversibleEmbedding."""
    for cls in lora_cls.__mro__:
        if method in cls.__dict__ and not issubclass(cls, LoRALayer):
            return cls in lora_cls._keras_class.__mro__  # type: ignore[attr-defined]
    return False


class NotAdaptable(ValueError):
    """A layer's class rules out what was asked of it."""
