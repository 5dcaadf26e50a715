"""Mixed batches: attach several adapters to a model, and choose one for each example."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.base_architecture import warn_if_other_checkpoint
from tfimm_lora.adapters.fit import check_fits
from tfimm_lora.adapters.incomplete import warn_if_incomplete
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.lora_arguments import lora_arguments
from tfimm_lora.adapters.model_names import in_names_of
from tfimm_lora.adapters.torch_layout import DoesNotFit, columns_for
from tfimm_lora.backend import backend_of
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.mixed_batch import Assignment, Attached, assigned, current
from tfimm_lora.model.inject import inject_lora, remove_lora
from tfimm_lora.model.merge import has_lora, lora_layers
from tfimm_lora.model.state import model_state
from tfimm_lora.zoo.weights.module_names import ModuleNames


def attach_adapters(
    model: Any, adapters: Mapping[str, Adapter | str | os.PathLike[str]]
) -> Any:
    """Attach several adapters to a model, so that each example of a batch can use its own.

    Call the model inside ``use_adapters``, or use ``routed_model``. Each row of the output is
    then the output with its own adapter. Otherwise the model computes as before.

    Args:
        model: A built Keras model. If it has no LoRA, LoRA with a zero update is injected into
            the layers of the adapters. If it has LoRA, its own adapter stays as it is.
        adapters: Name -> an ``Adapter``, a folder or "hf://user/repo". They may have different
            ranks, scales and layers. They replace the adapters attached before.

    Returns:
        The same model. Trace your own functions of it again.

    Raises:
        ValueError: If there are no adapters; or if one does not fit the model, holds fully
            trained weights (which cannot differ by example), or has layers whose update is
            not a product of two narrow matrices (grouped, depthwise, standardised
            convolutions). The message names all of them, and the model is unchanged.

    Warns:
        UserWarning: If an adapter is incomplete, or names another checkpoint on the hub than
            the model was loaded from, as in ``load_adapter``.

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
            f"Received adapters with the names {list(adapters)}; expected at least one, with "
            "a string as its name."
        )
    names = ModuleNames(model)
    loaded = {
        name: in_names_of(names, x if isinstance(x, Adapter) else Adapter.load(x))
        for name, x in adapters.items()
    }
    for name, adapter in loaded.items():
        if adapter.weights:
            raise ValueError(
                f"Received adapter {name!r}, which holds the fully trained weights "
                f"{', '.join(adapter.weights)}; expected LoRA factors only, since a batch has "
                "only one classifier and one bias. Switch between such adapters with "
                "load_adapter."
            )
        check_fits(model, adapter)
        warn_if_incomplete(names, adapter, stacklevel=2)
        warn_if_other_checkpoint(model, adapter, stacklevel=2)
    injected = _inject_if_needed(model, loaded)
    try:
        attached = _stacked_factors(model, loaded)
    except ValueError:
        if injected:
            remove_lora(model, merge=False)
        raise
    for layer, columns in attached:
        layer._lora_state.attached = columns
    state = model_state(model)
    state.injected_to_attach = injected or state.injected_to_attach
    state.attached = tuple(loaded)
    model.__dict__["call"] = functools.partial(_checked_call, model)
    backend_of(model).reset_functions(model)
    return model


def detach_adapters(model: Any) -> Any:
    """Detach all adapters that ``attach_adapters`` attached.

    LoRA that ``attach_adapters`` injected is removed. Without attached adapters nothing
    happens.

    Args:
        model: The model.

    Returns:
        The same model.
    """
    state = model_state(model)
    if state.attached is None:
        return model
    state.attached = None
    model.__dict__.pop("call", None)
    for layer in lora_layers(model).values() if has_lora(model) else ():
        layer._lora_state.attached = None
    backend_of(model).reset_functions(model)
    if state.injected_to_attach and has_lora(model):
        remove_lora(model, merge=False)
    return model


@contextlib.contextmanager
def use_adapters(names: Sequence[str | None]) -> Iterator[None]:
    """Use an adapter for each example of a batch within a ``with`` block.

    This is for models that are called directly. A function that is traced within the block
    keeps these names, and a function that was traced before ignores them, including
    ``predict``; use ``routed_model`` for those. Weights that ``load_adapter`` replaced apply to
    every example.

    Args:
        names: For each example of the batch, the name of an attached adapter, or None for
            the model without its adapter.

    Raises:
        ValueError: When the model is called, if a name is not attached, the batch has another
            size, or a layer is merged.
        TypeError: If ``names`` is not a list of names.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> _ = lora.attach_adapters(model, {"cats": lora.adapter_of(model)})
        >>> with lora.use_adapters(["cats", None]):
        ...     model(np.ones((2, 4), "float32")).shape
        TensorShape([2, 3])
    """
    listed = isinstance(names, Sequence) and not isinstance(names, str)
    if not listed or not all(name is None or isinstance(name, str) for name in names):
        raise TypeError(f"Received names={names!r}; expected a list of names and None.")
    with assigned(Assignment(list(names))):
        yield


