"""``RankAllocator``: a callback that gives rank to the layers that need it (AdaLoRA).

Where the gradients come from: see ``backend/gradient_watch.py``. The other two ways were
weighed and left: how far the optimizer moved a weight is no gradient (Adam divides by its
size, which is what the importance is to measure), and gradients of batches handed to the
callback cost a second forward and backward pass for each step and are of other batches,
without the dropout, clipping and loss scale of the training.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfimm_lora.adapters.compact import rank_axis, starts_apart
from tfimm_lora.adapters.module_names import ModuleNames
from tfimm_lora.backend import backend_of
from tfimm_lora.backend.gradient_watch import state_variable, unwatch_updates, watch_updates
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.model.merge import lora_layers

_classes: dict[int, type] = {}


class RankAllocator:
    """A Keras callback that shrinks the rank of the layers that need it least (AdaLoRA).

    An update is a sum of components, s A[..., i] B[i, ...], as many as its rank. Training
    starts with all of them. From step ``warmup`` to step ``end`` their number over all layers
    falls from b(0) to b(T), the target, along

        b(t) = b(T) + (b(0) - b(T)) (1 - (t - warmup) / (end - warmup))^3.

    Every ``interval`` steps the b(t) most important components of the model stay and the B
    of the others is set to zero. As in the paper they are trained on: one that turns out to
    be important comes back at the next choice. The choice at ``end`` is final: A and B of
    what is pruned then are zero and stay so. ``compact_adapter`` drops them. As long as the
    same optimizer trains on, pass the callback to each fit: its momentum would move them. A
    new optimizer leaves them alone, for their gradient is zero.

    The importance of an entry w of A or B with the gradient g is I = |w g|, smoothed, times
    its uncertainty, and that of a component the mean over its A plus the mean over its B:

        M <- beta1 M + (1 - beta1) I,    U <- beta2 U + (1 - beta2) |I - M|,    M U.

    It is computed in each training step, from the gradient that the optimizer applies, at the
    cost of a few operations on A and B. Fused projections (``lora_qkv``) have the components
    of their parts, each pruned by itself. The scale s of a layer stays as it is.

    Args:
        model: A built LoRA model, unmerged. Fit it, or a model around it.
        target_rank: What is left in the end: the mean rank of the layers (of a fused
            projection of each part), positive and below the mean rank that there is.
        end: The training step (a batch) of the last choice. Train on after it: about as
            long again is usual.
        warmup: The step up to which nothing is pruned. Default 0.
        interval: The steps between two choices. Default 10.
        beta1, beta2: How much is kept of M and of U, in [0, 1). Default 0.85, as in the paper.

    Attributes:
        step: How many steps were trained.
        ranks: Path of a layer -> how many of its components stay, of all its parts.

    Raises:
        TypeError: for a number of the wrong type; when training starts, for an optimizer
            without a rule for single variables.
        ValueError: if the model has no LoRA, is merged or not built, starts from its kernel
            (PiSSA, OLoRA), or has a rank not above the target; for steps out of order or a
            beta out of range. When training starts: if the optimizer does not train the layers.

    Warns:
        UserWarning: at the end of a training before step ``end``.

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
    penalty that keeps P and Q orthogonal, and l is pruned; here it is A B as everywhere, the
    file is an ordinary adapter, and B is pruned. b falls from b(0) at warmup; by the letter of
    the paper's schedule it would first jump above.
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

    #: Legacy Keras then hands logs on as they are, without waiting for them.
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
        self.target_rank = _number(target_rank, "target_rank")
        self.warmup, self.end, self.interval = int(warmup), int(end), int(interval)
        self.beta1, self.beta2 = _beta(beta1, "beta1"), _beta(beta2, "beta2")
        self.step = 0
        keys = ModuleNames(model).modules
        self._parts = [_Components(p, keys[p], x) for p, x in lora_layers(model).items()]
        self._backend = backend_of(model)
        for part in self._parts:
            _require_plain(part.layer)
            if starts_apart(part.layer):
                raise ValueError(
                    f"Layer '{part.path}' starts from its kernel, so that to prune a component "
                    "is to change the kernel. Put LoRA in with lora_init='default'."
                )
        self._initial = sum(part.count for part in self._parts)
        units = sum(part.parts for part in self._parts)
        self._final = round(self.target_rank * units)
        if not 1 <= self._final < self._initial:
            raise ValueError(
                f"Received target_rank={target_rank!r} for layers whose mean rank is "
                f"{self._initial / units:g}; expected less than that, and enough for one "
                "component in all. Put LoRA in with a higher lora_rank: 1.5 times the target "
                "is usual."
            )
        self._kept: dict[str, np.ndarray] = {
            part.path: np.ones(part.count, bool) for part in self._parts
        }
        self._watches = {part.path: part.watches(self) for part in self._parts}
        self._begun = 0

    # -- what it decides ---------------------------------------------------------------

    def budget(self, step: int) -> int:
        """How many components stay at a step, over all layers: b(t), rounded up."""
        if step <= self.warmup:
            return self._initial
        if step >= self.end:
            return self._final
        left = 1 - (step - self.warmup) / (self.end - self.warmup)
        return self._final + math.ceil((self._initial - self._final) * left**3 - 1e-9)

    def importance(self) -> dict[str, np.ndarray]:
        """The importance of every component, by the path of its layer, now."""
        self._sync()
        return {
            part.path: sum((w.importance() for w in self._watches[part.path]), np.zeros(()))
            for part in self._parts
        }

    @property
    def ranks(self) -> dict[str, int]:
        """Path of a layer -> how many components stay, by the last choice."""
        return {path: int(kept.sum()) for path, kept in self._kept.items()}

    @property
    def finished(self) -> bool:
        """Whether the last choice was made."""
        return self.step >= self.end

    def summary(self) -> str:
        """A table of the layers: rank now, rank before, and the parts of fused ones."""
        rows = [("layer", "rank", "of", "")]
        for part in self._parts:
            counts = self._kept[part.path].reshape(part.parts, -1).sum(axis=1)
            letters = part.layer.lora.qkv or ""
            fused = ", ".join(f"{x} {n}" for x, n in zip(letters, counts))
            rows.append((part.path, str(counts.sum()), str(part.count), fused))
        total = sum(self.ranks.values())
        rows.append(("total", str(total), str(self._initial), ""))
        wide = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{path:<{wide[0]}}  {rank:>{wide[1]}}  {of:>{wide[2]}}  {fused}".rstrip()
            for path, rank, of, fused in rows
        ]
        state = "final" if self.finished else f"final at step {self.end}"
        return "\n".join([*lines, f"step {self.step}, {state}"])

    # -- state -------------------------------------------------------------------------

    def get_state(self) -> dict[str, np.ndarray]:
        """All that a resumed training needs beside the weights, as arrays by name.

        ``numpy.savez(file, **allocator.get_state())`` keeps it, and
        ``allocator.set_state(numpy.load(file))`` takes it up.
        """
        self._sync()
        state = {"step": np.array(self.step)}
        for part in self._parts:
            state[f"{part.key}/kept"] = self._kept[part.path].copy()
            for watch in self._watches[part.path]:
                for name, value in watch.values().items():
                    state[f"{part.key}/{watch.name}/{name}"] = value
        return state

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what ``get_state`` gave; the schedule is that of this allocator.

        Raises:
            ValueError: if it is of other layers or ranks; all that differs is named.
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
                f"Received a state that is not one of these layers: {listed}. Put LoRA in "
                "with the same arguments as in the training that it is of."
            )
        self.step = int(given["step"])
        for part in self._parts:
            self._kept[part.path] = given[f"{part.key}/kept"].astype(bool)
            for watch in self._watches[part.path]:
                watch.assign({n: given[f"{part.key}/{watch.name}/{n}"] for n in watch.values()})
        self._hold()

    # -- what Keras calls --------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Watch the optimizer. The train function is made anew, once for each fit."""
        model, backend = self.model, self._backend
        trained = {id(v) for v in model.trainable_weights}
        for part in self._parts:
            _require_plain(part.layer)
            if id(part.layer.kernel_lora_b) not in trained:
                raise ValueError(
                    f"Received model '{model.name}' to train, which does not train layer "
                    f"'{part.path}' of the model that the RankAllocator was made for. Make "
                    "one for this model."
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
        """Count the steps, and choose where one is due."""
        before = self.step
        # Keras may run several steps at once (steps_per_execution), at the end of an epoch
        # fewer than it says.
        steps = self.params.get("steps") or math.inf
        last = min(batch, max(steps - 1, self._begun))
        self.step += int(last) - self._begun + 1
        self._begun = batch + 1
        if before >= self.end:
            return
        due = before // self.interval < self.step // self.interval
        if self.step >= self.end or (due and self.step > self.warmup):
            self._choose()

    def on_train_end(self, logs: Any = None) -> None:
        self._sync()
        self._hold()  # averaged weights may have come in their place
        unwatch_updates(self._backend, self.model)
        if not self.finished:
            warnings.warn(
                f"The training ended at step {self.step}, before end={self.end}: nothing is "
                "pruned for good. Fit again with this callback to go on, or pass an earlier "
                "end.",
                stacklevel=2,
            )

    # -- choosing ----------------------------------------------------------------------

    def _choose(self) -> None:
        """Keep the most important components of the model, and zero the others."""
        importance = self.importance()
        flat = np.concatenate([importance[part.path] for part in self._parts])
        kept = np.zeros(flat.size, bool)
        # Of equals the first ones stay, so that the same training gives the same ranks.
        kept[np.argsort(-flat, kind="stable")[: self.budget(self.step)]] = True
        start = 0
        for part in self._parts:
            self._kept[part.path] = kept[start : start + part.count]
            start += part.count
        for part in self._parts:
            _, b = self._watches[part.path]
            b.zero(self._kept[part.path])
        self._hold()

    def _hold(self) -> None:
        """Once the choice is final: zero what it left out, and let it stay so."""
        for part in self._parts:
            for watch in self._watches[part.path]:
                kept = self._kept[part.path]
                watch.hold(kept if self.finished else np.ones_like(kept))
                if self.finished:
                    watch.zero(kept)

    def _sync(self) -> None:
        """On JAX the variables have their values once the model was asked for."""
        getattr(self, "model", None)


class _Components:
    """The components of one layer."""

    def __init__(self, path: str, key: str, layer: LoRALayer) -> None:
        layer._require_built("allocate rank in")
        self.path, self.layer = path, layer
        #: The name in states, which is the same in another process.
        self.key = key
        self.count = int(layer.kernel_lora_a.shape[-1])
        self.parts = len(layer.lora.qkv) if layer.lora.qkv else 1

    def watches(self, allocator: RankAllocator) -> tuple[_Watch, _Watch]:
        """What watches its A and its B."""
        a, b = self.layer.kernel_lora_a, self.layer.kernel_lora_b
        return (
            _Watch(allocator, a, len(a.shape) - 1),
            _Watch(allocator, b, rank_axis(self.layer)),
        )


class _Watch:
    """Computes, within the training step, how important the entries of a factor are."""

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

    # In the training step.

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

    # Outside of it.

    def importance(self) -> np.ndarray:
        """The mean of M U over the entries of each component: (count,), in float64."""
        values: dict[str, np.ndarray] = {
            name: x.astype("float64") for name, x in self.values().items()
        }
        return np.mean(values["sensitivity"] * values["uncertainty"], axis=self._others)

    def values(self) -> dict[str, np.ndarray]:
        """M and U."""
        read = self._backend.to_numpy
        return {"sensitivity": read(self._mean), "uncertainty": read(self._uncertainty)}

    def assign(self, values: Mapping[str, np.ndarray]) -> None:
        self._mean.assign(values["sensitivity"].astype("float32"))
        self._uncertainty.assign(values["uncertainty"].astype("float32"))

    def hold(self, kept: np.ndarray) -> None:
        """Keep the other components at zero from now on."""
        self._mask.assign(kept.reshape(self._kept_shape).astype("float32"))

    def zero(self, kept: np.ndarray) -> None:
        """Set the other components to zero now."""
        value = self._backend.to_numpy(self.variable)
        pruned = np.where(kept.reshape(self._kept_shape), value, np.zeros_like(value))
        if not np.array_equal(pruned, value):
            self.variable.assign(pruned)


def _require_plain(layer: LoRALayer) -> None:
    if layer.merged:
        raise ValueError(
            f"Layer '{layer.name}' is merged, so there is nothing to train in it. Call "
            "unmerge_lora_weights first."
        )
    layer._require_enabled("trained")


def _check_steps(warmup: Any, end: Any, interval: Any) -> None:
    for name, value, least in (
        ("warmup", warmup, 0),
        ("end", end, 1),
        ("interval", interval, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"Received {name}={value!r}; expected a whole number of steps.")
        if int(value) < least:
            raise ValueError(f"Received {name}={value!r}; expected at least {least}.")
    if end <= warmup:
        raise ValueError(
            f"Received warmup={warmup!r} and end={end!r}; expected an end after the warmup."
        )
    if interval > end - warmup:
        raise ValueError(
            f"Received interval={interval!r} with {end - warmup} steps from warmup to end; "
            "expected no more than those."
        )


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Received {name}={value!r}; expected a number.")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"Received {name}={value!r}; expected a positive number.")
    return float(value)


def _beta(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Received {name}={value!r}; expected a number.")
    if not 0 <= float(value) < 1:
        raise ValueError(f"Received {name}={value!r}; expected a number in [0, 1).")
    return float(value)
