"""``RankAllocator``: a callback that distributes rank over the layers (AdaLoRA).

The gradients come from the optimizer; see ``backend/gradient_watch.py``. There are two
alternatives. The step of the optimizer is not the gradient: Adam divides by the gradient's
magnitude, which the importance must measure. Gradients that the callback computes itself need a
second forward and backward pass in each step, and lack the dropout, clipping and loss scale of
the training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfimm_lora.adapters.compact import has_initial_update
from tfimm_lora.backend import backend_of
from tfimm_lora.backend.gradient_watch import state_variable, unwatch_updates, watch_updates
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.utils.text_table import aligned_lines
from tfimm_lora.validation import check_integer, check_number
from tfimm_lora.zoo.weights.module_names import ModuleNames

_classes: dict[int, type] = {}


class RankAllocator:
    """A Keras callback that reduces the rank of the least important layers (AdaLoRA).

    An update of rank r is a sum of r components s A[..., i] B[i, ...]. Training starts with all
    of them. From step ``warmup`` to step ``end`` their number over all layers falls from b(0)
    to the target b(T):

        b(t) = b(T) + (b(0) - b(T)) (1 - (t - warmup) / (end - warmup))^3.

    Every ``interval`` steps the b(t) most important components of the model are kept, and the B
    of the others is set to zero. As in the paper, pruned components are still trained: one that
    becomes important is kept again at the next pruning. The pruning at ``end`` is final: A and
    B of the pruned components are zero and stay zero. ``compact_adapter`` drops them. Pass the
    callback to every later fit with the same optimizer, since its momentum would change them. A
    new optimizer does not change them, since their gradient is zero.

    The importance of an entry w of A or B with the gradient g is its smoothed sensitivity
    I = |w g| times its uncertainty. The importance of a component is the mean over its A plus
    the mean over its B:

        M <- beta1 M + (1 - beta1) I,    U <- beta2 U + (1 - beta2) |I - M|,    M U.

    It is computed in each training step from the gradient that the optimizer applies, which
    costs a few operations on A and B. In fused projections (``lora_qkv``) the components of
    each block are pruned separately. The scale s of a layer does not change.

    Args:
        model: A built LoRA model, unmerged. Fit this model or one that contains it.
        target_rank: The final mean rank of the layers (for fused projections, of their
            blocks), positive and below the present mean rank.
        end: The training step (number of batches) of the last pruning. It is usual to train
            for about as many steps again after it.
        warmup: The number of steps before pruning begins. Default 0.
        interval: The number of steps between prunings. Default 10.
        beta1, beta2: The smoothing factors of M and U, in [0, 1). Default 0.85, as in the
            paper.

    Attributes:
        step: The number of trained steps.
        ranks: Path of a layer -> number of components that it keeps, over all its blocks.

    Raises:
        TypeError: If a number has the wrong type. When training starts, if the optimizer does
            not update one variable at a time.
        ValueError: If the model has no LoRA, is merged or not built, was initialized from its
            kernels (PiSSA, OLoRA), has LoHa, or has a rank that is not above the target; if
            steps are out of order or a beta is out of range. When training starts, if the
            optimizer does not train the layers.

    Warns:
        UserWarning: If training ends before step ``end``.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((6,)), tf.keras.layers.Dense(8, name="one"),
        ...     tf.keras.layers.Dense(3, name="two")])
        >>> _ = lora.inject_lora(model, lora_rank=3, lora_targets=["one", "two"])
        >>> model.compile("adam", "mse")
        >>> allocator = lora.RankAllocator(model, target_rank=1, warmup=4, end=12, interval=2)
        >>> x, y = np.ones((32, 6)), np.ones((32, 3))
        >>> _ = model.fit(x, y, batch_size=2, callbacks=[allocator], verbose=0)
        >>> allocator.step, sum(allocator.ranks.values())
        (16, 2)
        >>> adapter = lora.compact_adapter(model)

    Reference: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
    Fine-Tuning", arXiv:2303.10512, sections 3.2 and 3.3. There an update is P diag(l) Q with a
    penalty that keeps P and Q orthogonal, and l is pruned. Here the update is A B and B is
    pruned, so the result is an ordinary adapter. b falls from b(0) at warmup; the formula in
    the paper first jumps above b(0).
    """

    def __new__(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is not RankAllocator:
            return super().__new__(cls)
        backend = backend_of(model)
        if id(backend) not in _classes:
            bases = (RankAllocator, backend.keras.callbacks.Callback)
            namespace = {"__module__": __name__, "__doc__": cls.__doc__}
            _classes[id(backend)] = type("RankAllocator", bases, namespace)
        return object.__new__(_classes[id(backend)])

    #: Legacy Keras then passes logs as tensors, without waiting for their values.
    _supports_tf_logs = True

    model: Any
    params: Any

    def __init__(
        self,
        model: Any,
        target_rank: float,
        end: int,
        warmup: int = 0,
        interval: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        super().__init__()
        _check_steps(warmup, end, interval)
        check_number(target_rank, "target_rank", 0, exclusive=True)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            check_number(beta, name, 0, below=1)
        self.target_rank = float(target_rank)
        self.warmup, self.end, self.interval = int(warmup), int(end), int(interval)
        self.beta1, self.beta2 = float(beta1), float(beta2)
        self.step = 0
        keys = ModuleNames(model).modules
        self._components = [_Components(p, keys[p], x) for p, x in lora_layers(model).items()]
        self._backend = backend_of(model)
        for x in self._components:
            _require_trainable(x.layer)
            if x.layer.lora.lora_use_loha:
                raise ValueError(
                    f"Layer '{x.path}' has LoHa, whose factors have no components to prune. "
                    "Inject LoRA with lora_use_loha=False."
                )
            if has_initial_update(x.layer):
                raise ValueError(
                    f"Layer '{x.path}' was initialized from its kernel, so pruning a "
                    "component would change its output at initialization. Inject LoRA with "
                    "lora_init='default'."
                )
        self._initial = sum(x.count for x in self._components)
        units = sum(x.blocks for x in self._components)
        self._final = round(self.target_rank * units)
        if not 1 <= self._final < self._initial:
            raise ValueError(
                f"Received target_rank={target_rank!r} for layers whose mean rank is "
                f"{self._initial / units:g}; expected less than this, and enough for at least "
                "one component in the model. Inject LoRA with a higher lora_rank; 1.5 times "
                "the target is usual."
            )
        self._kept: dict[str, np.ndarray] = {
            x.path: np.ones(x.count, bool) for x in self._components
        }
        self._watches = {x.path: x.watches(self) for x in self._components}
        self._begun = 0

    # -- results -----------------------------------------------------------------------

    def budget(self, step: int) -> int:
        """Return the number of components to keep at a step: b(t), rounded up."""
        if step <= self.warmup:
            return self._initial
        if step >= self.end:
            return self._final
        left = 1 - (step - self.warmup) / (self.end - self.warmup)
        return self._final + math.ceil((self._initial - self._final) * left**3 - 1e-9)

    def importance(self) -> dict[str, np.ndarray]:
        """Return the present importance of every component, by the path of its layer."""
        self._sync()
        return {
            x.path: sum((w.importance() for w in self._watches[x.path]), np.zeros(()))
            for x in self._components
        }

    @property
    def ranks(self) -> dict[str, int]:
        """Path of a layer -> number of components that the last pruning kept."""
        return {path: int(kept.sum()) for path, kept in self._kept.items()}

    @property
    def finished(self) -> bool:
        """Whether the final pruning is done."""
        return self.step >= self.end

    def summary(self) -> str:
        """Return a table of the layers: present rank, original rank, blocks if fused."""
        rows = [("layer", "rank", "of", "")]
        for x in self._components:
            counts = self._kept[x.path].reshape(x.blocks, -1).sum(axis=1)
            letters = x.layer.lora.qkv or ""
            fused = ", ".join(f"{x} {n}" for x, n in zip(letters, counts))
            rows.append((x.path, str(counts.sum()), str(x.count), fused))
        total = sum(self.ranks.values())
        rows.append(("total", str(total), str(self._initial), ""))
        lines = aligned_lines(rows, left=[True, False, False, True])
        state = "final" if self.finished else f"final at step {self.end}"
        return "\n".join([*lines, f"step {self.step}, {state}"])

    # -- state -------------------------------------------------------------------------

    def get_state(self) -> dict[str, np.ndarray]:
        """Return the state that a resumed training needs beside the weights, as arrays.

        Save it with ``numpy.savez(file, **allocator.get_state())`` and restore it with
        ``allocator.set_state(numpy.load(file))``.
        """
        self._sync()
        state = {"step": np.array(self.step)}
        for x in self._components:
            state[f"{x.key}/kept"] = self._kept[x.path].copy()
            for watch in self._watches[x.path]:
                for name, value in watch.values().items():
                    state[f"{x.key}/{watch.name}/{name}"] = value
        return state

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore a state from ``get_state``. The schedule is not part of it.

        Raises:
            ValueError: If it has other layers or ranks; the message names all differences.
        """
        own = self.get_state()
        given = {key: np.asarray(state[key]) for key in state}
        problems = [f"missing {key}" for key in own if key not in given]
        problems += [f"unexpected {key}" for key in given if key not in own]
        problems += [
            f"{key} of shape {given[key].shape}, expected {value.shape}"
            for key, value in own.items()
            if key in given and given[key].shape != value.shape
        ]
        if problems:
            listed = "; ".join(problems[:20])
            raise ValueError(
                f"Received a state of other layers or ranks: {listed}. Inject LoRA with the "
                "same arguments as in the saved training."
            )
        self.step = int(given["step"])
        for x in self._components:
            self._kept[x.path] = given[f"{x.key}/kept"].astype(bool)
            for watch in self._watches[x.path]:
                watch.assign({n: given[f"{x.key}/{watch.name}/{n}"] for n in watch.values()})
        self._hold()

    # -- callback methods --------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Watch the optimizer. Keras traces the train function again for each fit."""
        model, backend = self.model, self._backend
        trained = {id(v) for v in model.trainable_weights}
        for x in self._components:
            _require_trainable(x.layer)
            if id(x.layer.kernel_lora_b) not in trained:
                raise ValueError(
                    f"Received model '{model.name}' to train, which does not train layer "
                    f"'{x.path}' of the model of this RankAllocator; expected the same model. "
                    "Create a RankAllocator for this model."
                )
        optimizer = model.optimizer
        rule = getattr(optimizer, "inner_optimizer", optimizer)
        is_optimizer = isinstance(rule, backend.keras.optimizers.Optimizer)
        if not is_optimizer or not backend.has_rule(type(rule)):
            raise TypeError(
                f"Received a model compiled with {type(rule).__name__}; expected an optimizer "
                f"of {backend.keras.__name__} that updates one variable at a time, for example "
                "AdamW."
            )
        self._hold()
        watches = [w for all_of in self._watches.values() for w in all_of]
        watch_updates(backend, model, [w for w in watches if id(w.variable) in trained])

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begun = batch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the steps, and prune if it is due."""
        before = self.step
        # Keras may run several steps at once (steps_per_execution), and fewer than these at
        # the end of an epoch.
        steps = self.params.get("steps") or math.inf
        last = min(batch, max(steps - 1, self._begun))
        self.step += int(last) - self._begun + 1
        self._begun = batch + 1
        if before >= self.end:
            return
        due = before // self.interval < self.step // self.interval
        if self.step >= self.end or (due and self.step > self.warmup):
            self._prune()

    def on_train_end(self, logs: Any = None) -> None:
        self._sync()
        self._hold()  # the optimizer may have assigned averaged weights
        unwatch_updates(self._backend, self.model)
        if not self.finished:
            warnings.warn(
                f"The training ended at step {self.step}, before end={self.end}, so no "
                "component is pruned permanently. Fit again with this callback, or pass a "
                "smaller end.",
                stacklevel=2,
            )

    # -- pruning -----------------------------------------------------------------------

    def _prune(self) -> None:
        """Keep the most important components of the model, and set the others to zero."""
        importance = self.importance()
        flat = np.concatenate([importance[x.path] for x in self._components])
        kept = np.zeros(flat.size, bool)
        # A stable sort, so that the same training always has the same ranks.
        kept[np.argsort(-flat, kind="stable")[: self.budget(self.step)]] = True
        start = 0
        for x in self._components:
            self._kept[x.path] = kept[start : start + x.count]
            start += x.count
        for x in self._components:
            _, b = self._watches[x.path]
            b.zero(self._kept[x.path])
        self._hold()

    def _hold(self) -> None:
        """After the final pruning, set the pruned components to zero and keep them zero."""
        for x in self._components:
            for watch in self._watches[x.path]:
                kept = self._kept[x.path]
                watch.hold(kept if self.finished else np.ones_like(kept))
                if self.finished:
                    watch.zero(kept)

    def _sync(self) -> None:
        """Update the variables. On JAX, Keras does so when ``model`` is accessed."""
        getattr(self, "model", None)


class _Components:
    """The components of one layer."""

    def __init__(self, path: str, key: str, layer: LoRALayer) -> None:
        layer._require_built("allocate rank in")
        self.path, self.layer = path, layer
        #: Its key in a state, which is the same in every process.
        self.key = key
        self.count = int(layer.kernel_lora_a.shape[-1])
        self.blocks = len(layer.lora.qkv) if layer.lora.qkv else 1

    def watches(self, allocator: RankAllocator) -> tuple[_Watch, _Watch]:
        """Create the watches of A and B."""
        a, b = self.layer.kernel_lora_a, self.layer.kernel_lora_b
        return (
            _Watch(allocator, a, len(a.shape) - 1),
            _Watch(allocator, b, self.layer._rank_axis_of_b()),
        )


class _Watch:
    """Computes the importance of the entries of a factor within the training step."""

    def __init__(self, allocator: RankAllocator, variable: Any, axis: int) -> None:
        self._allocator, self.variable, self._axis = allocator, variable, axis
        backend = self._backend = allocator._backend
        self.name = backend.variable_name(variable)
        shape = tuple(variable.shape)
        zeros = np.zeros(shape, "float32")
        self._kept_shape = [n if i == axis else 1 for i, n in enumerate(shape)]
        self._others = tuple(i for i in range(len(shape)) if i != axis)
        ones: np.ndarray = np.ones(self._kept_shape, "float32")
        self._mean = state_variable(backend, zeros, variable)
        self._uncertainty = state_variable(backend, zeros, variable)
        self._mask = state_variable(backend, ones, variable)
        self.state = (self._mean, self._uncertainty, self._mask)

    # Within the training step.

    def before(self, gradient: Any, value: Any) -> None:
        cast, beta1, beta2 = (
            self._backend.ops.cast,
            self._allocator.beta1,
            self._allocator.beta2,
        )
        sensitivity = abs(value * cast(gradient, "float32"))
        mean = beta1 * cast(self._mean, "float32") + (1 - beta1) * sensitivity
        spread = abs(sensitivity - mean)
        uncertainty = beta2 * cast(self._uncertainty, "float32") + (1 - beta2) * spread
        self._mean.assign(mean)
        self._uncertainty.assign(uncertainty)

    def after(self, value: Any) -> Any:
        return value * self._backend.ops.cast(self._mask, "float32")

    # Outside of the training step.

    def importance(self) -> np.ndarray:
        """Return the mean of M U over the entries of each component: (count,), in float64."""
        values: dict[str, np.ndarray] = {
            name: x.astype("float64") for name, x in self.values().items()
        }
        product = values["sensitivity"] * values["uncertainty"]
        return np.asarray(product.mean(axis=self._others))

    def values(self) -> dict[str, np.ndarray]:
        """Return M and U."""
        read = self._backend.to_numpy
        return {"sensitivity": read(self._mean), "uncertainty": read(self._uncertainty)}

    def assign(self, values: Mapping[str, np.ndarray]) -> None:
        self._mean.assign(values["sensitivity"].astype("float32"))
        self._uncertainty.assign(values["uncertainty"].astype("float32"))

    def hold(self, kept: np.ndarray) -> None:
        """Keep the components that are not in ``kept`` at zero from now on."""
        self._mask.assign(kept.reshape(self._kept_shape).astype("float32"))

    def zero(self, kept: np.ndarray) -> None:
        """Set the components that are not in ``kept`` to zero now."""
        value = self._backend.to_numpy(self.variable)
        pruned = np.where(kept.reshape(self._kept_shape), value, np.zeros_like(value))
        if not np.array_equal(pruned, value):
            self.variable.assign(pruned)


def _require_trainable(layer: LoRALayer) -> None:
    if layer.merged:
        raise ValueError(
            f"Layer '{layer.name}' is merged, so its LoRA cannot be trained. Call "
            "unmerge_lora_weights first."
        )
    layer._require_enabled("trained")


def _check_steps(warmup: Any, end: Any, interval: Any) -> None:
    for name, value, least in (
        ("warmup", warmup, 0),
        ("end", end, 1),
        ("interval", interval, 1),
    ):
        check_integer(value, name, least)
    if end <= warmup:
        raise ValueError(
            f"Received warmup={warmup!r} and end={end!r}; expected an end after the warmup."
        )
    if interval > end - warmup:
        raise ValueError(
            f"Received interval={interval!r} with {end - warmup} steps from warmup to end; "
            "expected at most this number."
        )
