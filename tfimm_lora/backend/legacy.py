"""Legacy Keras: the package ``tf_keras``, or ``tf.keras`` before TensorFlow 2.16."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras.src.engine import base_layer_utils
from tf_keras.src.mixed_precision import autocast_variable

from tfimm_lora.backend import legacy_accumulation, legacy_recompute, tensorflow_random
from tfimm_lora.backend.frozen_gradients import COMPILED, frozen_gradient
from tfimm_lora.backend.interface import Backend, Layer, Ops, Tensor, Variable
from tfimm_lora.backend.learning_rates import LegacyVariableRates
from tfimm_lora.backend.legacy_random import drawing_from, from_generator
from tfimm_lora.backend.tensorflow_functions import (
    after,
    compiled_for_any_batch,
    is_recording,
    write_rows,
)
from tfimm_lora.backend.tensorflow_vjp import vjp

_OPS: Any = types.SimpleNamespace(
    matmul=tf.matmul,
    einsum=tf.einsum,
    reshape=tf.reshape,
    transpose=tf.transpose,
    moveaxis=tf.experimental.numpy.moveaxis,
    equal=tf.equal,
    cast=tf.cast,
    shape=tf.shape,
    concatenate=tf.concat,
    sum=tf.reduce_sum,
    sqrt=tf.sqrt,
    where=tf.where,
    take=lambda x, indices, axis: tf.gather(x, indices, axis=axis),
    pad=tf.pad,
    zeros_like=tf.zeros_like,
    arange=tf.range,
    stop_gradient=tf.stop_gradient,
)


class _BuildHook:
    """Call ``_after_build`` at the end of ``build``."""

    def build(self, *args: Any, **kwargs: Any) -> None:
        super().build(*args, **kwargs)  # type: ignore[misc]
        self._after_build()  # type: ignore[attr-defined]


class _FilteredWeights:
    """Classify own variables by ``_is_trained``, independent of the list that holds them.

    The lists ``_trainable_weights`` and ``_non_trainable_weights`` are not changed, because
    weight files depend on their order.
    """

    @property
    def trainable(self) -> bool:
        result: bool = super().trainable  # type: ignore[misc]
        return result

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._note_trainable(value)  # type: ignore[attr-defined]
        super(_FilteredWeights, type(self)).trainable.fset(self, value)  # type: ignore

    def _frozen_ids(self) -> set[int]:
        own = BACKEND.own_variables(self)
        frozen = {id(v) for v in own if not self._is_trained(v)}  # type: ignore[attr-defined]
        # A module lists the variables of the layers inside it whether they are frozen or not.
        for module in _modules(self):
            for layer in _outermost_layers(module, {id(self)}):
                frozen |= {id(v) for v in layer.non_trainable_variables}
        return frozen

    @property
    def trainable_weights(self) -> list[Variable]:
        self._freeze_new_sublayers()  # type: ignore[attr-defined]
        frozen = self._frozen_ids()
        listed = [v for v in super().trainable_weights if id(v) not in frozen]  # type: ignore[misc]
        own = {id(v) for v in self._trainable_weights}  # type: ignore[attr-defined]
        # Own biases last, for the order of variables in HDF5 files; see below.
        return sorted(listed, key=lambda v: id(v) in own and BACKEND.is_bias_like(v))

    @property
    def non_trainable_weights(self) -> list[Variable]:
        listed = super().non_trainable_weights  # type: ignore[misc]
        known = {id(v) for v in listed}
        frozen = self._frozen_ids()
        created = BACKEND.trainable_own_variables(self)
        own = [v for v in created if id(v) in frozen | known]
        # HDF5 files list trainable weights, then the others. With those that may be trained
        # first among the others, the order in the file does not depend on what is trained.
        own.sort(key=lambda v: (not self._is_trained(v), not BACKEND.is_bias_like(v)))  # type: ignore[attr-defined]
        chosen = {id(v) for v in own}
        return own + [v for v in listed if id(v) not in chosen]

    @property
    def weights(self) -> list[Variable]:
        if isinstance(self, tf_keras.Model):
            result: list[Variable] = super().weights  # type: ignore[misc]
            return result
        # Keras lists trainable ones first; the order must not depend on what is trained.
        own = self._trainable_weights + self._non_trainable_weights  # type: ignore[attr-defined]
        inside = self._gather_children_attribute("variables")  # type: ignore[attr-defined]
        result = self._dedup_weights(own + inside)  # type: ignore[attr-defined]
        return result

    def _sync_trainability(self) -> None:
        """Do nothing, since both properties are computed on demand."""

    def _should_use_autograph(self) -> bool:
        # Keras converts classes outside Keras, whose ``call`` may branch on tensors. What LoRA
        # adds does not, and converting it takes a second in each process.
        result: bool = super()._should_use_autograph()  # type: ignore[misc]
        return result and not self._is_made_from_keras()  # type: ignore[attr-defined]


class LegacyBackend(Backend):
    """The backend of legacy Keras."""

    keras = tf_keras
    ops: ClassVar[Ops] = _OPS
    kernel_attributes = {
        "kernel": "kernel",
        "depthwise": "depthwise_kernel",
        "embedding": "embeddings",
    }
    FilteredWeights = _FilteredWeights
    BuildHook = _BuildHook
    VariableRates = LegacyVariableRates

    def framework(self) -> str:
        return "tensorflow"

    def depthwise_convolution(self, layer: Layer, inputs: Tensor, kernel: Tensor) -> Tensor:
        return tf_keras.backend.depthwise_conv2d(
            inputs,
            kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def conv1d_call(self, layer: Layer, inputs: Tensor, base_call: Callable[..., Any]) -> Any:
        """Call a Conv1D. In legacy Keras its call uses ``convolution_op``."""
        return base_call(inputs)

    def conv1d_op(
        self, layer: Layer, inputs: Tensor, kernel: Tensor, base_op: Callable[..., Any]
    ) -> Any:
        """Return the convolution of a Conv1D; causal inputs are already padded."""
        return base_op(inputs, kernel)

    def sublayers(self, layer: Layer) -> list[Layer]:
        inside = layer._flatten_modules(recursive=False, include_self=False)
        return [x for module in inside for x in _outermost_layers(module, {id(layer)})]

    def own_variables(self, layer: Layer) -> list[Variable]:
        listed: list[Variable] = layer._trainable_weights + layer._non_trainable_weights
        inside = _variables_in_modules(layer)
        return layer._dedup_weights(listed + inside) if inside else listed

    def trainable_own_variables(self, layer: Layer) -> list[Variable]:
        listed: list[Variable] = list(layer._trainable_weights)
        inside = [v for v in _variables_in_modules(layer) if v.trainable]
        return layer._dedup_weights(listed + inside) if inside else listed

    def is_called(self) -> bool:
        return bool(base_layer_utils.call_context().in_call)

    def is_called_in_training(self) -> bool:
        return base_layer_utils.call_context().training is True

    def random_states(self, layer: Layer) -> list[Variable]:
        return []  # see ``restartable_random_ops``

    @contextlib.contextmanager
    def restartable_random_ops(
        self, model: Layer, seed: int
    ) -> Iterator[Callable[[int], None]]:
        """Let layers of Keras draw from a generator. Other code may use ``tf.random``."""
        key = seed % 2**63
        generator = tf.random.Generator.from_key_counter(key, (0, 0), "philox")
        # The functions that are traced in the block need its variable as long as they exist.
        model.__dict__["_lora_random_generator"] = generator

        def restart(epoch: int) -> None:
            generator.reset_from_key_counter(key, (0, epoch))
            tensorflow_random.restart((model.train_function, model.test_function), seed)

        with drawing_from(from_generator(generator), [layer for _, layer in self.walk(model)]):
            yield restart

    def accumulate_gradients(self, optimizer: Any, steps: int) -> None:
        legacy_accumulation.accumulate_gradients(optimizer, steps)

    def optimizer_variables(self, optimizer: Any) -> list[Variable]:
        variables = optimizer.variables
        return list(variables() if callable(variables) else variables)

    def is_built_optimizer(self, optimizer: Any) -> bool:
        return bool(getattr(optimizer, "_built", False))

    def to_numpy(self, variable: Variable) -> np.ndarray:
        with autocast_variable.enable_auto_cast_variables(None):
            result: np.ndarray = variable.numpy()
            return result

    def full_precision(self, variable: Variable) -> Tensor:
        with autocast_variable.enable_auto_cast_variables(None):
            return tf.convert_to_tensor(variable)

    def add_weight(
        self, layer: Layer, name: str, shape: tuple[int, ...], beside: Variable, **options: Any
    ) -> None:
        # The kernel's name is ".../fc1/kernel:0". A scope that ends in "/" is absolute, so
        # the full name of the new variable does not depend on the current scope.
        scope = beside.name.rpartition("/")[0]
        with tf.name_scope(f"{scope}/") if scope else contextlib.nullcontext():
            variable = layer.add_weight(
                name=name,
                shape=shape,
                dtype="float32",
                experimental_autocast=False,
                trainable=True,
                **options,
            )
        setattr(layer, name, variable)

    def remove_weight(self, layer: Layer, attribute: str) -> None:
        variable = layer.__dict__[attribute]
        for listed in (layer._trainable_weights, layer._non_trainable_weights):
            listed[:] = [v for v in listed if v is not variable]
        # A regularizer is stored as a function that closes over the variable.
        layer._callable_losses[:] = [
            loss for loss in layer._callable_losses if not _closes_over(loss, variable)
        ]
        delattr(layer, attribute)
        layer._delete_tracking(attribute)

    def add_sublayer(self, layer: Layer, attribute: str, sublayer: Layer) -> None:
        setattr(layer, attribute, sublayer)

    def remove_sublayer(self, layer: Layer, attribute: str) -> None:
        delattr(layer, attribute)

    def is_compiled(self, model: Layer) -> bool:
        return bool(getattr(model, "_is_compiled", False))

    def has_built_optimizer(self, model: Layer) -> bool:
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        if not isinstance(optimizer, tf_keras.optimizers.Optimizer):
            return True  # those of ``keras.optimizers.legacy`` do not say
        return bool(getattr(optimizer, "_built", False))

    def create_metrics(self, model: Any, batch: tuple[Any, Any]) -> None:
        if type(model).train_step is not tf_keras.Model.train_step:
            return  # a step of its own may have other outputs
        x, y = batch
        outputs = model(x, training=False)
        model.compiled_loss.build(outputs)
        model.compiled_metrics.build(outputs, tf.convert_to_tensor(y))

    def mark_compiled(self, model: Layer, compiled: bool) -> None:
        model._is_compiled = compiled

    def custom_gradient(
        self, function: Callable[..., Any], *args: Any, tangent: Any = None
    ) -> Any:
        return tf.custom_gradient(function)(*args)

    def prefers_plain_gradients(self) -> bool:
        return not is_recording() and not self.is_called_in_training()

    def after(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        return after(x) if self.prefers_plain_gradients() else contextlib.nullcontext()

    def recomputed_call(
        self,
        layer: Layer,
        trained: Sequence[Variable],
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        if self.prefers_plain_gradients():
            return call(*args, **kwargs)
        inside = [x for _, x in self.walk(layer)]
        return legacy_recompute.recomputed_call(layer, inside, trained, call, args, kwargs)

    def frozen_gradient(self, layer: Layer, call: Any, x: Tensor) -> Callable[..., Any] | None:
        return frozen_gradient(layer, call, x)

    def compiled_call(self, layer: Layer, call: Any, x: Tensor) -> Tensor | None:
        return COMPILED.outputs(layer, call, x)

    def compiled_activation(self, activation: Any, x: Tensor) -> Tensor | None:
        return COMPILED.activated(activation, x)

    def has_frozen_gradient(self, cls: type) -> bool:
        return getattr(cls, "call", None) in COMPILED.calls

    def gains_from_freezing(self, layer: Layer) -> bool:
        return COMPILED.has_known_activation(layer)

    def vjp(self, function: Callable[[Any], Any], x: Tensor, dy: Tensor) -> Any:
        return vjp(function, x, dy)

    def variable_scope(self, variable: Variable) -> contextlib.AbstractContextManager[Any]:
        strategy = getattr(variable, "distribute_strategy", None)
        return strategy.scope() if strategy is not None else contextlib.nullcontext()

    def is_dense_tensor(self, x: Tensor) -> bool:
        return not isinstance(x, (tf.RaggedTensor, tf.SparseTensor))

    def rank_of(self, x: Tensor) -> int | None:
        result: int | None = x.shape.rank
        return result

    def dtype_of(self, x: Tensor) -> str:
        result: str = x.dtype.base_dtype.name
        return result

    def create_table(self, shape: tuple[int, int], name: str) -> Variable:
        return tf.Variable(tf.zeros(shape), trainable=False, name=name)

    def read_rows(self, table: Variable, rows: Tensor) -> Tensor:
        return tf.gather(table, rows)

    def write_rows(self, table: Variable, first: int, values: np.ndarray) -> None:
        write_rows(table, first, values)

    def compiled(
        self, function: Callable[..., Tensor], variables: Sequence[Variable]
    ) -> Callable[..., np.ndarray]:
        # As in predict of legacy Keras, which converts the calls of layers.
        return compiled_for_any_batch(function, autograph=True)

    def store_value(self, value: Any) -> Any:
        """Return a variable or array in the form that ``save_own_variables`` stores."""
        return value if isinstance(value, np.ndarray) else self.to_numpy(value)

    def is_rebuilt_with_layers(self, layer: Layer) -> bool:
        from tf_keras.src.engine.functional import Functional

        exact = (tf_keras.Sequential, tf_keras.Model, Functional)
        return type(layer) in exact or isinstance(layer, tf_keras.layers.Wrapper)

    def is_functional(self, layer: Layer) -> bool:
        return bool(getattr(layer, "_is_graph_network", False))

    def made_by(self, tensor: Tensor) -> tuple[Layer, list[Tensor]]:
        node = tensor.node
        inputs = node.keras_inputs
        return node.layer, list(inputs)

    def variables_in_graph(self, model: Layer) -> list[Variable]:
        if not self.is_functional(model):
            return []
        nodes = [node for at_depth in model._nodes_by_depth.values() for node in at_depth]
        arguments = tf.nest.flatten([(node.call_args, node.call_kwargs) for node in nodes])
        return [x for x in arguments if isinstance(x, tf.Variable)]

    @contextlib.contextmanager
    def dtype_policy(self, name: Any) -> Iterator[None]:
        policy = tf_keras.mixed_precision.global_policy()
        tf_keras.mixed_precision.set_global_policy(name or policy)
        try:
            yield
        finally:
            tf_keras.mixed_precision.set_global_policy(policy)

    def input_shapes(self, model: Layer) -> Any:
        """Return the nested shapes of the inputs that a model was built for."""
        return model._build_input_shape


def _outermost_layers(module: tf.Module, seen: set[int]) -> list[Layer]:
    """A layer itself; the layers that any other ``tf.Module`` holds. Modules may refer to each
    other; those whose ids were seen are left out."""
    if id(module) in seen:
        return []
    seen.add(id(module))
    if isinstance(module, tf_keras.layers.Layer):
        return [] if isinstance(module, tf_keras.metrics.Metric) else [module]
    inside = module._flatten(recursive=False, predicate=lambda x: isinstance(x, tf.Module))
    return [x for submodule in inside for x in _outermost_layers(submodule, seen)]


def _variables_in_modules(layer: Layer) -> list[Variable]:
    """The variables that Keras trains with a layer, although neither it nor a layer inside it
    created them: those of a ``tf.Module``, and those in a list of a model."""
    found: list[Variable] = []
    if isinstance(layer, tf_keras.Model):
        for tracked in layer._self_tracked_trackables:
            found += getattr(tracked, "_self_extra_variables", ())
    for module in _modules(layer):
        layers = _outermost_layers(module, {id(layer)})
        of_layers = {id(v) for x in layers for v in x.variables}
        found += [v for v in module.variables if id(v) not in of_layers]
    return found


def _modules(layer: Layer) -> list[tf.Module]:
    """The modules directly inside a layer that are no layers."""
    if not getattr(layer, "_self_tracked_trackables", None):
        return []
    inside = layer._flatten_modules(recursive=False, include_self=False)
    return [x for x in inside if not isinstance(x, tf_keras.layers.Layer)]


def _closes_over(function: Any, variable: Variable) -> bool:
    """Whether a variable is an argument of a (possibly nested) partial loss function."""
    arguments = getattr(function, "args", ())
    return any(
        item is variable or (callable(item) and _closes_over(item, variable))
        for item in arguments
    )


BACKEND = LegacyBackend()