def routed_model(model: Any) -> Any:
    """Wrap a model with attached adapters so that the adapters are an input.

    Since the choice is data, it works with ``predict``, ``tf.function`` and ``jax.jit``. The
    input is a dictionary: "inputs" for the model, and "adapter" with an integer for each
    example, as returned by ``adapter_ids``.

    Args:
        model: A model with attached adapters.

    Returns:
        A new Keras model that shares all weights with ``model``.

    Raises:
        ValueError: If no adapters are attached.

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
    """Convert names of attached adapters to the integers that ``routed_model`` takes.

    Args:
        model: A model with attached adapters.
        names: For each example a name, or None for the model without its adapter.

    Returns:
        An int32 array of shape (batch,): the index of each adapter, -1 for None.

    Raises:
        ValueError: If a name is not attached, or no adapters are attached.
        TypeError: If ``names`` is a single name.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
        >>> _ = lora.attach_adapters(model, {"cats": lora.adapter_of(model)})
        >>> lora.adapter_ids(model, [None, "cats"]).tolist()
        [-1, 0]
    """
    if isinstance(names, str):
        raise TypeError(f"Received names={names!r}; expected a list of names and None.")
    ids: np.ndarray = Assignment(list(names)).ids(_attached_names(model))
    return ids


@functools.cache
def _routed_class(base: type) -> type:
    class RoutedModel(base):  # type: ignore[misc]
        """A model whose input includes the adapter of each example."""

        def __init__(self, model: Any) -> None:
            super().__init__(name=f"routed_{model.name}")
            self.model = model
            # The factors of attached adapters are constants in its traces.
            backend_of(model).note_caller(model, self)

        def call(self, inputs: Any, training: Any = None) -> Any:
            _attached_names(self.model)
            with assigned(Assignment(None, inputs["adapter"])):
                return self.model(inputs["inputs"])

    return RoutedModel


def _attached_names(model: Any) -> tuple[str, ...]:
    names = model_state(model).attached
    if names is None:
        raise ValueError(
            f"Received model '{model.name}', to which no adapters are attached. Call "
            "attach_adapters first."
        )
    return names


def _inject_if_needed(model: Any, adapters: dict[str, Adapter]) -> bool:
    """Inject LoRA into a model without it, and return whether that was done.

    Raises:
        ValueError: If the model has LoRA, but not in all layers of the adapters, or is merged.
    """
    updates = {m: x for adapter in adapters.values() for m, x in adapter.layers.items()}
    if not has_lora(model):
        # The smallest LoRA in these layers; its own update stays zero.
        rank_one = {
            m: LayerUpdate(x.a[:1], x.b[:, :1], 1.0, x.kind) for m, x in updates.items()
        }
        inject_lora(model, **lora_arguments(model, Adapter(rank_one)))
        return True
    names = ModuleNames(model)
    adapted = set(lora_layers(model))
    missing = [module for module in updates if names.paths[module] not in adapted]
    if missing:
        raise ValueError(
            f"Received adapters with the layers {', '.join(missing)}, in which model "
            f"'{model.name}' has no LoRA. Attach them to the model without LoRA, or include "
            "these layers in lora_targets."
        )
    merged = [path for path, layer in lora_layers(model).items() if layer.merged]
    if merged:
        raise ValueError(
            f"Received model '{model.name}', which is merged ({merged[0]}, ...); expected an "
            "unmerged model. Call unmerge_lora_weights first."
        )
    return False


def _stacked_factors(
    model: Any, adapters: dict[str, Adapter]
) -> list[tuple[LoRALayer, Attached]]:
    """Return each LoRA layer with the factors of all adapters, stacked along the rank."""
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
        # A layer that no adapter has gets no columns.
        a = np.concatenate([a for a, _ in columns], axis=-1) if columns else np.zeros(0)
        b = np.concatenate([b for _, b in columns], axis=0) if columns else np.zeros(0)
        result.append((layer, Attached(tuple(adapters), a, b, np.array(members, "int32"))))
    if problems:
        raise ValueError(
            f"Received adapters that cannot be used in a mixed batch: {'; '.join(problems)}. "
            "Switch between them with load_adapter."
        )
    return result


def _checked_call(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model, after checking that the batch has as many examples as names."""
    assignment = current()
    if assignment is not None:
        first = inputs
        while isinstance(first, (dict, list, tuple)):
            first = next(iter(first.values() if isinstance(first, dict) else first))
        rows, batch = first.shape[0], assignment.batch
        if rows is not None and batch is not None and rows != batch:
            raise ValueError(
                f"Received adapters for {batch} examples and a batch of {rows}; expected a "
                "name or None for each example."
            )
    return type(model).call(model, inputs, *args, **kwargs)
