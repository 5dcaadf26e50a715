"""Keras 3, on TensorFlow, JAX or torch."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import AutocastScope
from keras.src.distribution import distribution_lib
from keras.src.layers.convolutional.base_conv import BaseConv

from tfimm_lora.backend import keras3_accumulation, keras3_recompute
from tfimm_lora.backend.interface import Backend, Layer, MeshAxes, Tensor, Variable
from tfimm_lora.backend.learning_rates import Keras3VariableRates

#: The names that Keras gives to variables.
_UNNAMED = re.compile(r"variable_\d+")


class _BuildHook:
    """Call ``_after_build`` before Keras locks the state of the layer.

    Keras wraps ``build`` in the instance when it is created, so the class of a converted layer
    cannot override it. ``_post_build`` is looked up in the class when it is called.
    """

    def _post_build(self) -> None:
        super()._post_build()  # type: ignore[misc]
        self._after_build()  # type: ignore[attr-defined]


class _FilteredWeights:
    """Keep the ``trainable`` flags of own variables equal to ``_is_trained``."""

    @property
    def trainable(self) -> bool:
        result: bool = super().trainable  # type: ignore[misc]
        return result

    @trainable.setter
    def trainable(self, value: bool) -> None:
        # Keras sets the flags of all variables inside, also of those that stay frozen.
        keras.layers.Layer.trainable.fset(self, value)
        self._sync_trainability()

    def __setattr__(self, name: str, value: Any) -> None:
        # On TensorFlow the setter is not called if the value is the same as before.
        if name == "trainable" and not _is_set_by_layer_around():
            self._note_trainable(value)  # type: ignore[attr-defined]
        super().__setattr__(name, value)

    def enable_lora(self, *args: Any, **kwargs: Any) -> None:
        """Refuse Keras' own LoRA, whose factors this layer would never use."""
        raise ValueError(
            f"Layer '{self.name}' is part of a model that tfimm_lora injected LoRA into, so "  # type: ignore[attr-defined]
            "Keras' own enable_lora would have no effect on it. Call remove_lora first, or "
            "name the layer in lora_targets when you inject LoRA."
        )

    def _sync_trainability(self) -> None:
        for variable in _own_variables(self):
            # Only flags that differ are set, since setting the flag of an integer variable,
            # or of one that an optimizer uses, can raise an error.
            trained = self.trainable and self._is_trained(variable)  # type: ignore[attr-defined]
            if variable.trainable != trained:
                variable.trainable = trained


def _is_set_by_layer_around() -> bool:
    """Whether ``trainable`` is being set because it is set for a layer or model around."""
    setter = keras.layers.Layer.trainable.fset.__code__
    frame: Any = sys._getframe(2)
    while frame.f_code.co_name == "__setattr__":
        frame = frame.f_back
    return frame.f_code is setter


def _own_variables(layer: Layer) -> list[Variable]:
    return list(layer._trainable_variables) + list(layer._non_trainable_variables)


