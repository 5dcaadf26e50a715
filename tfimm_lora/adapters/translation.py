"""Translate an adapter from the names of one library to those of another.

The factors stay the same. Only where one library has separate layers for query, key and value
and the other a fused projection, they change their form; see ``fused``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.adapters.fused import fuse, split
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.families.recognize import Naming
from tfimm_lora.families.templates import Name
from tfimm_lora.zoo.weights.renamed import OfBase, in_blocks, layout_of_timm, renamed_weights
from tfimm_lora.zoo.weights.windows import as_window

_D = TypeVar("_D", bound=AdapterData)

#: The number of names that an error message lists.
_MAX_LISTED = 20


def translate(
    adapter: _D,
    source: Naming,
    target: Naming,
    norms: OfBase | None = None,
    weights: OfBase | None = None,
) -> _D:
    """Return an adapter with the names of another library.

    Args:
        adapter: The adapter.
        source: Its naming.
        target: The naming of the result, of the same family.
        norms: Returns the norms of the rows of a base weight. It is needed for DoRA on some
            blocks of a projection that the target has in one layer.
        weights: Returns a base weight. It is needed for trained biases of such blocks.

    Raises:
        ValueError: If a name cannot be translated; the message lists all of them. Or if
            ``norms`` or ``weights`` is needed and missing.
    """
    problems: list[str] = []
    layers = _renamed_layers(adapter.layers, source, target, norms, problems)
    renamed = renamed_weights(adapter.weights, source, target, problems, weights)
    if problems:
        more = len(problems) - _MAX_LISTED
        raise ValueError(
            f"Received an adapter with {source}, which cannot be translated to {target}: "
            f"{'; '.join(problems[:_MAX_LISTED])}{f'; and {more} more' if more > 0 else ''}. "
            "docs/reference/names.md lists the known names. Leave the other layers out."
        )
    inside = [k for k in adapter.weights if any(k.startswith(f"{m}.") for m in adapter.modules)]
    full = renamed_weights({k: adapter.weights[k] for k in inside}, source, target, [], weights)
    modules = tuple(sorted({key.rpartition(".")[0] for key in full}))
    selection = adapter.selection
    if selection is not None:
        same = selection.layers == adapter.layers.keys()
        selection = selection.translated(source, target, frozenset(layers)) if same else None
    return dataclasses.replace(
        adapter, layers=layers, weights=renamed, modules=modules, selection=selection
    )


def names_in(source: Naming, target: Naming, name: str, is_weight: bool = False) -> list[str]:
    """Return the names in ``source`` of a module or weight that ``target`` names.

    They are several where ``source`` has separate layers for query, key and value and
    ``target`` a fused projection; none if either table lacks the module.
    """
    timm = target.to_timm(name, is_weight)
    if timm is None:
        return []
    own = source.from_timm(timm, is_weight)
    if own is not None:
        return [own]
    if timm.block is not None:
        whole = source.from_timm(Name(timm.name), is_weight)
        return [] if whole is None else [whole]
    module = timm.name.rpartition(".")[0] if is_weight else timm.name
    blocks = (source.from_timm(Name(timm.name, b), is_weight) for b in layout_of_timm(module))
    return [name for name in blocks if name is not None]


def _renamed_layers(
    layers: Mapping[str, LayerUpdate],
    source: Naming,
    target: Naming,
    norms: OfBase | None,
    problems: list[str],
) -> dict[str, LayerUpdate]:
    renamed = {}
    for timm, parts in in_blocks(layers, source, False, problems).items():
        layout = layout_of_timm(timm)
        if None in parts and target.names.is_split(timm):
            parts = dict(split(parts[None], layout).items())
        elif None not in parts and not target.names.is_split(timm):
            blocks = {block: update for block, update in parts.items() if block}
            own = None if norms is None else _norms_of(timm, norms)
            parts = {None: fuse(blocks, layout, own)}
        for block, update in parts.items():
            name = target.from_timm(Name(timm, block))
            if name is None:
                problems.append(f"no name for {Name(timm, block)}")
                continue
            try:
                renamed[name] = _in_window(update, target.names.window(timm))
            except ValueError as error:
                problems.append(f"{name} {error}")
    return renamed


def _in_window(update: LayerUpdate, size: int | None) -> LayerUpdate:
    """Return an update of a linear layer as that of a convolution, or the reverse."""
    if size is None or update.kind not in ("linear", "conv"):
        return update
    if size and update.is_loha and update.a.ndim == 2:
        raise ValueError(
            "is of PEFT's LoHa, whose file does not tell the inputs of a window from others"
        )
    a, b = as_window(update.a, size), as_window(update.b, min(size, 1))
    kind = "conv" if size else "linear"
    if update.a2 is None or update.b2 is None:
        return dataclasses.replace(update, a=a, b=b, kind=kind)
    a2, b2 = as_window(update.a2, size), as_window(update.b2, min(size, 1))
    return dataclasses.replace(update, a=a, b=b, a2=a2, b2=b2, kind=kind)


def _norms_of(timm: str, norms: OfBase) -> Callable[[str], np.ndarray | None]:
    return lambda block: norms(Name(timm, block))
