"""Several adapters at once: attach them, and choose one for each example of a batch."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.fit import check_fits
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.lora_arguments import lora_arguments
from tfimm_lora.adapters.module_names import ModuleNames
from tfimm_lora.adapters.torch_layout import DoesNotFit, columns_for
from tfimm_lora.backend import backend_of
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.mixed_batch import (
    ATTACHED_NAMES,
    Attached,
    Route,
    along,
    attach,
    current,
    detach,
)
from tfimm_lora.model.inject import inject_lora, remove_lora
from tfimm_lora.model.merge import has_lora, lora_layers

#: Whether ``attach_adapters`` put LoRA into the model.
_INJECTED = "_lora_injected_to_attach"


def attach_adapters(
    model: Any, adapters: Mapping[str, Adapter | str | os.PathLike[str]]
) -> Any:
    """Give a model several adapters, of which every example of a batch can take its own.

    Call the model inside ``use_adapters``, or call or predict with ``routed_model``. Each
    row of the output is then what its adapter alone would give. Outside of that the model
    computes as before.

    Args:
        model: A built Keras model. Without LoRA, it gets LoRA in the layers of the adapters,
            whose update is zero; with LoRA, its own adapter stays as it is.
        adapters: Name -> an ``Adapter``, a folder or "hf://user/repo". Ranks, scales and
            layers may differ. They replace those attached before.

    Returns:
        The same model. Functions of your own that were traced with it must be made again.

    Raises:
        ValueError: without adapters; or if one does not fit the model, holds weights trained
            whole (which cannot differ by example), or has layers whose product does not
            split in two (grouped, depthwise, standardised convolutions). All are named, and
            the model is as it was.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> a = lora.adapter_of(model)
        >>> _ = lora.attach_adapters(model, {"cats": a, "dogs": a})
        >>> with lora.use_adapters(["cats", None, "dogs"]):
        ...     model(np.ones((3, 4), "float32")).shape
        TensorShape([3, 3])
    """
    if not adapters or not all(isinstance(name, str) for name in adapters):
        raise ValueError(
            f"Received adapters with the names {list(adapters)}; expected at least one, by a "
            "name of text."
        )
    loaded = {
        name: x if isinstance(x, Adapter) else Adapter.load(x) for name, x in adapters.items()
    }
    for name, adapter in loaded.items():
        if adapter.weights:
            raise ValueError(
                f"Received adapter {name!r}, which holds {', '.join(adapter.weights)} whole; "
                "expected LoRA factors only, since one batch has one classifier and one bias. "
                "Switch between such adapters with load_adapter."
            )
        check_fits(model, adapter)
    injected = _with_layers(model, loaded)
    try:
        attached = _side_by_side(model, loaded)
    except ValueError:
        if injected:
            remove_lora(model, merge=False)
        raise
    was_injected = model.__dict__.get(_INJECTED, False)
    for _, layer in backend_of(model).walk(model):
        detach(layer)
    for layer, columns in attached:
        attach(layer, columns)
    model.__dict__[_INJECTED] = injected or was_injected
    model.__dict__[ATTACHED_NAMES] = tuple(loaded)
    model.__dict__["call"] = functools.partial(_checked_call, model)
    backend_of(model).reset_functions(model)
    return model


def detach_adapters(model: Any) -> Any:
    """Undo ``attach_adapters``; without attached adapters nothing happens.

    LoRA that it put into a model without LoRA is taken out again.

    Args:
        model: The model.

    Returns:
        The same model.
    """
    backend = backend_of(model)
    if any([detach(layer) for _, layer in backend.walk(model)]):
        backend.reset_functions(model)
    if model.__dict__.pop(_INJECTED, False) and has_lora(model):
        remove_lora(model, merge=False)
    return model


@contextlib.contextmanager
def use_adapters(names: Sequence[str | None]) -> Iterator[None]:
    """Within this block every example of a batch takes its own adapter.

    For models called directly, of any Keras. A function that is traced within the block keeps
    these names, and one that was traced before does not see them: ``predict`` too. For those
    use ``routed_model``. None is the model as it is without its factors; weights that
    ``load_adapter`` replaced whole count for every example.

    Args:
        names: For each example of the batch the name of an attached adapter, or None for
            the model without adapter.

    Raises:
        ValueError: at the call, if a name is not attached or the batch has not so many
            examples; or if a layer is merged.
        TypeError: if ``names`` is no list of names.
    """
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(f"Received names={names!r}; expected a list of names and None.")
    with along(Route(list(names))):
        yield


def routed_model(model: Any) -> Any:
    """A model around one with attached adapters that takes the adapters as an input.

    It works with ``predict``, ``tf.function`` and ``jax.jit``: the choice is data. Its input
    is a dictionary: "inputs" for the model, "adapter" with an integer for each example, as
    ``adapter_ids`` gives them.

    Args:
        model: A model with attached adapters.

    Returns:
        A new Keras model that shares all weights with ``model``.

    Raises:
        ValueError: if no adapters are attached.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> _ = lora.attach_adapters(model, {"cats": lora.adapter_of(model)})
        >>> routed = lora.routed_model(model)
        >>> ids = lora.adapter_ids(model, ["cats", None])
        >>> x = np.ones((2, 4), "float32")
        >>> routed.predict({"inputs": x, "adapter": ids}, verbose=0).shape
        (2, 3)
    """
    _attached_names(model)
    return _routed_class(backend_of(model).keras.Model)(model)


def adapter_ids(model: Any, names: Sequence[str | None]) -> np.ndarray:
    """The integers that ``routed_model`` takes for names of attached adapters.

    Args:
        model: A model with attached adapters.
        names: For each example a name, or None for the model without adapter.

    Returns:
        int32 array (batch,): the index of each adapter, -1 for None.

    Raises:
        ValueError: for a name that is not attached, or if none are.
        TypeError: for a single name.
    """
    if isinstance(names, str):
        raise TypeError(f"Received names={names!r}; expected a list of names and None.")
    return Route(list(names)).ids(_attached_names(model))


@functools.cache
def _routed_class(base: type) -> type:
    class RoutedModel(base):  # type: ignore[misc, valid-type]
        """A model whose input says which adapter each example takes."""

        def __init__(self, model: Any) -> None:
            super().__init__(name=f"routed_{model.name}")
            self.model = model
            # Factors are constants of its traces.
            backend_of(model).note_user(model, self)

        def call(self, inputs: Any, training: Any = None) -> Any:
            _attached_names(self.model)
            with along(Route(None, inputs["adapter"])):
                return self.model(inputs["inputs"])

    return RoutedModel


def _attached_names(model: Any) -> tuple[str, ...]:
    names = model.__dict__.get(ATTACHED_NAMES)
    if names is None:
        raise ValueError(
            f"Received model '{model.name}', to which no adapters are attached. Call "
            "attach_adapters first."
        )
    return names


def _with_layers(model: Any, adapters: dict[str, Adapter]) -> bool:
    """Put LoRA into a model without it, and say so; raise if one lacks some layers."""
    modules = {m: x for adapter in adapters.values() for m, x in adapter.layers.items()}
    if not has_lora(model):
        # The smallest LoRA in these layers; what it learns is not asked for.
        thin = {m: LayerUpdate(x.a[:1], x.b[:, :1], 1.0, x.kind) for m, x in modules.items()}
        union = Adapter(thin)
        inject_lora(model, **lora_arguments(model, union))
        return True
    names = ModuleNames(model)
    there = set(lora_layers(model))
    missing = [module for module in modules if names.paths[module] not in there]
    if missing:
        raise ValueError(
            f"Received adapters with the layers {', '.join(missing)}, in which model "
            f"'{model.name}' has no LoRA. Attach them to the model without LoRA, or to one "
            "whose lora_targets name these layers too."
        )
    merged = [path for path, layer in lora_layers(model).items() if layer.merged]
    if merged:
        raise ValueError(
            f"Received model '{model.name}', which is merged ({merged[0]}, ...). Call "
            "unmerge_lora_weights first."
        )
    return False


def _side_by_side(model: Any, adapters: dict[str, Adapter]) -> list[tuple[LoRALayer, Attached]]:
    """For each layer the factors of all adapters that have it, column by column."""
    names, result, problems = ModuleNames(model), [], []
    for path, layer in lora_layers(model).items():
        module = names.modules[path]
        columns, members = [], []
        for index, adapter in enumerate(adapters.values()):
            for key in (k for k in adapter.layers if names.paths[k] == path):
                try:
                    columns.append(columns_for(layer, adapter.layers[key]))
                except DoesNotFit as error:
                    problems.append(f"{module} {error}")
                    continue
                members += [index] * adapter.layers[key].rank
        # A layer that no adapter has takes part with no columns.
        a = np.concatenate([a for a, _ in columns], axis=-1) if columns else np.zeros(0)
        b = np.concatenate([b for _, b in columns], axis=0) if columns else np.zeros(0)
        result.append((layer, Attached(tuple(adapters), a, b, np.array(members, "int32"))))
    if problems:
        raise ValueError(
            f"Received adapters that cannot be chosen by example: {'; '.join(problems)}. "
            "Switch between them with load_adapter."
        )
    return result


def _checked_call(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own call, once the batch was found to have as many examples as names."""
    route = current()
    if route is not None:
        first = inputs
        while isinstance(first, (dict, list, tuple)):
            first = next(iter(first.values() if isinstance(first, dict) else first))
        rows, batch = first.shape[0], route.batch
        if rows is not None and batch is not None and rows != batch:
            raise ValueError(
                f"Received adapters for {batch} examples and a batch of {rows}; expected a "
                "name or None for each example."
            )
    return type(model).call(model, inputs, *args, **kwargs)
