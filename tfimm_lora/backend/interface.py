"""What both sides of the backend share: the interface, and the parts that are alike."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_BIAS_NAMES = ("bias", "beta")

#: Where a model keeps the models that call it.
_USERS = "_lora_users"


class Found(NamedTuple):
    """How a layer was before it was changed: its class and what in it was trainable."""

    cls: type
    trainable: bool
    #: id of a variable -> its own flag, where variables have one.
    flags: dict[int, bool]


#: The models around a layer, the innermost first: their path, and their name with "/".
Models = tuple[tuple[str, str], ...]


class Backend:
    """What the package needs of a Keras, by names that mean the same in both."""

    #: The Keras module itself (``keras.layers``, ``keras.initializers``, ...).
    keras: Any
    #: Array functions on tensors of this Keras.
    ops: Any
    #: Attribute that holds the variable, by the role of the kernel.
    kernel_attributes: dict[str, str]
    #: Mixin for layers some of whose own variables are frozen.
    FilteredWeights: type
    #: Mixin that calls ``_after_build`` once the variables of the base layer exist.
    BuildHook: type
    #: Mixin for optimizers whose learning rate differs by variable; see ``rates``.
    VariableRates: type

    def framework(self) -> str:
        """What computes: "tensorflow", "jax" or "torch"."""
        return "tensorflow"

    def distribution(self) -> Any:
        """The ``keras.distribution`` that is set, or None."""
        return None

    def copies(self, variable: Any) -> int:
        """The number of devices to which a ``keras.distribution`` spread a variable."""
        return 1

    def sublayers(self, layer: Any) -> list[Any]:
        """The layers directly inside a layer, in order of creation, also in containers."""
        inside = layer._flatten_layers(recursive=False, include_self=False)
        return [x for x in inside if not isinstance(x, self.keras.metrics.Metric)]

    def walk(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Yield (path, layer) for the model (path "") and all inside, parents first.

        A path joins the names of the layers from the model's children down with "/". A
        layer whose name says where it is, from a model further up on (as tfimm names what
        it puts into a Sequential: "resnet50/layer1/0/downsample/0"), is taken at its word.
        A layer that is reached twice is yielded once, under the first path. Of two layers
        with one path the second gets "#2" at its end, so paths are unique.
        """
        seen: set[int] = set()
        counts: dict[str, int] = {}

        def join(path: str, name: str) -> str:
            return f"{path}/{name}" if path else name

        def visit(path: str, layer: Any, models: Models) -> Iterator[tuple[str, Any]]:
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

    def own_variables(self, layer: Any) -> list[Any]:
        """The variables that the layer itself created, not those of its sublayers."""
        raise NotImplementedError

    def trainable_own_variables(self, layer: Any) -> list[Any]:
        """Those of ``own_variables`` that were created to be trained."""
        raise NotImplementedError

    def random_states(self, layer: Any) -> list[Any]:
        """The variables that hold the state of a layer's own random generators."""
        raise NotImplementedError

    def restart_random_ops(self, seed: int) -> None:
        """Let random operations without a state of their own begin again from a seed."""
        raise NotImplementedError

    def optimizer_variables(self, optimizer: Any) -> list[Any]:
        """The variables of a built optimizer, also of the one inside a loss scaling."""
        raise NotImplementedError

    def optimizer_rule(self, optimizer: Any) -> type:
        """The class of an optimizer that has its rule for one variable, ``update_step``."""
        return type(optimizer)

    def optimizer_classes(self) -> list[type]:
        """The optimizers of this Keras that have such a rule."""
        found = [getattr(self.keras.optimizers, name) for name in dir(self.keras.optimizers)]
        return [cls for cls in found if isinstance(cls, type) and self.has_rule(cls)]

    def has_rule(self, optimizer_cls: Any) -> bool:
        """Whether a class is an optimizer with a rule, and not one around others."""
        optimizers = self.keras.optimizers
        around = [getattr(self.keras.mixed_precision, "LossScaleOptimizer", None)]
        around.append(getattr(optimizers, "MultiOptimizer", None))
        return (
            issubclass(optimizer_cls, optimizers.Optimizer)
            and optimizer_cls.update_step is not optimizers.Optimizer.update_step
            and not issubclass(optimizer_cls, tuple(cls for cls in around if cls))
        )

    def is_built_optimizer(self, optimizer: Any) -> bool:
        """Whether an optimizer has its variables already."""
        raise NotImplementedError

    def created_like(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """The dtype policy and the strategy under which ``model`` was created."""
        raise NotImplementedError

    def variable_name(self, variable: Any) -> str:
        """The last part of a variable's name, for example "kernel"."""
        return variable.name.rpartition("/")[2].partition(":")[0]

    def is_bias_like(self, variable: Any) -> bool:
        """Whether a variable is a bias by its name: bias, beta, q_bias, ..."""
        name = self.variable_name(variable)
        return name in _BIAS_NAMES or name.endswith("_bias")

    def to_numpy(self, variable: Any) -> Any:
        """The stored value of a variable, in its own dtype, as a NumPy array."""
        raise NotImplementedError

    def full_precision(self, variable: Any) -> Any:
        """The value of a variable as a tensor of its own dtype, never autocast."""
        raise NotImplementedError

    def add_weight(
        self, layer: Any, name: str, shape: tuple[int, ...], beside: Any, **options: Any
    ) -> None:
        """Add a float32 weight, and an attribute of its name, to a layer that may be
        built; ``beside`` is the kernel, whose scope it shares."""
        raise NotImplementedError

    def remove_weight(self, layer: Any, attribute: str) -> None:
        """Undo ``add_weight``: no trace of the variable is left in the layer."""
        raise NotImplementedError

    def swap_class(self, layer: Any, cls: type) -> None:
        """Give a live layer another class of the same family, keeping all its state."""
        layer.__class__ = cls
        # A SavedModel export leaves a bound `call` in the instance; it would win over
        # the new class's.
        layer.__dict__.pop("call", None)

    def found(self, layer: Any) -> Found:
        """The record from which ``restore`` undoes a change of class."""
        return Found(type(layer), bool(layer.trainable), self.variable_flags(layer))

    def restore(self, layer: Any, found: Found) -> None:
        """Give a layer its class and its trainability back."""
        self.swap_class(layer, found.cls)
        self.set_raw_trainable(layer, found.trainable)
        self.restore_flags(layer, found.flags)

    def set_raw_trainable(self, layer: Any, value: bool) -> None:
        """Set ``trainable`` of the layer alone, not of its variables and sublayers."""
        layer._trainable = value

    def variable_flags(self, layer: Any) -> dict[int, bool]:
        """Which of the layer's own variables are trainable, by id."""
        return {}

    def created_flags(self, layer: Any) -> dict[int, bool]:
        """``variable_flags`` as they are when a layer of its class is created."""
        trainable = {id(v) for v in self.trainable_own_variables(layer)}
        return {key: key in trainable for key in self.variable_flags(layer)}

    def restore_flags(self, layer: Any, flags: dict[int, bool]) -> None:
        """Set the flags back to what ``variable_flags`` read."""

    def add_sublayer(self, layer: Any, attribute: str, sublayer: Any) -> None:
        """Track a new sublayer in a layer that may be built."""
        raise NotImplementedError

    def remove_sublayer(self, layer: Any, attribute: str) -> None:
        """Undo ``add_sublayer``."""
        raise NotImplementedError

    def dtype_policy(self, name: str | None) -> contextlib.AbstractContextManager[Any]:
        """A dtype policy for what is created within; None leaves it as it is."""
        raise NotImplementedError

    def is_model(self, layer: Any) -> bool:
        """Whether a layer is a model of this Keras."""
        return isinstance(layer, self.keras.Model)

    def reset_functions(self, model: Any) -> None:
        """Forget what Keras has traced for fit, evaluate and predict, on every model in a
        model, and on those that ``note_user`` told of."""
        around = [m for m in (ref() for ref in model.__dict__.get(_USERS, ())) if m is not None]
        for layer in [*(x for _, x in self.walk(model)), *around]:
            if self.is_model(layer):
                layer.train_function = None
                layer.test_function = None
                layer.predict_function = None

    def note_user(self, model: Any, user: Any) -> None:
        """Tell that a model is called by another, whose traces depend on it."""
        model.__dict__.setdefault(_USERS, []).append(weakref.ref(user))

    def is_compiled(self, model: Any) -> bool:
        """Whether ``compile`` was called on the model."""
        raise NotImplementedError

    def mark_uncompiled(self, model: Any) -> None:
        """Make ``fit`` ask for ``compile``: its optimizer knows other variables."""
        raise NotImplementedError

    def compute_dtype(self, layer: Any) -> str:
        """The type in which a layer computes."""
        return layer.compute_dtype

    def custom_gradient(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call ``function(*args) -> (y, grad)`` where ``grad(dy)`` gives a tuple, one
        entry an argument, None for those that need no gradient."""
        raise NotImplementedError

    def vjp(self, function: Callable[[Any], Any], x: Any, dy: Any) -> Any:
        """The gradient of ``sum(function(x) * dy)`` by ``x``."""
        raise NotImplementedError

    def linear(self, function: Callable[[Any], Any], x: Any) -> tuple[Any, Callable[..., Any]]:
        """``function(x)``, linear in x, and what gives the gradient by x from that by it."""
        return function(x), lambda dy: self.vjp(function, x, dy)

    def frozen_gradient(self, layer: Any, call: Any, x: Any) -> Callable[..., Any] | None:
        """A cheaper gradient by x of a layer that is not trained, with a class's ``call``: a
        function of x and the gradient by the output. None where there is none."""
        return None

    def has_frozen_gradient(self, cls: type) -> bool:
        """Whether ``frozen_gradient`` may know one for layers of a class."""
        return False

    def gains_from_freezing(self, layer: Any) -> bool:
        """Whether a layer without variables has such a gradient."""
        return False

    def narrow_matmul(self, x: Any, matrix: Any, transposed: bool = False) -> Any:
        """x matrix, or x matrix^T, for many rows x and a result of few columns."""
        if self.framework() != "tensorflow":
            return self.ops.matmul(x, self.ops.transpose(matrix) if transposed else matrix)
        import tensorflow as tf

        # As a stack of one: of the two routines that oneDNN has, TensorFlow then takes the
        # one that is a fifth faster for such shapes.
        stacks = (tf.expand_dims(x, 0), tf.expand_dims(matrix, 0))
        return tf.squeeze(tf.matmul(*stacks, transpose_b=transposed), 0)

    def add_bias(self, rows: Any, bias: Any) -> Any:
        """rows + bias, for rows (n, units)."""
        if self.framework() != "tensorflow":
            return rows + bias
        import tensorflow as tf

        return tf.nn.bias_add(rows, bias)

    def refusal(self, layer: Any) -> str | None:
        """Why this Keras' state of the layer rules out LoRA, or None."""
        return None

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

    def variable_scope(self, variable: Any) -> contextlib.AbstractContextManager[Any]:
        """The scope in which variables beside this one must be created."""
        return contextlib.nullcontext()

    def input_shapes(self, model: Any) -> Any:
        """The shapes of the inputs that a model was built for, nested as they are, or
        None where that is unknown."""
        raise NotImplementedError

    def map_shapes(self, function: Callable[[Any], Any], shapes: Any) -> Any:
        """Apply a function to every shape in a structure of shapes."""
        if isinstance(shapes, dict):
            return {key: self.map_shapes(function, value) for key, value in shapes.items()}
        if isinstance(shapes, list) and not _is_shape(shapes):
            return [self.map_shapes(function, value) for value in shapes]
        return function(tuple(shapes))

    def made_by(self, tensor: Any) -> tuple[Any, list[Any]]:
        """The layer that gave a symbolic tensor, and the tensors that it was given."""
        raise NotImplementedError

    def is_rebuilt_with_layers(self, layer: Any) -> bool:
        """Whether the config of a layer holds the configs of all layers inside it."""
        raise NotImplementedError

    def register(self, cls: type, prefix: str, base: type) -> None:
        """Register a class for loading, by the name of the class that it stands for.

        A class of the user's goes by its module too, so that two of one name stay apart.
        One that is defined anew, as in a notebook, takes the place of the old one.
        """
        saving = self.keras.saving
        own = base.__module__.partition(".")[0] in ("keras", "tf_keras")
        name = prefix + (base.__name__ if own else f"[{base.__module__}.{base.__qualname__}]")
        saving.get_custom_objects().pop(f"tfimm_lora>{name}", None)
        saving.register_keras_serializable(package="tfimm_lora", name=name)(cls)

    def default_initializer(self) -> Any:
        """Uniform in +-1/sqrt(fan_in): what torch and PEFT call kaiming_uniform(sqrt 5)."""
        return self.keras.initializers.VarianceScaling(
            scale=1.0 / 3.0, mode="fan_in", distribution="uniform"
        )


def _is_shape(value: Any) -> bool:
    return all(size is None or isinstance(size, int) for size in value)
