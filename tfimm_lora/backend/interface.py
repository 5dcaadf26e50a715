"""``Backend``: what the package needs of a Keras, under names that mean the same in both.

Legacy Keras and Keras 3 implement it (``legacy.py``, ``keras3.py``). What they have in common
is implemented here.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:  # so that importing the package does not import NumPy
    import numpy as np

#: Objects of a Keras or its framework, whose types differ between backends and versions.
Layer: TypeAlias = Any
Variable: TypeAlias = Any
Tensor: TypeAlias = Any

#: For each axis of a variable, the axis of a device mesh over which it is divided, or None.
MeshAxes: TypeAlias = tuple[str | None, ...]

_BIAS_NAMES = ("bias", "beta")

#: The models around a layer, innermost first: their path, and their name with "/".
_Models: TypeAlias = tuple[tuple[str, str], ...]


class OriginalLayer(NamedTuple):
    """The state of a layer before conversion: its class and what was trainable in it."""

    cls: type
    trainable: bool
    #: id of a variable -> its own ``trainable`` flag, where variables have one.
    flags: Mapping[int, bool]


class Ops(Protocol):
    """The array functions that the package uses, with the signatures of ``keras.ops``."""

    matmul: Callable[..., Tensor]
    einsum: Callable[..., Tensor]
    reshape: Callable[..., Tensor]
    transpose: Callable[..., Tensor]
    moveaxis: Callable[..., Tensor]
    concatenate: Callable[..., Tensor]
    equal: Callable[..., Tensor]
    cast: Callable[..., Tensor]
    shape: Callable[..., Any]
    sum: Callable[..., Tensor]
    sqrt: Callable[..., Tensor]
    where: Callable[..., Tensor]
    take: Callable[..., Tensor]
    pad: Callable[..., Tensor]
    zeros_like: Callable[..., Tensor]
    arange: Callable[..., Tensor]
    stop_gradient: Callable[..., Tensor]


class Backend(ABC):
    """A Keras: legacy Keras, or Keras 3 on one of its frameworks."""

    #: The Keras module itself (``keras.layers``, ``keras.initializers``, ...).
    keras: ClassVar[Any]
    #: Array functions on tensors of this Keras.
    ops: ClassVar[Ops]
    #: The attribute in which a layer keeps its kernel variable, by the kind of kernel.
    kernel_attributes: ClassVar[Mapping[str, str]]
    #: Mixin for layers some of whose own variables are frozen (``_is_trained(variable)``).
    FilteredWeights: ClassVar[type]
    #: Mixin that calls ``_after_build`` once the variables of the base layer exist.
    BuildHook: ClassVar[type]
    #: Mixin for optimizers with a learning rate per variable; see ``learning_rates``.
    VariableRates: ClassVar[type]

    # -- the framework below -----------------------------------------------------------

    @abstractmethod
    def framework(self) -> str:
        """What computes: "tensorflow", "jax" or "torch"."""

    def is_tensorflow_on_cpu(self) -> bool:
        """Whether TensorFlow computes, and the CPU is its only kind of device."""
        if self.framework() != "tensorflow":
            return False
        import tensorflow as tf

        return all(device.device_type == "CPU" for device in tf.config.list_logical_devices())

    def distribution(self) -> Any:
        """The active ``keras.distribution``, or None."""
        return None

    def copies(self, variable: Variable) -> int:
        """The number of devices over which a ``keras.distribution`` spread a variable."""
        return 1

    def mesh_axes(self, variable: Variable) -> MeshAxes | None:
        """The axes of the device mesh over which a ``keras.distribution.ModelParallel`` divides
        the axes of a variable; None if it does not, as on legacy Keras."""
        return None

    def place(
        self, name: str, shape: tuple[int, ...], axes: MeshAxes, beside: Variable
    ) -> None:
        """Let a weight that is added next be divided over these axes of a device mesh.

        An axis that cannot be divided equally is not divided. An entry for the weight in the
        layout map of the user has priority, unless it is the one for the kernel, ``beside``.
        """
        raise NotImplementedError

    def runs_eagerly(self) -> bool:
        """Whether operations are computed at once, and not only recorded in a graph."""
        if self.framework() != "tensorflow":
            return self.framework() == "torch"
        import tensorflow as tf

        return bool(tf.executing_eagerly())

    @contextlib.contextmanager
    def eagerly(self) -> Iterator[None]:
        """Within this block functions that TensorFlow compiles run as Python, with values."""
        if self.framework() != "tensorflow":
            yield
            return
        from tensorflow import config

        before = config.functions_run_eagerly()
        config.run_functions_eagerly(True)
        try:
            yield
        finally:
            config.run_functions_eagerly(before)

    @abstractmethod
    def dtype_policy(self, name: Any) -> contextlib.AbstractContextManager[None]:
        """A dtype policy for what is created within the block; None leaves it as it is."""

    @contextlib.contextmanager
    def created_like(self, model: Layer) -> Iterator[None]:
        """The dtype policy and the distribution strategy under which ``model`` was created."""
        with self.dtype_policy(model.dtype_policy), self.variable_scope(model.weights[0]):
            yield

    # -- models and the layers in them -------------------------------------------------

    def is_model(self, layer: Layer) -> bool:
        """Whether a layer is a model of this Keras."""
        return isinstance(layer, self.keras.Model)

    @abstractmethod
    def is_functional(self, layer: Layer) -> bool:
        """Whether a layer is a functional model, which records how its layers are connected."""

    @abstractmethod
    def is_rebuilt_with_layers(self, layer: Layer) -> bool:
        """Whether the config of a layer holds the configs of all layers inside it."""

    def sublayers(self, layer: Layer) -> list[Layer]:
        """The layers directly inside a layer, in order of creation, also in containers."""
        inside = layer._flatten_layers(recursive=False, include_self=False)
        return [x for x in inside if not isinstance(x, self.keras.metrics.Metric)]

    def walk(self, model: Layer) -> Iterator[tuple[str, Layer]]:
        """Yield (path, layer) for the model (path "") and all layers inside, parents first.

        A path joins the names of the layers below the model with "/". A layer whose name
        begins with that of a model around it (tfimm names layers inside a Sequential so:
        "resnet50/layer1/0/downsample/0") has the rest of its name as its path in that model.
        A layer that is reached twice is yielded once, under the first path. The second of
        two layers with the same path gets the suffix "#2", so paths are unique.
        """
        seen: set[int] = set()
        counts: dict[str, int] = {}

        def join(path: str, name: str) -> str:
            return f"{path}/{name}" if path else name

        def visit(path: str, layer: Layer, models: _Models) -> Iterator[tuple[str, Layer]]:
            if id(layer) in seen:
                return
            seen.add(id(layer))
            counts[path] = counts.get(path, 0) + 1
            if counts[path] > 1:
                path = f"{path}#{counts[path]}"
            yield path, layer
            inside = ((path, f"{layer.name}/"), *models) if self.is_model(layer) else models
            for child in self.sublayers(layer):
                named = [(p, n) for p, n in models if child.name.startswith(n)]
                above, prefix = named[0] if named else (path, "")
                yield from visit(join(above, child.name[len(prefix) :]), child, inside)

        yield from visit("", model, ())

    @abstractmethod
    def made_by(self, tensor: Tensor) -> tuple[Layer, list[Tensor]]:
        """The layer whose output a symbolic tensor is, and the inputs of that call."""

    @abstractmethod
    def variables_in_graph(self, model: Layer) -> list[Variable]:
        """The variables that the graph of a functional model itself holds, as the arguments of
        its operations; empty for any other layer."""

    @abstractmethod
    def input_shapes(self, model: Layer) -> Any:
        """The shapes of the inputs that a model was built for, nested as they are, or
        None if that is unknown."""

    def map_shapes(self, function: Callable[[Any], Any], shapes: Any) -> Any:
        """Apply a function to every shape in a nested structure of shapes."""
        if isinstance(shapes, dict):
            return {key: self.map_shapes(function, value) for key, value in shapes.items()}
        if isinstance(shapes, list) and not _is_shape(shapes):
            return [self.map_shapes(function, value) for value in shapes]
        return function(tuple(shapes))

    @abstractmethod
    def is_called(self) -> bool:
        """Whether a layer of this Keras is being called in this thread."""

    @abstractmethod
    def is_called_in_training(self) -> bool:
        """Whether a layer is being called in this thread with ``training=True``."""

    @abstractmethod
    def is_compiled(self, model: Layer) -> bool:
        """Whether ``compile`` was called on the model."""

    @abstractmethod
    def has_built_optimizer(self, model: Layer) -> bool:
        """Whether the optimizer of a compiled model has its variables, as after a step."""

    @abstractmethod
    def create_metrics(self, model: Any, batch: tuple[Any, Any]) -> None:
        """Create the metrics of a compiled model before ``fit``, where ``fit`` would be late.

        On TensorFlow ``fit`` of both Kerases creates them in its first step, which is then
        traced twice: half of the time until it runs.

        Args:
            model: The compiled model, whose optimizer has its variables.
            batch: Inputs and targets, of which only shapes and types matter.
        """

    @abstractmethod
    def mark_compiled(self, model: Layer, compiled: bool) -> None:
        """Record whether ``compile`` was called. ``fit`` asks for it if it was not."""

    def forget_compile_arguments(self, model: Layer) -> None:
        """Leave the arguments of ``compile`` out of the files of a model.

        Keras would not find those that are functions again, and could not load the file.
        """
        if hasattr(model, "_compile_config"):
            del model._compile_config

    @contextlib.contextmanager
    def uncompiled(self, model: Layer) -> Iterator[None]:
        """Within the block no model inside a model is compiled, so that copies are not."""
        inside = [x for _, x in self.walk(model) if self.is_model(x) and self.is_compiled(x)]
        for x in inside:
            self.mark_compiled(x, False)
        try:
            yield
        finally:
            for x in inside:
                self.mark_compiled(x, True)

    def reset_functions(self, model: Layer) -> None:
        """Trace the functions of fit, evaluate and predict again, of a model and of every model
        inside it.

        Each is replaced and not dropped, because a callback may be running within one.
        """
        for _, layer in self.walk(model):
            if self.is_model(layer):
                for name in ("train_function", "test_function", "predict_function"):
                    if getattr(layer, name, None) is not None:
                        setattr(layer, name, None)
                        getattr(layer, f"make_{name}")()

    # -- changing a live layer ---------------------------------------------------------

    @contextlib.contextmanager
    def calls_replaced(
        self, functions: Iterable[tuple[Layer, Callable[..., Any]]]
    ) -> Iterator[None]:
        """Within this block ``function(call, *args, **kwargs)`` computes what a layer returns.

        ``call`` is that of the layer. Functions that were traced before do not change.

        Args:
            functions: Pairs of a layer and its function.
        """
        before = []
        try:
            for layer, function in functions:
                own = layer.__dict__.get("call")
                replaced = functools.partial(function, layer.call)
                before.append((layer, own))
                # In the instance, which Keras calls, and where nothing is tracked.
                layer.__dict__["call"] = functools.update_wrapper(replaced, layer.call)
            yield
        finally:
            for layer, own in reversed(before):
                layer.__dict__.pop("call")
                if own is not None:
                    layer.__dict__["call"] = own

    def swap_class(self, layer: Layer, cls: type) -> None:
        """Give a live layer another class of the same family, keeping all its state."""
        layer.__class__ = cls
        # A SavedModel export leaves a bound `call` in the instance, which would take
        # precedence over that of the new class.
        layer.__dict__.pop("call", None)

    def original(self, layer: Layer) -> OriginalLayer:
        """The record from which ``restore`` undoes a conversion."""
        return OriginalLayer(type(layer), bool(layer.trainable), self.variable_flags(layer))

    def restore(self, layer: Layer, original: OriginalLayer) -> None:
        """Give a layer its original class and trainability back."""
        self.swap_class(layer, original.cls)
        self.set_raw_trainable(layer, original.trainable)
        # Variables that were created since have the flags of a new layer.
        created = self.created_flags(layer).items()
        flags = {key: value and original.trainable for key, value in created}
        self.restore_flags(layer, {**flags, **original.flags})

    def set_raw_trainable(self, layer: Layer, value: bool) -> None:
        """Set ``trainable`` of the layer alone, not of its variables and sublayers."""
        layer._trainable = value

    def raw_trainable(self, layer: Layer) -> bool:
        """What ``set_raw_trainable`` set."""
        return bool(layer._trainable)

    def variable_flags(self, layer: Layer) -> dict[int, bool]:
        """Which of the layer's own variables are trainable, by id, if they record it."""
        return {}

    def created_flags(self, layer: Layer) -> dict[int, bool]:
        """``variable_flags`` of a newly created layer of the same class."""
        trainable = {id(v) for v in self.trainable_own_variables(layer)}
        return {key: key in trainable for key in self.variable_flags(layer)}

    def restore_flags(self, layer: Layer, flags: Mapping[int, bool]) -> None:  # noqa: B027
        """Set the flags to what ``variable_flags`` returned earlier, if variables have them."""

    @abstractmethod
    def add_weight(
        self, layer: Layer, name: str, shape: tuple[int, ...], beside: Variable, **options: Any
    ) -> None:
        """Add a float32 weight, and an attribute of the same name, to a layer that may be
        built. ``beside`` is the kernel, whose name scope the weight shares."""

    @abstractmethod
    def remove_weight(self, layer: Layer, attribute: str) -> None:
        """Undo ``add_weight``: no trace of the variable is left in the layer."""

    @abstractmethod
    def add_sublayer(self, layer: Layer, attribute: str, sublayer: Layer) -> None:
        """Track a new sublayer in a layer that may be built."""

    @abstractmethod
    def remove_sublayer(self, layer: Layer, attribute: str) -> None:
        """Undo ``add_sublayer``."""

    def leaves_kernel_alone(self, layer: Layer) -> bool:
        """Whether a layer that shares the kernel of another uses it in training only, and so
        never in a LoRA model: Keras' spectral normalization."""
        cls = getattr(self.keras.layers, "SpectralNormalization", None)
        return cls is not None and isinstance(layer, cls)

    def refusal(self, layer: Layer) -> str | None:
        """Why the state of a layer in this Keras rules out LoRA, or None."""
        return None

    def is_keras_class(self, cls: type) -> bool:
        """Whether a class is defined by Keras, and not by its users."""
        return cls.__module__.partition(".")[0] in ("keras", "tf_keras")

    def register(self, cls: type, prefix: str, base: type) -> None:
        """Register a class for loading, under the name of the class that it stands for.

        The name of a user's class includes its module, so that two of one name stay apart.
        A class that is defined again, as in a notebook, replaces the old one.
        """
        saving = self.keras.saving
        own = self.is_keras_class(base)
        name = prefix + (base.__name__ if own else f"[{base.__module__}.{base.__qualname__}]")
        saving.get_custom_objects().pop(f"tfimm_lora>{name}", None)
        saving.register_keras_serializable(package="tfimm_lora", name=name)(cls)

    # -- variables ---------------------------------------------------------------------

    @abstractmethod
    def own_variables(self, layer: Layer) -> list[Variable]:
        """The variables that Keras collects from the layer but not from its sublayers."""

    @abstractmethod
    def trainable_own_variables(self, layer: Layer) -> list[Variable]:
        """Those of ``own_variables`` that were created to be trained."""

    def variable_name(self, variable: Variable) -> str:
        """The last part of a variable's name, for example "kernel"."""
        name: str = variable.name
        return name.rpartition("/")[2].partition(":")[0]

    def statistics(self, layer: Layer) -> list[Variable]:
        """Those of ``own_variables`` that are not trained and may yet change in training."""
        trained = {id(v) for v in self.trainable_own_variables(layer)}
        others = [v for v in self.own_variables(layer) if id(v) not in trained]
        return [v for v in others if "float" in self.dtype_of(v)]

    def has_hidden_statistics(self, layer: Layer) -> bool:
        """Whether a layer has statistics that are not variables of Keras."""
        return False

    def is_bias_like(self, variable: Variable) -> bool:
        """Whether a variable is a bias by its name: bias, beta, q_bias, ..."""
        name = self.variable_name(variable)
        return name in _BIAS_NAMES or name.endswith("_bias")

    @abstractmethod
    def to_numpy(self, variable: Variable) -> np.ndarray:
        """The stored value of a variable, in its own dtype, as a NumPy array."""

    @abstractmethod
    def full_precision(self, variable: Variable) -> Tensor:
        """The value of a variable as a tensor of its own dtype, never autocast."""

    @abstractmethod
    def create_table(self, shape: tuple[int, int], name: str) -> Variable:
        """A float32 variable of zeros whose rows are read and written one by one."""

    @abstractmethod
    def read_rows(self, table: Variable, rows: Tensor) -> Tensor:
        """The rows of a table with these numbers, which may have any shape, as a tensor."""

    @abstractmethod
    def write_rows(self, table: Variable, first: int, values: np.ndarray) -> None:
        """Assign values to consecutive rows of a table, in place."""

    @abstractmethod
    def compiled(
        self, function: Callable[..., Tensor], variables: Sequence[Variable]
    ) -> Callable[..., np.ndarray]:
        """A compiled function of arrays whose first axis is the batch, for inference.

        It reads the current values of the variables whenever it is called.

        Args:
            function: A function of tensors that returns a tensor.
            variables: The variables that it reads.
        """

    def compiles_each_batch_size(self) -> bool:
        """Whether ``compiled`` functions are compiled again for another batch size."""
        return self.framework() == "jax"

    @abstractmethod
    def store_value(self, value: Any) -> Any:
        """A variable or array as ``save_own_variables`` puts it into a store."""

    @abstractmethod
    def variable_scope(self, variable: Variable) -> contextlib.AbstractContextManager[Any]:
        """The scope of the distribution strategy in which a variable was created."""

    @abstractmethod
    def accumulate_gradients(self, optimizer: Any, steps: int) -> None:
        """Let an optimizer that is not built update the variables after every so many steps,
        with the mean of their gradients.

        Raises:
            ValueError: if the optimizer is built, or accumulates gradients already.
        """

    @abstractmethod
    def random_states(self, layer: Layer) -> list[Variable]:
        """The variables that hold the state of a layer's own random generators."""

    @contextlib.contextmanager
    def restartable_random_ops(
        self, model: Layer, seed: int
    ) -> Iterator[Callable[[int], None]]:
        """Within this block the random operations of a model can be restarted.

        Yields:
            ``restart(epoch)``. Afterwards operations that have no state among the
            ``random_states`` draw numbers that depend only on the seed and the epoch.
        """
        yield lambda epoch: None

    def default_initializer(self) -> Any:
        """Uniform in +-1/sqrt(fan_in): what torch and PEFT call kaiming_uniform(sqrt 5)."""
        return self.keras.initializers.VarianceScaling(
            scale=1.0 / 3.0, mode="fan_in", distribution="uniform"
        )

    # -- optimizers --------------------------------------------------------------------

    @abstractmethod
    def optimizer_variables(self, optimizer: Any) -> list[Variable]:
        """The variables of a built optimizer, also of the one inside a loss scaling."""

    @abstractmethod
    def is_built_optimizer(self, optimizer: Any) -> bool:
        """Whether an optimizer has created its variables."""

    def optimizer_rule(self, optimizer: Any) -> type:
        """The class of an optimizer that defines the update rule, ``update_step``."""
        return type(optimizer)

    def optimizer_classes(self) -> list[type]:
        """The optimizers of this Keras that define such a rule."""
        found = [getattr(self.keras.optimizers, name) for name in dir(self.keras.optimizers)]
        return [cls for cls in found if isinstance(cls, type) and self.has_rule(cls)]

    def has_rule(self, optimizer_cls: Any) -> bool:
        """Whether a class is an optimizer with a rule, and not a wrapper of others."""
        optimizers = self.keras.optimizers
        wrappers = [getattr(self.keras.mixed_precision, "LossScaleOptimizer", None)]
        wrappers.append(getattr(optimizers, "MultiOptimizer", None))
        return (
            issubclass(optimizer_cls, optimizers.Optimizer)
            and optimizer_cls.update_step is not optimizers.Optimizer.update_step
            and not issubclass(optimizer_cls, tuple(cls for cls in wrappers if cls))
        )

    # -- tensors -----------------------------------------------------------------------

    def compute_dtype(self, layer: Layer) -> str:
        """The dtype in which a layer computes."""
        dtype: str = layer.compute_dtype
        return dtype

    @abstractmethod
    def dtype_of(self, x: Tensor) -> str:
        """The name of a tensor's or variable's dtype."""

    @abstractmethod
    def rank_of(self, x: Tensor) -> int | None:
        """The number of axes of a tensor, or None if that is unknown."""

    @abstractmethod
    def is_dense_tensor(self, x: Tensor) -> bool:
        """Whether a tensor is neither ragged nor sparse."""

    def narrow_matmul(self, x: Tensor, matrix: Tensor, transposed: bool = False) -> Tensor:
        """x @ matrix, or x @ matrix^T, for many rows x and a result of few columns."""
        if self.framework() != "tensorflow":
            return self.ops.matmul(x, self.ops.transpose(matrix) if transposed else matrix)
        import tensorflow as tf

        # Of the two routines of oneDNN, that for batches is a fifth faster for such shapes.
        return tf.raw_ops.BatchMatMulV2(x=x, y=matrix, adj_y=transposed)

    def factor_matmul(self, x: Tensor, factor: Tensor) -> Tensor:
        """x @ factor, for many rows x and a factor A or B, one axis of which is the rank.

        On TensorFlow its gradients are computed by the routines that are fastest for the
        shapes of factors; JAX and torch choose by themselves.
        """
        if self.framework() != "tensorflow":
            return self.ops.matmul(x, factor)

        def forward(x: Tensor, factor: Tensor) -> Any:
            to_rank = factor.shape[1] < factor.shape[0]
            y = self.narrow_matmul(x, factor) if to_rank else self.ops.matmul(x, factor)

            def grad(dy: Tensor) -> tuple[Tensor, Tensor]:
                if to_rank:
                    dx = self.ops.matmul(dy, self.ops.transpose(factor))
                else:
                    dx = self.narrow_matmul(dy, factor, transposed=True)
                return dx, self.factor_gradient(x, dy, factor)

            return y, grad

        return self.custom_gradient(forward, x, factor)

    def factor_gradient(self, x: Tensor, dy: Tensor, factor: Tensor) -> Tensor:
        """The gradient of a factor from that of x @ factor: x^T dy."""
        matmul, transpose = self.ops.matmul, self.ops.transpose
        # The factor knows its sizes; those of x may be unknown, as in batches of a generator.
        if factor.shape[-1] < factor.shape[-2]:
            # The same numbers with the long axis last: up to three times as fast.
            return transpose(matmul(transpose(dy), x))
        return matmul(transpose(x), dy)

    def add_bias(self, rows: Tensor, bias: Tensor) -> Tensor:
        """rows + bias, for rows (n, units)."""
        if self.framework() != "tensorflow":
            return rows + bias
        import tensorflow as tf

        return tf.nn.bias_add(rows, bias)

    @abstractmethod
    def depthwise_convolution(self, layer: Layer, inputs: Tensor, kernel: Tensor) -> Tensor:
        """The convolution of a DepthwiseConv2D layer with another kernel."""

    @abstractmethod
    def conv1d_call(
        self, layer: Layer, inputs: Tensor, base_call: Callable[..., Any]
    ) -> Tensor:
        """Call a Conv1D so that it goes through ``convolution_op``."""

    @abstractmethod
    def conv1d_op(
        self, layer: Layer, inputs: Tensor, kernel: Tensor, base_op: Callable[..., Any]
    ) -> Tensor:
        """The convolution of a Conv1D, whose inputs are already padded if it is causal."""

    # -- gradients ---------------------------------------------------------------------

    @abstractmethod
    def custom_gradient(
        self,
        function: Callable[..., Any],
        *args: Tensor,
        tangent: Callable[[Any, Any], list[Tensor]] | None = None,
    ) -> Any:
        """Call ``function(*args) -> (y, grad)``. ``grad(dy)`` returns a tuple with the
        gradient of each argument, None for those that need no gradient.

        JAX has forward-mode derivatives only with ``tangent(args, tangents)``, which returns
        the terms of that of y, linear in those of the arguments (None for zero). It takes the
        gradient from it, too.
        """

    def prefers_plain_gradients(self) -> bool:
        """Whether to leave gradients to the framework, as where nothing is differentiated, or
        derivatives are computed for which ``custom_gradient`` does not do."""
        return False

    def after(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Compute what is recorded within the block no earlier than ``x``, in inference.

        TensorFlow runs a graph in the order in which operations become ready. What depends on
        no input, as W + s A B, it computes first, and holds it for all layers at once.
        """
        return contextlib.nullcontext()

    def recomputed(self, function: Callable[..., Any], *args: Tensor) -> Any:
        """``function(*args)``, computed again in the backward pass instead of kept."""
        return function(*args)

    @abstractmethod
    def recomputed_call(
        self,
        layer: Layer,
        trained: Sequence[Variable],
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """``call(*args, **kwargs)`` of a layer. The backward pass computes it again, with the
        same random numbers, from the tensors in the arguments, instead of keeping what it
        computed. ``trained`` are the variables that may have a gradient."""

    @abstractmethod
    def vjp(self, function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
        """The gradient of ``sum(function(x) * dy)`` with respect to ``x``, which may be None
        instead of zeros."""

    def linear(
        self, function: Callable[[Tensor], Tensor], x: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """``function(x)``, linear in x, and the function from the output's gradient to x's."""
        return function(x), lambda dy: self.vjp(function, x, dy)

    def frozen_gradient(
        self, layer: Layer, call: Any, x: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor] | None:
        """A cheaper gradient for a frozen layer whose class has this ``call``: a function of x
        and the output's gradient. None if there is none."""
        return None

    def compiled_call(self, layer: Layer, call: Any, x: Tensor) -> Tensor | None:
        """The output for x of a frozen layer whose class has this ``call``, computed and
        differentiated as one compiled operation. None if that does not save time."""
        return None

    def compiled_activation(self, activation: Any, x: Tensor) -> Tensor | None:
        """The activation of x, computed and differentiated as one compiled operation. None if
        that does not save time."""
        return None

    def has_frozen_gradient(self, cls: type) -> bool:
        """Whether ``frozen_gradient`` or ``compiled_call`` may exist for layers of a class."""
        return False

    def gains_from_freezing(self, layer: Layer) -> bool:
        """Whether a layer without variables has such a gradient."""
        return False


def _is_shape(value: Any) -> bool:
    return all(size is None or isinstance(size, int) for size in value)
