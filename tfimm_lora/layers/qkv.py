"""Query, key and value in one kernel, of which each part can have an update of its own.

A fused projection of attention has a kernel (in, n * d) whose columns are n blocks of equal
width, one a part. To adapt p of them each gets its own A (in, r) and B (r, d). They are kept
stacked, A: (in, p * r) and B: (p * r, d), so that A is that of a plain update of rank p * r.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfimm_lora.layer_paths import without_counts

#: What a projection of attention consists of, by the name of its layer.
LAYOUTS = {
    "qkv": "qkv",
    "kv": "kv",
    **dict.fromkeys(("q", "query", "q_proj", "to_q"), "q"),
    **dict.fromkeys(("k", "key", "k_proj", "to_k"), "k"),
    **dict.fromkeys(("v", "value", "v_proj", "to_v"), "v"),
}


def layout_of(path: str) -> str | None:
    """The parts in the kernel of a layer, in their order, or None for another layer."""
    return LAYOUTS.get(without_counts(path).rpartition("/")[2])


def check_layout(chosen: str | None, layout: Any) -> None:
    """Raise unless ``layout`` says which parts a kernel has and ``chosen`` are some."""
    if chosen is None:
        return
    letters = isinstance(layout, str) and set(layout) <= set("qkv")
    if not letters or len(layout) < 2 or len(set(layout)) < len(layout):
        raise ValueError(
            f'Received lora_qkv_layout={layout!r}; expected at least two letters of "qkv", '
            "each once, in the order of the parts in the kernel."
        )
    if set(chosen) - set(layout):
        raise ValueError(
            f"Received lora_qkv={chosen!r} for a kernel with the parts {layout!r}; expected "
            "some of these."
        )


def selection(chosen: str, layout: str) -> np.ndarray:
    """A matrix (p, n) with a 1 where a chosen part is the part of the layout."""
    return np.array([[float(a == b) for b in layout] for a in chosen], "float32")


class PartsOfMatrix:
    """As ``MatrixProduct``, ``product``, with factors for some of the parts of W.

    ``widen`` gives the B of the plain update of rank p * r that does the same: (p * r,
    n * d), in which the rows of a part are zero but for that part's columns.
    """

    def __init__(self, product: Any, chosen: str, layout: str) -> None:
        self.product, self.ops = product, product.ops
        self.selection = selection(chosen, layout)

    def widen(self, b: Any) -> Any:
        stacked = self.ops.reshape(b, self._stacked_shape(b))
        chosen = self.ops.cast(self.selection, b.dtype)
        wide = self.ops.einsum("prd,pn->prnd", stacked, chosen)
        return self.ops.reshape(wide, (b.shape[0], -1))

    def narrow(self, wide: Any, b: Any) -> Any:
        """The gradient by B from the gradient by the widened B."""
        parts, rank, width = self._stacked_shape(b)
        blocks = self.ops.reshape(wide, (parts, rank, self.selection.shape[1], width))
        chosen = self.ops.cast(self.selection, wide.dtype)
        return self.ops.reshape(self.ops.einsum("prnd,pn->prd", blocks, chosen), b.shape)

    def _stacked_shape(self, b: Any) -> tuple[int, int, int]:
        parts = self.selection.shape[0]
        return parts, b.shape[0] // parts, b.shape[1]

    def apply(self, x: Any, kernel: Any) -> Any:
        return self.product.apply(x, kernel)

    def apply_and_back(self, x: Any, kernel: Any) -> tuple[Any, Any]:
        return self.product.apply_and_back(x, kernel)

    def kernel_gradient(self, x: Any, kernel: Any, dy: Any) -> Any:
        return self.product.kernel_gradient(x, kernel, dy)

    def update(self, a: Any, b: Any) -> Any:
        return self.product.update(a, self.widen(b))

    def update_gradients(self, a: Any, b: Any, dw: Any) -> tuple[Any, Any]:
        da, wide = self.product.update_gradients(a, self.widen(b), dw)
        return da, self.narrow(wide, b)

    def down(self, x: Any, a: Any) -> Any:
        return self.product.down(x, a)

    def down_input_gradient(self, x: Any, a: Any, dh: Any) -> Any:
        return self.product.down_input_gradient(x, a, dh)

    def down_factor_gradient(self, x: Any, a: Any, dh: Any) -> Any:
        return self.product.down_factor_gradient(x, a, dh)

    def up(self, h: Any, b: Any) -> Any:
        return self.product.up(h, self.widen(b))

    def up_input_gradient(self, b: Any, dy: Any) -> Any:
        return self.product.up_input_gradient(self.widen(b), dy)

    def up_factor_gradient(self, h: Any, b: Any, dy: Any) -> Any:
        return self.narrow(self.product.up_factor_gradient(h, self.widen(b), dy), b)