class Keras3Backend(Backend):
    """The backend of Keras 3."""

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

    def mesh_axes(self, variable: Variable) -> MeshAxes | None:
        layouts = _layout_map()
        layout = None if layouts is None else layouts[variable.path]
        return None if layout is None else tuple(layout.axes)

    def place(
        self, name: str, shape: tuple[int, ...], axes: MeshAxes, beside: Variable
    ) -> None:
        layouts = _layout_map()
        path = f"{beside.path.rpartition('/')[0]}/{name}"
        devices = dict(zip(layouts.device_mesh.axis_names, layouts.device_mesh.shape))

        def divides(axis: str | None, size: int) -> bool:
            return axis is None or size % devices[axis] == 0

        if path in list(layouts):  # `in` is always true of a layout map
            if all(map(divides, layouts[path].axes, shape)):
                return
            del layouts[path]  # of removed factors with other shapes
        if layouts[path] is None or layouts[path] is layouts[beside.path]:
            kept = (axis if divides(axis, n) else None for axis, n in zip(axes, shape))
            layouts[path] = tuple(kept)

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
        """Call a Conv1D so that it uses ``convolution_op``."""
        if layer.padding == "causal":
            inputs = keras.ops.pad(inputs, layer._compute_causal_padding())
        return BaseConv.call(layer, inputs)

    def conv1d_op(
        self, layer: Layer, inputs: Tensor, kernel: Tensor, base_op: Callable[..., Any]
    ) -> Any:
        """Return the convolution of a Conv1D; causal inputs are already padded."""
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

    def variable_name(self, variable: Variable) -> str:
        """The last part of a variable's name; "variable" if it was given none.

        Keras then counts the variables of the process.
        """
        name = super().variable_name(variable)
        return "variable" if _UNNAMED.fullmatch(name) else name

    def own_variables(self, layer: Layer) -> list[Variable]:
        return _own_variables(layer)

    def trainable_own_variables(self, layer: Layer) -> list[Variable]:
        return list(layer._trainable_variables)

    def is_called(self) -> bool:
        return global_state.get_global_attribute("current_call_ctx") is not None

    def is_called_in_training(self) -> bool:
        context = global_state.get_global_attribute("current_call_ctx")
        return getattr(context, "training", None) is True

    def has_hidden_statistics(self, layer: Layer) -> bool:
        if keras.backend.backend() != "torch":
            return False
        is_wrapper = isinstance(layer, keras.layers.TorchModuleWrapper)
        return is_wrapper and any(True for _ in layer.module.buffers())

    def random_states(self, layer: Layer) -> list[Variable]:
        return [generator.state for generator in layer._seed_generators]

    @contextlib.contextmanager
    def restartable_random_ops(
        self, model: Layer, seed: int
    ) -> Iterator[Callable[[int], None]]:
        """Layers of Keras 3 have their own state; this is for code that uses ``tf.random``."""
        if keras.backend.backend() != "tensorflow":
            yield lambda epoch: None
            return
        from tfimm_lora.backend import tensorflow_random

        yield lambda epoch: tensorflow_random.restart(
            (model.train_function, model.test_function), seed
        )

    def accumulate_gradients(self, optimizer: Any, steps: int) -> None:
        keras3_accumulation.accumulate_gradients(optimizer, steps)

    def optimizer_variables(self, optimizer: Any) -> list[Variable]:
        return list(optimizer.variables)

    def optimizer_rule(self, optimizer: Any) -> type:
        # On torch, Keras creates an instance of a subclass that updates all variables at once.
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

            return tf.convert_to_tensor(tensor)  # Keras returns the tf.Variable
        return tensor

    def add_weight(
        self, layer: Layer, name: str, shape: tuple[int, ...], beside: Variable, **options: Any
    ) -> None:
        # add_weight opens the layer's own scope, which is the last one in the kernel's path.
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
            # On torch every layer caches the parameters of the layers inside it.
            for _, layer in self.walk(model):
                if hasattr(layer, "_torch_params"):
                    layer._track_variables()

    def is_compiled(self, model: Layer) -> bool:
        return bool(getattr(model, "compiled", False))

    def has_built_optimizer(self, model: Layer) -> bool:
        return bool(getattr(model.optimizer, "built", False))

    def create_metrics(self, model: Any, batch: tuple[Any, Any]) -> None:
        # JAX does this in fit; torch has nothing to trace. Keras 3.3 lacks the method.
        build = getattr(model, "_symbolic_build", None)
        is_own = type(model).train_step is not keras.Model.train_step
        if build is not None and not is_own and keras.backend.backend() == "tensorflow":
            build(data_batch=batch)

    def mark_compiled(self, model: Layer, compiled: bool) -> None:
        model.compiled = compiled

    def custom_gradient(
        self, function: Callable[..., Any], *args: Any, tangent: Any = None
    ) -> Any:
        # JAX requires a cotangent for every argument.
        zeros = keras.backend.backend() == "jax"
        if zeros and tangent is not None:
            return _with_tangent(lambda *tensors: function(*tensors)[0], tangent)(*args)

        def keras_function(*tensors: Any) -> Any:
            y, grad = function(*tensors)

            def keras_grad(*given: Any, upstream: Any = None) -> Any:
                # torch passes the arguments and `upstream`, the others only the latter.
                grads = grad(given[0] if upstream is None else upstream)
                if not zeros:
                    return grads
                return tuple(
                    keras.ops.zeros_like(t) if g is None else g for g, t in zip(grads, tensors)
                )

            return y, keras_grad

        return keras.ops.custom_gradient(keras_function)(*args)

    def prefers_plain_gradients(self) -> bool:
        if keras.backend.backend() == "tensorflow":
            from tfimm_lora.backend.tensorflow_functions import is_recording

            return not is_recording() and not self.is_called_in_training()
        if keras.backend.backend() != "torch":
            return False
        import torch

        # The functions of torch.func, and forward-mode derivatives.
        transforms = torch._C._are_functorch_transforms_active()
        return bool(transforms or torch.autograd.forward_ad._current_level >= 0)

    def after(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        if self.framework() != "tensorflow" or not self.prefers_plain_gradients():
            return contextlib.nullcontext()
        from tfimm_lora.backend import tensorflow_functions

        return tensorflow_functions.after(x)

    def compiled_call(self, layer: Layer, call: Any, x: Tensor) -> Tensor | None:
        compiled = _compiled_layers()
        return None if compiled is None else compiled.outputs(layer, call, x)

    def compiled_activation(self, activation: Any, x: Tensor) -> Tensor | None:
        compiled = _compiled_layers()
        return None if compiled is None else compiled.activated(activation, x)

    def has_frozen_gradient(self, cls: type) -> bool:
        compiled = _compiled_layers()
        return compiled is not None and getattr(cls, "call", None) in compiled.calls

    def gains_from_freezing(self, layer: Layer) -> bool:
        compiled = _compiled_layers()
        return compiled is not None and compiled.has_known_activation(layer)

    def recomputed(self, function: Callable[..., Any], *args: Any) -> Any:
        if keras.backend.backend() != "jax":
            return function(*args)
        import jax

        return jax.checkpoint(function)(*args)

    def recomputed_call(
        self,
        layer: Layer,
        trained: Sequence[Variable],
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        if self.prefers_plain_gradients() or not _can_have_gradients():
            return call(*args, **kwargs)
        return keras3_recompute.recomputed_call(layer, trained, call, args, kwargs)

    def vjp(self, function: Callable[[Any], Any], x: Tensor, dy: Tensor) -> Any:
        framework = self.framework()
        if framework == "tensorflow":
            from tfimm_lora.backend import tensorflow_vjp

            return tensorflow_vjp.vjp(function, x, dy)
        if framework == "jax":
            import jax

            return jax.vjp(function, x)[1](dy)[0]
        import torch

        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = function(leaf)
            if not y.requires_grad:  # nothing is trained, and y does not depend on x
                return None
            return torch.autograd.grad(y, leaf, dy, allow_unused=True)[0]

    def linear(
        self, function: Callable[[Any], Any], x: Tensor
    ) -> tuple[Any, Callable[..., Any]]:
        if keras.backend.backend() != "torch":
            return super().linear(function, x)
        import torch

        # torch runs eagerly, so ``vjp`` would compute the function a second time.
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = function(leaf)
        return y.detach(), lambda dy: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]

    def refusal(self, layer: Layer) -> str | None:
        if getattr(layer, "quantization_mode", None):
            return (
                f"it is quantized ({layer.quantization_mode}); convert the layer before "
                "quantizing the merged model"
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
        """Return which of the layer's own variables are trainable, by id."""
        return {id(v): v.trainable for v in _own_variables(layer)}

    def restore_flags(self, layer: Layer, flags: Mapping[int, bool]) -> None:
        """Restore the flags that ``variable_flags`` returned."""
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

    def create_table(self, shape: tuple[int, int], name: str) -> Variable:
        return keras.Variable(
            np.zeros(shape, "float32"), trainable=False, name=name, dtype="float32"
        )

    def read_rows(self, table: Variable, rows: Tensor) -> Tensor:
        value = table
        if isinstance(table, keras.Variable):  # that of an exported file is a tf.Variable
            with AutocastScope(None):  # which would cast the whole table
                value = table.value
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            # From the variable itself, which is not copied while it is written to.
            return tf.gather(value, rows)
        return keras.ops.take(value, rows, axis=0)

    def write_rows(self, table: Variable, first: int, values: np.ndarray) -> None:
        framework = keras.backend.backend()
        if framework == "tensorflow":
            from tfimm_lora.backend.tensorflow_functions import write_rows

            write_rows(table.value, first, values)
        elif framework == "torch":
            import torch

            with torch.no_grad():
                rows = table.value[first : first + len(values)]
                rows.copy_(torch.from_numpy(values))
        else:
            table.assign(_jax_write()(table.value, values, first))

    def compiled(
        self, function: Callable[..., Tensor], variables: Sequence[Variable]
    ) -> Callable[..., np.ndarray]:
        framework = keras.backend.backend()
        if framework == "tensorflow":
            from tfimm_lora.backend.tensorflow_functions import compiled_for_any_batch

            return compiled_for_any_batch(function, autograph=False)
        if framework == "torch":
            return _without_gradients(function)
        return _jax_compiled(function, list(variables))

    def store_value(self, value: Any) -> Any:
        """Return a variable or array in the form that ``save_own_variables`` stores."""
        return value

    def is_rebuilt_with_layers(self, layer: Layer) -> bool:
        from keras.src.models.functional import Functional

        exact = (keras.Sequential, keras.Model, Functional)
        return type(layer) in exact or isinstance(layer, keras.layers.Wrapper)

    def is_functional(self, layer: Layer) -> bool:
        from keras.src.models.functional import Functional

        return isinstance(layer, Functional)

    def made_by(self, tensor: Tensor) -> tuple[Layer, list[Tensor]]:
        layer, index, _ = tensor._keras_history
        return layer, list(layer._inbound_nodes[index].input_tensors)

    def variables_in_graph(self, model: Layer) -> list[Variable]:
        if not self.is_functional(model):
            return []
        nodes = [node for operation in model.operations for node in operation._inbound_nodes]
        arguments = keras.tree.flatten([(n.arguments.args, n.arguments.kwargs) for n in nodes])
        return [x for x in arguments if isinstance(x, keras.Variable)]

    @contextlib.contextmanager
    def dtype_policy(self, name: Any) -> Iterator[None]:
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(name or policy)
        try:
            yield
        finally:
            keras.config.set_dtype_policy(policy)

    def input_shapes(self, model: Layer) -> Any:
        """Return the nested shapes of the inputs that a model was built for, or None."""
        shapes = getattr(model, "_build_shapes_dict", None) or {}
        return next(iter(shapes.values())) if len(shapes) == 1 else None


def _can_have_gradients() -> bool:
    """Whether what is computed now may be differentiated; on torch, not within no_grad."""
    if keras.backend.backend() != "torch":
        return True
    import torch

    enabled: bool = torch.is_grad_enabled()
    return enabled


@functools.cache
def _compiled_layers() -> Any:
    """The layers that are compiled; None on JAX, which compiles everything, and on torch, which
    has such operations."""
    if keras.backend.backend() != "tensorflow":
        return None
    from tfimm_lora.backend.compiled_layers import CompiledLayers

    return CompiledLayers(keras)


def _layout_map() -> Any:
    """The ``LayoutMap`` of the active distribution, or None."""
    return getattr(distribution_lib.distribution(), "_layout_map", None)


@functools.cache
def _jax_write() -> Callable[..., Any]:
    """A function that assigns rows of an array in place, by giving up the array."""
    import jax

    def write(table: Any, values: Any, first: Any) -> Any:
        return jax.lax.dynamic_update_slice(table, values, (first, 0))

    compiled: Callable[..., Any] = jax.jit(write, donate_argnums=0)
    return compiled


def _jax_compiled(
    function: Callable[..., Any], variables: list[Variable]
) -> Callable[..., np.ndarray]:
    import jax

    def pure(values: list[Any], *arrays: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values))):
            return function(*arrays)

    compiled = jax.jit(pure)

    def call(*arrays: np.ndarray) -> np.ndarray:
        return np.asarray(compiled([v.value for v in variables], *arrays))

    return call


