"""``AdapterBank``: many adapters in one model, one for each example of a batch."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.base_architecture import warn_if_other_checkpoint
from tfimm_lora.adapters.incomplete import warn_if_incomplete
from tfimm_lora.adapters.model_names import in_names_of
from tfimm_lora.backend import backend_of
from tfimm_lora.bank.functions import BankFunctions, batch_plan
from tfimm_lora.bank.layers import inject_bank
from tfimm_lora.bank.layout import PAGE, Layout
from tfimm_lora.bank.overflow import Overflow
from tfimm_lora.bank.prediction import Predictions, RowPrediction
from tfimm_lora.bank.routed import model_with_slots
from tfimm_lora.bank.values import AdapterValues, ValuesOfAdapters
from tfimm_lora.config import Targets
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.model.inject import remove_lora
from tfimm_lora.model.merge import has_lora
from tfimm_lora.model.state import recorded_class_names
from tfimm_lora.validation import check_integer
from tfimm_lora.zoo.weights.module_names import ModuleNames

#: The slot of the model without adapter.
_NO_ADAPTER = 0


class BankEntry(NamedTuple):
    """What a bank knows of an adapter besides its values."""

    classes: int
    labels: tuple[str, ...] | None
    #: Which of ``source.OPTIONAL`` it has.
    optional: frozenset[str]
    #: The paths of the layers that it changes.
    changed: frozenset[str]


class BankContent(NamedTuple):
    """The content of a bank, for exporting it."""

    model: Any
    layout: Layout
    #: The model without adapter (None), then the adapters.
    entries: dict[str | None, BankEntry]
    #: "softmax" or "sigmoid" if the model ends in one.
    activation: str | None


class AdapterBank:
    """Many adapters in one model: each example of a batch uses its own.

    The values of the adapters, with their classifiers, are in slots of one variable, padded to
    the largest rank and number of classes. Each example gathers those of its slot, so the time
    of a batch does not depend on the number of adapters:

        y_i = g_i (x_i W) + (x_i A_i) B_i + c_i

    Adapters are loaded and removed without a new trace. If there are more adapters than slots,
    those that were not used for the longest time are moved to host memory, and back when they
    are used. A bank may be used from several threads: one batch or change runs at a time.

    An adapter may have other layers, ranks, scales and classes than the others: factors of
    every kind of layer that can be merged (except standardised convolutions), query, key or
    value parts of fused projections, DoRA, biases of adapted layers and of their branches, and
    classifiers. What a bank cannot hold is refused by name when it is loaded.

    Args:
        model: A built model without LoRA. While the bank is open it has LoRA of rank 1 without
            effect, and its own weights are frozen. Called outside of the bank it computes as
            before. Do not change its weights or its LoRA: the bank keeps values that it
            computed from them.
        adapters: Name -> adapter, to load at once. Without ``targets``, ``max_rank`` and
            ``max_classes``, the bank is made for these adapters.
        capacity: The number of slots. A batch can use so many different adapters at once;
            larger batches are divided.
        max_rank: The largest rank of an adapter. Default: that of ``adapters``, otherwise 16.
            Adapters of a fused projection whose q, k or v were adapted apart have the sum of
            their ranks.
        max_classes: The largest number of classes. Default: that of the model and ``adapters``.
        targets: The layers that adapters can have factors for, as in ``lora_targets``.
            Default: those of ``adapters``, otherwise the default targets of the model.
        overflow: A folder for adapters that are moved out of their slots. Default: they are
            kept in host memory.

    Raises:
        TypeError, ValueError: If the model is not built, has LoRA, or a target cannot be in a
            bank; or as ``load``. The model is unchanged.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> def make():
        ...     return tf.keras.Sequential([
        ...         tf.keras.Input((4,)), tf.keras.layers.Dense(8, name="fc1"),
        ...         tf.keras.layers.Dense(3, name="head")])
        >>> adapter = lora.adapter_of(lora.inject_lora(make(), lora_rank=2))
        >>> bank = lora.AdapterBank(make(), {"cats": adapter})
        >>> bank.load("dogs", adapter, labels=["pug", "boxer", "collie"])
        >>> bank.names
        ('cats', 'dogs')
        >>> rows = bank.predict(np.ones((3, 4), "float32"), ["cats", None, "dogs"])
        >>> [row.logits.shape for row in rows]
        [(3,), (3,), (3,)]
        >>> rows[2].label in ("pug", "boxer", "collie")
        True

    Reference: Sheng et al., "S-LoRA", arXiv:2311.03285, for language models.
    """

    def __init__(
        self,
        model: Any,
        adapters: Mapping[str, Adapter | str | os.PathLike[str]] | None = None,
        *,
        capacity: int = 64,
        max_rank: int | None = None,
        max_classes: int | None = None,
        targets: Targets = None,
        overflow: str | os.PathLike[str] | None = None,
    ) -> None:
        check_integer(capacity, "capacity", least=1)
        for name, given in (("max_rank", max_rank), ("max_classes", max_classes)):
            if given is not None:
                check_integer(given, name, least=1)
        if adapters is not None and not isinstance(adapters, Mapping):
            raise TypeError(
                f"Received adapters of type {type(adapters).__name__}; expected a dictionary "
                "of names and adapters."
            )
        names = ModuleNames(model)
        read = {_checked_name(n): _read(names, x) for n, x in (adapters or {}).items()}
        self._model = model
        self._backend = backend_of(model)
        self._lock = threading.RLock()
        #: While the values of an adapter are computed from the layers of the model, beside
        #: predictions, the bank is not closed.
        self._loading = threading.RLock()
        self._overflow = Overflow(overflow)
        self._layers = inject_bank(model, read.values(), targets)
        try:
            self._names = ModuleNames(model)
            least = self._layers.most_classes(())
            if max_classes is not None and max_classes < least:
                raise ValueError(
                    f"Received max_classes={max_classes} for model '{model.name}', which has "
                    f"{least} classes; expected as many at least."
                )
            self._layout = Layout.of(
                self._layers,
                max_rank or self._layers.largest_rank(read.values()) or 16,
                max_classes or self._layers.most_classes(read.values()),
            )
            self._values = ValuesOfAdapters(self._names, self._layout, self._layers.refused)
            # One slot for the model without adapter, and one for the probe.
            shape = ((capacity + 2) * self._layout.pages, PAGE)
            self._table = self._backend.create_table(shape, "adapter_bank")
            self._write_slot(_NO_ADAPTER, self._layout.pack(self._values.base.parts))
            self._write_slot(capacity + 1, self._layout.pack(self._layout.random_values()))
            self._entries: dict[str | None, BankEntry] = {
                None: BankEntry(
                    self._values.base.classes,
                    recorded_class_names(model),
                    frozenset(),
                    frozenset(),
                )
            }
            #: The adapters in slots, the least recently used first.
            self._slots: OrderedDict[str, int] = OrderedDict()
            self._free = list(range(capacity, _NO_ADAPTER, -1))
            self._functions = BankFunctions(
                model,
                self._layout,
                self._table,
                capacity + 1,
                self._lock,
                self._require_open,
                lambda: self._require_called(dict(self._entries)),
            )
            self._predictions = Predictions(model, self._layout)
            self._routed: Any = None
            for name, adapter in read.items():
                self._add(name, adapter, None)
        except BaseException:
            self.close()
            raise

    # -- adapters ----------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were loaded."""
        with self._lock:
            return tuple(name for name in self._entries if name is not None)

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return len(self._slots) + len(self._free)

    def labels(self, name: str | None) -> tuple[str, ...] | None:
        """Return the names of the classes of an adapter, or None if they are not known.

        Args:
            name: The name of an adapter; None for the model without adapter.

        Raises:
            ValueError: If there is no adapter of this name.
        """
        return self._entry(name).labels

    def load(
        self,
        name: str,
        adapter: Adapter | str | os.PathLike[str],
        *,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Load an adapter, or replace the one of this name.

        Args:
            name: Its name.
            adapter: An ``Adapter``, a folder or "hf://user/repo". It may have the names of
                another library, as in ``load_adapter``.
            labels: The names of its classes.

        Raises:
            TypeError: If the name is not a string.
            FileNotFoundError, ImportError: As ``Adapter.load``.
            ValueError: If the adapter does not fit the model or the bank (the message names
                everything that does not), or has another number of classes than labels. The
                bank is unchanged.

        Warns:
            UserWarning: If the adapter is incomplete, or names another checkpoint on the hub
                than the model was loaded from, as in ``load_adapter``.
        """
        self._add(_checked_name(name), _read(self._names, adapter), labels)

    def _add(self, name: str, adapter: Adapter, labels: Sequence[str] | None) -> None:
        _require_classification(name, adapter)
        with self._loading:
            self._require_open()
            try:
                values = self._values.of(adapter)
            except ValueError as error:
                raise ValueError(f"Adapter {name!r}: {error}") from error
            entry = _entry_of(name, values, labels)
            packed = self._layout.pack(values.parts)
        warn_if_incomplete(self._names, adapter, stacklevel=3)
        warn_if_other_checkpoint(self._names.model, adapter, stacklevel=3)
        with self._lock:
            self._require_open()
            self._require_called({name: entry})
            self._write(name, packed)
            self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Remove an adapter.

        Args:
            name: Its name.

        Raises:
            ValueError: If there is no adapter of this name.
        """
        with self._lock:
            self._entry(_checked_name(name))
            if name in self._slots:
                self._free.append(self._slots.pop(name))
            self._overflow.drop(name)
            del self._entries[name]

    def _entry(self, name: str | None) -> BankEntry:
        self._require_open()
        entry = self._entries.get(name)
        if entry is None:
            raise ValueError(
                f"Received the adapter {name!r}, which is not in the bank; expected None or "
                f"one of {list(self.names)}."
            )
        return entry

    # -- slots -------------------------------------------------------------------------

    def _write(self, name: str, packed: np.ndarray) -> None:
        """Write an adapter into its slot, or into a free one. After an error nothing has
        changed."""
        slot = self._slots.get(name)
        if slot is None:
            self._free_a_slot()
            slot = self._free[-1]
        self._write_slot(slot, packed)
        if name not in self._slots:
            self._slots[name] = self._free.pop()
        self._slots.move_to_end(name)
        self._overflow.drop(name)

    def _free_a_slot(self) -> None:
        """Unless a slot is free, move the least recently used adapter out of its slot."""
        if self._free:
            return
        oldest, slot = next(iter(self._slots.items()))
        self._overflow.put(oldest, self._read_slot(slot))
        self._free.append(self._slots.pop(oldest))

    def _write_slot(self, slot: int, packed: np.ndarray) -> None:
        self._backend.write_rows(self._table, slot * self._layout.pages, packed)

    def _read_slot(self, slot: int) -> np.ndarray:
        pages = self._layout.pages
        rows = np.arange(slot * pages, (slot + 1) * pages, dtype="int32")
        return self._backend.to_numpy(self._backend.read_rows(self._table, rows))

    def _bring(self, names: Sequence[str | None]) -> list[int]:
        """The slots of adapters, all of which are in a slot afterwards."""
        wanted = [name for name in dict.fromkeys(names) if name is not None]
        for name in wanted:  # first, so that none of them is moved out
            if name in self._slots:
                self._slots.move_to_end(name)
        for name in wanted:
            if name not in self._slots:
                self._write(name, self._overflow.get(name))
        return [_NO_ADAPTER if name is None else self._slots[name] for name in names]

    # -- prediction --------------------------------------------------------------------

    def predict(self, inputs: Any, names: Sequence[str | None]) -> list[RowPrediction]:
        """Predict a batch in which each example uses its own adapter.

        Args:
            inputs: The inputs of the model, an array (batch, ...).
            names: For each example the name of an adapter, or None for the model without one.

        Returns:
            For each example its logits, with the number of classes of its adapter, and labels.

        Raises:
            TypeError: If ``names`` is not a list of names, or ``inputs`` not an array.
            ValueError: If a name is not in the bank, or there are not as many names as
                examples. If the bank is closed. If the model mixes the examples of a batch,
                or its layers get them in another order than one after the other, so that it
                cannot use an adapter for each; this is tried out for the first mixed batch of
                each shape of inputs.
        """
        names = self._checked_names(names)
        inputs = _checked_inputs(inputs)
        if len(inputs) != len(names):
            raise ValueError(
                f"Received {len(names)} names for inputs of shape {inputs.shape}; expected a "
                "name or None for each example."
            )
        rows: list[RowPrediction | None] = [None] * len(names)
        with self._lock:
            self._require_open()
            entries = [self._entry(name) for name in names]
            for indices, uniform in batch_plan(names, self.capacity):
                part = [names[i] for i in indices]
                optional = frozenset().union(*(entries[i].optional for i in indices))
                outputs = self._run(inputs[indices], self._bring(part), uniform, optional)
                for i, row in zip(indices, outputs):
                    entry = entries[i]
                    rows[i] = self._predictions.of(row, names[i], entry.classes, entry.labels)
        return [row for row in rows if row is not None]

    def _run(
        self, inputs: np.ndarray, slots: list[int], uniform: bool, optional: frozenset[str]
    ) -> np.ndarray:
        ids = np.array(slots[:1] if uniform else slots, "int32")
        outputs = self._functions(inputs, ids, uniform, optional)
        self._predictions.learn_activation(lambda: self._functions.of_made_up_inputs(inputs))
        return outputs

    def warm_up(self, inputs: Any) -> None:
        """Compile the functions for inputs of a shape, so that no later batch waits for it.

        This includes the adapters that are loaded. One with DoRA or biases, if there was none
        before, needs another function. JAX compiles a function for each power of two as the
        size of a batch, here up to that of ``inputs``; on torch nothing is compiled.

        Args:
            inputs: Inputs of the model, an array (batch, ...).

        Raises:
            TypeError, ValueError: As ``predict``.
        """
        inputs = _checked_inputs(inputs)
        with self._lock:
            self._require_open()
            single = {entry.optional for entry in self._entries.values()}
            mixed = {one | other for one in single for other in single}
            sizes = [len(inputs)]
            while self._backend.compiles_each_batch_size() and sizes[-1] > 1:
                sizes.append((sizes[-1] + 1) // 2)
            for size in sizes:
                slots = [_NO_ADAPTER] * size
                for optional in single:
                    self._run(inputs[:size], slots, True, optional)
                for optional in mixed:
                    self._run(inputs[:size], slots, False, optional)

    def _checked_names(self, names: Any) -> list[str | None]:
        listed = isinstance(names, Sequence) and not isinstance(names, str)
        if not listed or not all(name is None or isinstance(name, str) for name in names):
            raise TypeError(f"Received names={names!r}; expected a list of names and None.")
        return list(names)

    @property
    def model(self) -> Any:
        """The model as a Keras model whose adapters are an input, for inference.

        Its inputs are a dictionary: "inputs" for the model, and "adapter" with an integer for
        each example, as returned by ``slots``. It returns the outputs of the model, of the
        largest number of classes: those that an adapter does not have are minus infinity (or
        zero after a softmax). It shares all variables with the bank, works with ``predict``,
        ``tf.function`` and ``jax.jit``, and sees adapters that are loaded later.

        Raises:
            ValueError: If the bank is closed. In ``fit``, and in calls with training=True.

        Example:
            >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
            >>> def make():
            ...     return tf.keras.Sequential([
            ...         tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
            >>> tuned = lora.inject_lora(make(), lora_rank=2, lora_targets=["fc"])
            >>> bank = lora.AdapterBank(make(), {"cats": lora.adapter_of(tuned)})
            >>> inputs = {"inputs": np.ones((2, 4), "float32"),
            ...           "adapter": bank.slots(["cats", None])}
            >>> bank.model.predict(inputs, verbose=0).shape
            (2, 3)
        """
        self._require_open()
        if self._routed is None:
            self._routed = model_with_slots(self._functions)
        return self._routed

    def slots(self, names: Sequence[str | None]) -> np.ndarray:
        """Return the integers of adapters that ``model`` takes.

        They are valid until an adapter is moved out of its slot, which happens only if there
        are more adapters than slots.

        Args:
            names: For each example the name of an adapter, or None for the model without one.

        Returns:
            An int32 array (batch,).

        Raises:
            TypeError: If ``names`` is not a list of names.
            ValueError: If a name is not in the bank, or the names are of more adapters than
                there are slots.
        """
        names = self._checked_names(names)
        with self._lock:
            for name in names:
                self._entry(name)
            different = len({name for name in names if name is not None})
            if different > self.capacity:
                raise ValueError(
                    f"Received {different} adapters for a bank of {self.capacity} slots; "
                    "expected as many adapters as slots at most. Call predict, which divides "
                    "the batch."
                )
            return np.array(self._bring(names), "int32")

    def packed(self, name: str | None) -> np.ndarray:
        """Return the values of an adapter as they are in its slot.

        This is what the signature "load" of an exported bank takes.

        Args:
            name: The name of an adapter; None for the model without adapter.

        Returns:
            A float32 array (pages, 64).

        Raises:
            ValueError: If there is no adapter of this name.
        """
        with self._lock:
            self._require_open()
            self._entry(name)
            if name is None:
                return self._read_slot(_NO_ADAPTER)
            slot = self._slots.get(name)
            return self._overflow.get(name) if slot is None else self._read_slot(slot)

    def content(self) -> BankContent:
        """What ``export`` needs of the bank."""
        with self._lock:
            self._require_open()
            entries, activation = dict(self._entries), self._predictions.activation
            return BankContent(self._model, self._layout, entries, activation)

    # -- the end -----------------------------------------------------------------------

    def close(self) -> None:
        """Remove the bank from the model, which is again as it was before.

        Further calls of a closed bank raise a ValueError. Closing twice does nothing.
        """
        with self._loading, self._lock:
            if self._model is None:
                return
            if has_lora(self._model):
                remove_lora(self._model, merge=False)
            self._overflow.close()
            self._model = None

    def __enter__(self) -> AdapterBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._model is None:
            raise ValueError("Received a bank that is closed. Create a new AdapterBank.")
        if not all(isinstance(x, LoRALayer) for x in self._layers.adapted.values()):
            raise ValueError(
                f"LoRA was removed from or replaced in model '{self._model.name}' since the "
                "bank was created, so the bank has no effect. Create a new AdapterBank, and "
                "leave its model alone."
            )

    def _require_called(self, entries: Mapping[Any, BankEntry]) -> None:
        """Raise if an adapter changes layers that the model does not call."""
        for name, entry in entries.items():
            without_effect = sorted(entry.changed & self._functions.not_called)
            if without_effect:
                raise ValueError(
                    f"Adapter {name!r} changes the layers {', '.join(without_effect[:10])}, "
                    f"where it would have no effect: model '{self._model.name}' does not call "
                    "them, or calls them in a function that was compiled before (tf.function, "
                    "jax.jit). Remove them from the adapter, or the tf.function from the model."
                )

    def __repr__(self) -> str:
        if self._model is None:
            return "AdapterBank(closed)"
        return (
            f"AdapterBank({len(self.names)} adapters, capacity={self.capacity}, "
            f"max_rank={self._layout.max_rank}, max_classes={self._layout.max_classes})"
        )


def _require_classification(name: str, adapter: Adapter) -> None:
    task = adapter.task
    if task is not None and task.name != "classification":
        raise ValueError(
            f"Adapter {name!r} was trained for the task {task.name!r}; expected a "
            "classification. A bank computes the probabilities of classes: use the adapter in "
            "a model of its own (load_adapter)."
        )


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"Received the name {name!r} for an adapter; expected a string.")
    return name


def _checked_inputs(inputs: Any) -> np.ndarray:
    array = None if isinstance(inputs, Mapping) else np.asarray(inputs)
    if array is None or array.dtype == object or array.ndim < 1:
        raise TypeError(
            f"Received inputs of type {type(inputs).__name__}; expected an array (batch, ...)."
        )
    return array


def _read(names: ModuleNames, adapter: Any) -> Adapter:
    """An adapter in the names of the model."""
    loaded = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    return in_names_of(names, loaded)


def _entry_of(name: str, values: AdapterValues, labels: Sequence[str] | None) -> BankEntry:
    if labels is not None:
        if isinstance(labels, str):
            raise TypeError(f"Received labels={labels!r}; expected a list of names.")
        labels = tuple(map(str, labels))
        if len(labels) != values.classes:
            raise ValueError(
                f"Received {len(labels)} labels for adapter {name!r}, which has "
                f"{values.classes} classes."
            )
    return BankEntry(values.classes, labels, values.optional, values.changed)
