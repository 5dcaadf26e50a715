"""Between one update of a fused projection and separate ones of its query, key and value.

A fused projection has the rows of its blocks below each other: W = [W_q; W_k; W_v], each of d
rows. With an update s_p B_p A_p of each block p,

    dW = s [s_q/s B_q  0  0; 0  s_k/s B_k  0; 0  0  s_v/s B_v] [A_q; A_k; A_v],

which is exact at the sum of the ranks. If all A_p are equal, dW = s [s_p/s B_p] A at their own
rank. The other way each block takes its rows of B, and those columns of it that are not zero.
The two pairs of factors of LoHa are treated alike, except that the scales are in the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tfimm_lora.adapters.layer_update import LayerUpdate


def split(update: LayerUpdate, layout: str) -> dict[str, LayerUpdate]:
    """Return the updates of the blocks of a fused projection, each at its smallest rank.

    Args:
        update: The update of the whole projection.
        layout: The blocks in their order: "qkv".

    Returns:
        Block -> update. A block that the update does not change is left out, but not with
        DoRA, whose magnitude may change it.

    Raises:
        ValueError: If the number of rows is not a multiple of the number of blocks.
    """
    count = len(layout)
    if len(update.b) % count:
        raise ValueError(
            f"Received an update with {len(update.b)} outputs for the {count} blocks "
            f"{layout!r} of equal size."
        )
    chosen = update.qkv[0] if update.qkv else layout
    parts = {}
    for index, block in enumerate(layout):
        b, *second = (np.split(each, count)[index] for _, each in update.pairs())
        vectors = {
            name: np.split(value, count)[index]
            for name in ("magnitude", "bias")
            if (value := getattr(update, name)) is not None
        }
        used = _used(b)
        if second:
            # B2 is not zero in the ranks of the block, even if B was not trained yet.
            used = _used(second[0]) if b.any() or not update.b.any() else np.arange(0)
        elif not update.b.any():  # not trained yet
            used = _ranks_of_block(update, chosen, block)
        elif not used.size and ("magnitude" in vectors or np.any(vectors.get("bias", 0))):
            used = np.arange(1)
        if used.size:
            parts[block] = LayerUpdate(
                update.a[used],
                b[:, used],
                update.scale,
                update.kind,
                magnitude=vectors.get("magnitude"),
                bias=vectors.get("bias"),
                a2=None if update.a2 is None else update.a2[used],
                b2=second[0][:, used] if second else None,
            )
    return parts


def _used(b: np.ndarray) -> np.ndarray:
    """Return the columns of a B that are not zero."""
    return np.flatnonzero(np.any(b.reshape(b.shape[:2]) != 0, axis=0))


def _ranks_of_block(update: LayerUpdate, chosen: str, block: str) -> np.ndarray:
    """Return the columns of a block in an update whose B is zero."""
    if not update.qkv:
        return np.arange(update.rank)
    width = update.rank // len(chosen)
    start = chosen.index(block) * width if block in chosen else 0
    return np.arange(start, start + width) if block in chosen else np.arange(0)


def fuse(
    parts: Mapping[str, LayerUpdate],
    layout: str,
    norms: Callable[[str], np.ndarray | None] | None = None,
) -> LayerUpdate:
    """Return the update of a fused projection from those of its blocks; see the module.

    Args:
        parts: Block -> update, of equal shapes.
        layout: The blocks of the projection in their order.
        norms: Returns the norms of the rows of the base weight of a block, (d,), for a block
            without an update beside others with DoRA.

    Raises:
        ValueError: If a block has DoRA, another has no update, and its norms are not known; or
            if only some blocks have LoHa.
    """
    chosen = "".join(block for block in layout if block in parts)
    updates = [parts[block] for block in chosen]
    first = updates[0]
    if len({x.is_loha for x in updates}) > 1:
        raise ValueError("Received LoHa for some blocks of a projection; expected it for all.")
    width = len(first.b)
    shared = (
        not first.is_loha
        and len(updates) == len(layout)
        and all(np.array_equal(x.a, first.a) for x in updates[1:])
    )
    scale = next((x.scale for x in updates if x.scale), 0.0)
    ratios = {b: parts[b].scale / scale if scale else 0.0 for b in chosen}
    (a, b), *second = (
        _stacked(
            {block: parts[block].pairs()[i] for block in chosen},
            layout,
            {} if i else ratios,  # the scales are in the first pair
            shared,
        )
        for i in range(len(first.pairs()))
    )
    a2, b2 = second[0] if second else (None, None)
    equal = len({x.rank for x in updates}) == 1 and set(ratios.values()) == {1.0}
    return LayerUpdate(
        a,
        b,
        scale,
        first.kind,
        (chosen, layout) if equal and not shared else None,
        magnitude=_magnitude(parts, layout, norms),
        bias=_bias(parts, layout, ratios, width),
        a2=a2,
        b2=b2,
    )


def _stacked(
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    layout: str,
    ratios: Mapping[str, float],
    shared: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of a fused projection from those of its blocks; see the module.

    Args:
        pairs: Block -> A and B, in the order of the layout.
        layout: The blocks of the projection in their order.
        ratios: Block -> factor of its B. Default 1.
        shared: Whether all blocks have the same A.
    """
    factors = list(pairs.values())
    first = factors[0][1]
    a = factors[0][0] if shared else np.concatenate([a for a, _ in factors])
    width = len(first)
    b = np.zeros((width * len(layout), len(a), *first.shape[2:]), first.dtype)
    column = 0
    for block, (_, own) in pairs.items():
        start, rank = layout.index(block) * width, own.shape[1]
        b[start : start + width, column : column + rank] = ratios.get(block, 1.0) * own
        column += 0 if shared else rank
    return a, b


def _magnitude(
    parts: Mapping[str, LayerUpdate],
    layout: str,
    norms: Callable[[str], np.ndarray | None] | None,
) -> np.ndarray | None:
    if all(x.magnitude is None for x in parts.values()):
        return None
    values = []
    for block in layout:
        value = parts[block].magnitude if block in parts else norms and norms(block)
        if value is None:
            raise ValueError(
                f"Received DoRA updates of {', '.join(parts)} alone, for a projection of "
                f"{', '.join(layout)} in one layer. Its magnitude needs the norms of the base "
                "weights. Pass the base model: model=..., or --model on the command line."
            )
        values.append(np.asarray(value, "float32"))
    return np.concatenate(values)


def _bias(
    parts: Mapping[str, LayerUpdate], layout: str, ratios: Mapping[str, float], width: int
) -> np.ndarray | None:
    if all(x.bias is None for x in parts.values()):
        return None
    biases = [
        (parts[block].bias, ratios[block]) if block in parts else (None, 0.0)
        for block in layout
    ]
    values = [np.zeros(width) if bias is None else ratio * bias for bias, ratio in biases]
    return np.concatenate(values).astype("float32")