def _without_gradients(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    import torch

    def call(*arrays: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            outputs = function(*map(keras.ops.convert_to_tensor, arrays))
        result: np.ndarray = keras.ops.convert_to_numpy(outputs)
        return result

    return call


def _with_tangent(function: Callable[..., Any], tangent: Any) -> Any:
    """A function of JAX with this derivative; see ``Backend.custom_gradient``."""
    import jax
    from jax.custom_derivatives import SymbolicZero

    differentiable: Any = jax.custom_jvp(function)

    def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
        y = differentiable(*primals)
        terms = tangent(primals, [None if isinstance(t, SymbolicZero) else t for t in tangents])
        return y, sum(terms[1:], terms[0]) if terms else jax.numpy.zeros_like(y)

    differentiable.defjvp(rule, symbolic_zeros=True)
    return differentiable


@contextlib.contextmanager
def _unlocked(layer: Layer) -> Any:
    """Unlock the state of a built layer, which Keras locks, within this block."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._lock_state()


@contextlib.contextmanager
def _scopes(names: list[str]) -> Any:
    """Open exactly these name scopes, which determine the path of a new variable."""
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
    """Remove an attribute from TensorFlow's tracking, if the layer is a trackable."""
    if hasattr(layer, "_delete_tracking"):
        layer._delete_tracking(attribute)


def _is_tf_composite(x: Tensor) -> bool:
    kind = type(x)
    return kind.__module__.startswith("tensorflow.") and kind.__name__ in (
        "RaggedTensor",
        "SparseTensor",
    )


BACKEND = Keras3Backend()
