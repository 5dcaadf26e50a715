"""``LoRADense``: a dense layer with a low-rank update of its kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.config import LayerSettings
from tfimm_lora.layers import forms, mixed_batch, qkv
from tfimm_lora.layers.base import LoRALayer, has_keras_call
from tfimm_lora.layers.compiled import activated
from tfimm_lora.layers.forward import Factors
from tfimm_lora.layers.input_rows import InputRows, split_rows
from tfimm_lora.layers.mixed_product import by_example
from tfimm_lora.layers.products import leading_shape


class MatrixProduct:
    """x W for x of shape (rows, in) and W of shape (in, out); A (in, r), B (r, out)."""

    #: Whether a kernel for each example is the form of a mixed batch; None if it depends.
    has_cheap_rows: bool | None = None
    #: Whether the units are the last axis of kernel, B and outputs.
    ends_in_units = True

    def __init__(self, backend: Backend) -> None:
        self.backend, self.ops = backend, backend.ops

    def apply(self, x: Tensor, kernel: Tensor) -> Tensor:
        return self.ops.matmul(x, kernel)

    def apply_rows(self, x: Tensor, kernels: Tensor) -> Tensor:
        rows = self.ops.matmul(by_example(self.backend, x, kernels), kernels)
        return self.ops.reshape(rows, (-1, kernels.shape[-1]))

    def update_rows(self, a: Tensor, b: Tensor) -> Tensor:
        return self.ops.matmul(a, b)

    def branch_rows(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = self.ops.matmul(by_example(self.backend, x, a), a)
        return self.ops.reshape(self.ops.matmul(h, b), (-1, b.shape[-1]))

    def update(self, a: Tensor, b: Tensor) -> Tensor:
        return self.ops.matmul(a, b)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self.backend.factor_matmul(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return self.backend.factor_matmul(h, b)

    def plain_down(self, x: Tensor, a: Tensor) -> Tensor:
        return self.backend.narrow_matmul(x, a)

    def apply_with_gradient(
        self, x: Tensor, kernel: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        matmul, transpose = self.ops.matmul, self.ops.transpose
        return matmul(x, kernel), lambda dy: matmul(dy, transpose(kernel))

    def up_input_gradient(self, b: Tensor, dy: Tensor) -> Tensor:
        return self.backend.narrow_matmul(dy, b, transposed=True)

    def up_factor_gradient(self, h: Tensor, b: Tensor, dy: Tensor) -> Tensor:
        return self.backend.factor_gradient(h, dy, b)

    def down_factor_gradient(self, x: Tensor, a: Tensor, dh: Tensor) -> Tensor:
        return self.backend.factor_gradient(x, dh, a)


class DenseRows:
    """The input rows of a dense layer: the last axis of its input."""

    method = "call"

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.width = int(layer._kernel_variable.shape[0])

    def chunks(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """The rows in an input, a part of them at a time."""
        if x.shape[-1] != self.width:
            raise ValueError(
                f"Layer '{self.layer.name}' has a call of its own, which takes inputs of shape "
                f"{x.shape} for a kernel of {self.width} inputs, so its input rows are not "
                "known. Leave the layer out of lora_targets."
            )
        yield from split_rows(x.reshape(-1, self.width))

    def factor(self, vectors: np.ndarray) -> np.ndarray:
        """A from orthonormal columns (width, r): the same for every block."""
        return np.tile(vectors, (1, len(self.layer.lora.lora_qkv or "1")))


class DenseUpdate(LoRALayer):
    """A dense layer whose kernel has a low-rank update.

    y = activation(x (W + s A B) + bias), s = lora_alpha / lora_rank, W frozen.
    x: (..., in), W: (in, units), A: (in, lora_rank), B: (lora_rank, units). With lora_qkv and
    p of n blocks A: (in, p lora_rank), B: (p lora_rank, units / n).

    Args:
        units, activation, use_bias, ...: as in ``keras.layers.Dense``.
        {settings}

    Raises:
        ValueError, TypeError: for a setting out of its range or of the wrong type.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> layer = lora.LoRADense(10, lora_rank=4, lora_alpha=8)
        >>> layer(np.zeros((2, 3), "float32")).shape
        TensorShape([2, 10])
        >>> layer.lora.scale
        2.0
        >>> fused = lora.LoRADense(3 * 8, lora_rank=4, lora_qkv="qv")
        >>> fused(np.zeros((2, 8), "float32")).shape
        TensorShape([2, 24])
        >>> tuple(fused.kernel_lora_a.shape), tuple(fused.kernel_lora_b.shape)
        ((8, 8), (8, 8))

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1; 4.2 for adapting some of
    the projections of attention.
    """

    def call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        backend = backend_of(self)
        rank = backend.rank_of(inputs)
        known = has_keras_call(type(self)) and backend.is_dense_tensor(inputs)
        if self.merged or not known or rank is None:
            return super().call(inputs, *args, **kwargs)
        ops = backend.ops
        x = ops.cast(inputs, backend.compute_dtype(self))
        # The static last axis of x may be unknown; that of the kernel is not.
        width = self._kernel_variable.shape[0]
        rows = x if rank == 2 else ops.reshape(x, (-1, width))
        places, values = forms.places(x.shape[0], x.shape[1:-1]), mixed_batch.values_for(self)
        with self._in_turn(rows):
            if values is None:
                outputs = self._with_bias(self._adapted(rows, places))
            else:
                outputs = self._with_adapters(rows, places, values, self._with_bias)
        if rank != 2:
            outputs = ops.reshape(outputs, (*leading_shape(backend, x), outputs.shape[-1]))
        return activated(backend, self.activation, outputs)

    def _with_bias(self, rows: Tensor) -> Tensor:
        if self.bias is None:
            return rows
        backend = backend_of(self)
        # Directly after the product, so that TensorFlow fuses the two.
        return backend.add_bias(rows, backend.ops.cast(self.bias, rows.dtype))

    def _product(self, inputs: Tensor = None) -> MatrixProduct:
        return MatrixProduct(backend_of(self))

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, units = kernel_shape
        if self.lora.lora_qkv:
            rank *= len(self.lora.lora_qkv)
            units //= len(self.lora.lora_qkv_layout)
        return (inputs, rank), (rank, units)

    def _initial_factors(self, kernel: np.ndarray, rng: np.random.Generator) -> Factors:
        chosen, layout = self.lora.lora_qkv, self.lora.lora_qkv_layout
        if not chosen:
            return super()._initial_factors(kernel, rng)
        blocks = np.split(kernel, len(layout), axis=1)
        each = [self._initialized(blocks[layout.index(block)], rng) for block in chosen]
        return np.concatenate([a for a, _ in each], 1), np.concatenate([b for _, b in each], 0)

    def _side_by_side(self, ops: Any, one: tuple[Any, Any], two: tuple[Any, Any]) -> Any:
        if not self.lora.lora_qkv:
            return super()._side_by_side(ops, one, two)
        return qkv.side_by_side(ops, [one, two], len(self.lora.lora_qkv))

    def _halves(self, a: np.ndarray, b: np.ndarray) -> list[Factors]:
        if not self.lora.lora_qkv:
            return super()._halves(a, b)
        return qkv.halves(a, b, len(self.lora.lora_qkv))

    def _widen(self, ops: Any, a: Any, b: Any) -> tuple[Any, Any]:
        chosen, layout = self.lora.lora_qkv, self.lora.lora_qkv_layout
        return (a, qkv.widen(ops, b, chosen, layout)) if chosen else (a, b)

    def factors_from_torch(self, a: np.ndarray, b: np.ndarray) -> Factors:
        chosen, layout = self.lora.lora_qkv, self.lora.lora_qkv_layout
        if not chosen:
            return a.T, b.T
        if not qkv.moves_only(b.T, chosen, layout):
            raise ValueError(
                f"changes more than the blocks {chosen!r} of {layout!r}, which the layer "
                "adapts separately"
            )
        return a.T, qkv.narrow(b.T, chosen, layout)

    @classmethod
    def _qkv_refusal(cls, layer: Layer, settings: LayerSettings) -> str | None:
        count = len(settings.lora_qkv_layout)
        if layer.units % count == 0:
            return None
        return (
            f"its {layer.units} units are not {count} blocks of equal width "
            f"({', '.join(settings.lora_qkv_layout)})"
        )

    def _input_rows(self) -> InputRows | None:
        return DenseRows(self)

    def _probe_shape(self) -> tuple[int, ...]:
        return (1, self._kernel_variable.shape[0])
