"""Keras 3, on TensorFlow, JAX or torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import AutocastScope
from keras.src.distribution import distribution_lib
from keras.src.layers.convolutional.base_conv import BaseConv

from tfimm_lora.backend.interface import Backend, Layer, Tensor, Variable
from tfimm_lora.backend.learning_rates import Keras3VariableRates


class _BuildHook:
    """Calls ``_after_build`` while the state of the layer is still open.

    Keras wraps ``build`` in the instance when it is created, so a class that is given to
    a live layer cannot override it; ``_post_build`` is looked up when it is called.
    """

    def _post_build(self) -> None:
        super()._post_build()  # type: ignore[misc]
        self._after_build()  # type: ignore[attr-defined]


class _FilteredWeights:
    """Keeps the ``trainable`` flags of own variables at what ``_is_trained`` says."""

    @property
    def trainable(self) -> bool:
        result: bool = super().trainable  # type: ignore[misc]
        return result

    @trainable.setter
    def trainable(self, value: bool) -> None:
        # Keras sets the flag of every variable inside, also of those kept frozen.
        keras.layers.Layer.trainable.fset(self, value)
        self._sync_trainability()

    def _sync_trainability(self) -> None:
        for variable in _own_variables(self):
            # Assigning the flag where the optimizer or an integer variable would object
            # is avoided by touching only what differs.
            trained = self.trainable and self._is_trained(variable)  # type: ignore[attr-defined]
            if variable.trainable != trained:
                variable.trainable = trained


def _own_variables(layer: Any) -> list[Any]:
    return list(layer._trainable_variables) + list(layer._non_trainable_variables)


class Keras3Backend(Backend):
    """Keras 3, seen through the common interface."""

    keras = keras
    ops = keras.ops
    kernel_attributes = {
        "kernel": "_kernel",
        "depthwise": "kernel",
        "embedding": "_embeddings",
    }
    FilteredWeights = _FilteredWeights
    BuildHook = _BuildHook
    VariableRates = Keras3VariableRates

    def framework(self) -> str:
        result: str = keras.backend.backend()
        return result

    def distribution(self) -> Any:
        return distribution_lib.distribution()

    def copies(self, variable: Variable) -> int:
        if keras.backend.backend() != "jax":
            return 1
        return len(variable.value.sharding.device_set)

    def depthwise_convolution(self, layer: Layer, inputs: Tensor, kernel: Tensor) -> Tensor:
        return keras.ops.depthwise_conv(
            inputs,
            kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def conv1d_call(self, layer: Layer, inputs: Tensor, base_call: Callable[..., Any]) -> Any:
        """Call a Conv1D so that it goes through ``convolution_op``."""
        if layer.padding == "causal":
            inputs = keras.ops.pad(inputs, layer._compute_causal_padding())
        return BaseConv.call(layer, inputs)

    def conv1d_op(
        self, layer: Layer, inputs: Tensor, kernel: Tensor, base_op: Callable[..., Any]
    ) -> Any:
        """The convolution of a Conv1D whose inputs are padded already if it is causal."""
        if layer.padding != "causal":
            return base_op(inputs, kernel)
        return keras.ops.conv(
            inputs,
            kernel,
            strides=list(layer.strides),
            padding="valid",
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def own_variables(self, layer: Layer) -> list[Variable]:
        return _own_variables(layer)

    def trainable_own_variables(self, layer: Layer) -> list[Variable]:
        return list(layer._trainable_variables)

    def random_states(self, layer: Layer) -> list[Variable]:
        return [generator.state for generator in layer._seed_generators]

    def restart_random_ops(self, seed: int) -> None:
        """Layers of Keras 3 keep a state; this is for what calls ``tf.random`` itself."""
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            tf.random.set_seed(seed)

    def optimizer_variables(self, optimizer: Any) -> list[Variable]:
        return list(optimizer.variables)

    def optimizer_rule(self, optimizer: Any) -> type:
        # On torch Keras makes an instance of a class that updates all variables at once.
        own = type(optimizer).__mro__
        return next(c for c in own if not c.__module__.startswith("keras.src.backend"))

    def is_built_optimizer(self, optimizer: Any) -> bool:
        return bool(optimizer.built)

    def to_numpy(self, variable: Variable) -> np.ndarray:
        with AutocastScope(None):
            return np.array(keras.ops.convert_to_numpy(variable))

    def full_precision(self, variable: Variable) -> Tensor:
        with AutocastScope(None):
            tensor = keras.ops.convert_to_tensor(variable)
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            return tf.convert_to_tensor(tensor)  # Keras hands out the tf.Variable
        return tensor

    def add_weight(
        self, layer: Layer, name: str, shape: tuple[int, ...], beside: Variable, **options: Any
    ) -> None:
        # add_weight opens the layer's own scope, the last one of the kernel's path.
        with _unlocked(layer), _scopes(beside.path.split("/")[:-2]):
            variable = layer.add_weight(
                name=name,
                shape=shape,
                dtype="float32",
                autocast=False,
                trainable=True,
                **options,
            )
            setattr(layer, name, variable)

    def remove_weight(self, layer: Layer, attribute: str) -> None:
        layer._untrack_variable(getattr(layer, attribute))
        layer.__dict__.pop(attribute)
        _forget_tf_tracking(layer, attribute)

    def add_sublayer(self, layer: Layer, attribute: str, sublayer: Layer) -> None:
        with _unlocked(layer):
            setattr(layer, attribute, sublayer)

    def remove_sublayer(self, layer: Layer, attribute: str) -> None:
        with _unlocked(layer):
            layer._tracker.untrack(getattr(layer, attribute))
        layer.__dict__.pop(attribute, None)
        getattr(layer, "_modules", {}).pop(attribute, None)  # torch
        _forget_tf_tracking(layer, attribute)

    def reset_functions(self, model: Layer) -> None:
        super().reset_functions(model)
        if keras.backend.backend() == "torch":
            # What torch calls the parameters of a model is remembered in every layer.
            for _, layer in self.walk(model):
                if hasattr(layer, "_torch_params"):
                    layer._track_variables()

    def is_compiled(self, model: Layer) -> bool:
        return bool(getattr(model, "compiled", False))

    def mark_uncompiled(self, model: Layer) -> None:
        model.compiled = False

    def custom_gradient(self, function: Callable[..., Any], *args: Any) -> Any:
        # jax wants a cotangent for every argument.
        zeros = keras.backend.backend() == "jax"

        def keras_function(*tensors: Any) -> Any:
            y, grad = function(*tensors)

            def keras_grad(*given: Any, upstream: Any = None) -> Any:
                # torch passes the arguments and `upstream`, the others only that.
                grads = grad(given[0] if upstream is None else upstream)
                if not zeros:
                    return grads
                return tuple(
                    keras.ops.zeros_like(t) if g is None else g for g, t in zip(grads, tensors)
                )

            return y, keras_grad

        return keras.ops.custom_gradient(keras_function)(*args)

    def vjp(self, function: Callable[[Any], Any], x: Tensor, dy: Tensor) -> Any:
        framework = self.framework()
        if framework == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                y = function(x)
            return tape.gradient(y, x, dy)
        if framework == "jax":
            import jax

            return jax.vjp(function, x)[1](dy)[0]
        import torch

        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(function(leaf), leaf, dy)[0]

    def linear(
        self, function: Callable[[Any], Any], x: Tensor
    ) -> tuple[Any, Callable[..., Any]]:
        if keras.backend.backend() != "torch":
            return super().linear(function, x)
        import torch

        # torch, which runs what it is told, would compute the function again in ``vjp``.
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = function(leaf)
        return y.detach(), lambda dy: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]

    def refusal(self, layer: Layer) -> str | None:
        if getattr(layer, "quantization_mode", None):
            return (
                f"it is quantised ({layer.quantization_mode}); convert the layer before "
                "quantising the merged model"
            )
        if getattr(layer, "lora_enabled", False) or getattr(layer, "lora_rank", None):
            return (
                "Keras' own enable_lora is active on it; build the model without "
                "enable_lora and lora_rank"
            )
        return None

    def variable_scope(self, variable: Variable) -> contextlib.AbstractContextManager[Any]:
        strategy = getattr(variable.value, "distribute_strategy", None)
        return strategy.scope() if strategy is not None else contextlib.nullcontext()

    def variable_flags(self, layer: Layer) -> dict[int, bool]:
        """Which of the layer's own variables are trainable, by id."""
        return {id(v): v.trainable for v in _own_variables(layer)}

    def restore_flags(self, layer: Layer, flags: Mapping[int, bool]) -> None:
        """Set the flags back to what ``variable_flags`` read."""
        for variable in _own_variables(layer):
            trainable = flags.get(id(variable), variable.trainable)
            if variable.trainable != trainable:
                variable.trainable = trainable

    def is_dense_tensor(self, x: Tensor) -> bool:
        return not (getattr(x, "ragged", False) or _is_tf_composite(x))

    def rank_of(self, x: Tensor) -> int | None:
        shape = getattr(x, "shape", None)
        try:
            return len(shape)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None

    def dtype_of(self, x: Tensor) -> str:
        result: str = keras.backend.standardize_dtype(x.dtype)
        return result

    def store_value(self, value: Any) -> Any:
        """What ``save_own_variables`` puts into a store."""
        return value

    def is_rebuilt_with_layers(self, layer: Layer) -> bool:
        from keras.src.models.functional import Functional

        exact = (keras.Sequential, keras.Model, Functional)
        return type(layer) in exact or isinstance(layer, keras.layers.Wrapper)

    def is_functional(self, layer: Layer) -> bool:
        from keras.src.models.functional import Functional

        return isinstance(layer, Functional)

    def made_by(self, tensor: Tensor) -> tuple[Any, list[Any]]:
        layer, index, _ = tensor._keras_history
        return layer, list(layer._inbound_nodes[index].input_tensors)

    @contextlib.contextmanager
    def dtype_policy(self, name: Any) -> Iterator[None]:
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(name or policy)
        try:
            yield
        finally:
            keras.config.set_dtype_policy(policy)

    def input_shapes(self, model: Layer) -> Any:
        """The shapes of the inputs that a model was built for, nested as they are."""
        shapes = getattr(model, "_build_shapes_dict", None) or {}
        return next(iter(shapes.values())) if len(shapes) == 1 else None


@contextlib.contextmanager
def _unlocked(layer: Layer) -> Any:
    """Keras locks the state of a built layer; open it for a moment."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._lock_state()


@contextlib.contextmanager
def _scopes(names: list[str]) -> Any:
    """Open just these name scopes, whichever are open now; they make a variable's path."""
    outer = global_state.get_global_attribute("name_scope_stack", default=[])
    global_state.set_global_attribute("name_scope_stack", [])
    try:
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(keras.name_scope(name))
            yield
    finally:
        global_state.set_global_attribute("name_scope_stack", outer)


def _forget_tf_tracking(layer: Layer, attribute: str) -> None:
    """On TensorFlow a layer is a trackable too, which remembers its attributes."""
    if hasattr(layer, "_delete_tracking"):
        layer._delete_tracking(attribute)


def _is_tf_composite(x: Tensor) -> bool:
    kind = type(x)
    return kind.__module__.startswith("tensorflow.") and kind.__name__ in (
        "RaggedTensor",
        "SparseTensor",
    )


BACKEND = Keras3Backend()
