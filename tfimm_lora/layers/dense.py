"""``LoRADense``: a dense layer with a low-rank update of its kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.initializers.from_kernel import initial_factors
from tfimm_lora.layers import forms
from tfimm_lora.layers.base import LayerSettings, LoRALayer, has_keras_call
from tfimm_lora.layers.products import Product, leading_shape
from tfimm_lora.layers.qkv import PartsOfMatrix


class MatrixProduct:
    """x W for x of shape (rows, in) and W of shape (in, out); A (in, r), B (r, out)."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.ops = backend, backend.ops

    def apply(self, x: Any, kernel: Any) -> Any:
        return self.ops.matmul(x, kernel)

    def apply_and_back(self, x: Any, kernel: Any) -> tuple[Any, Any]:
        return self.apply(x, kernel), lambda dy: self.input_gradient(kernel, dy)

    def input_gradient(self, kernel: Any, dy: Any) -> Any:
        """The gradient by x of ``apply``."""
        return self.ops.matmul(dy, self.ops.transpose(kernel))

    def kernel_gradient(self, x: Any, kernel: Any, dy: Any) -> Any:
        matmul, transpose = self.ops.matmul, self.ops.transpose
        if kernel.shape[-1] < kernel.shape[0]:
            # The same numbers with the long axis last: up to three times as fast where the
            # other one is a rank.
            return transpose(matmul(transpose(dy), x))
        return matmul(transpose(x), dy)

    def update(self, a: Any, b: Any) -> Any:
        return self.apply(a, b)

    def update_gradients(self, a: Any, b: Any, dw: Any) -> tuple[Any, Any]:
        return self.input_gradient(b, dw), self.kernel_gradient(a, b, dw)

    def down(self, x: Any, a: Any) -> Any:
        return self.backend.narrow_matmul(x, a)

    def down_input_gradient(self, x: Any, a: Any, dh: Any) -> Any:
        return self.input_gradient(a, dh)

    def down_factor_gradient(self, x: Any, a: Any, dh: Any) -> Any:
        return self.kernel_gradient(x, a, dh)

    def up(self, h: Any, b: Any) -> Any:
        return self.apply(h, b)

    def up_input_gradient(self, b: Any, dy: Any) -> Any:
        return self.backend.narrow_matmul(dy, b, transposed=True)

    def up_factor_gradient(self, h: Any, b: Any, dy: Any) -> Any:
        return self.kernel_gradient(h, b, dy)


class DenseUpdate(LoRALayer):
    """A dense layer whose kernel has a low-rank update.

    y = activation(x (W + s A B) + bias), s = lora_alpha / lora_rank, W frozen.
    x: (..., in), W: (in, units), A: (in, lora_rank), B: (lora_rank, units).

    Args:
        units, activation, use_bias, ...: as in ``keras.layers.Dense``.
        lora_rank: Rank of the update, a positive integer. Default 4.
        lora_alpha: Numerator of the scale s; None (default) for a scale of 1.
        lora_use_rslora: Whether s is lora_alpha / sqrt(lora_rank). Default False.
        lora_use_dora: Whether the norms |W + s A B| of the columns are variables of their
            own, m: y = x m (W + s A B) / |W + s A B| + bias (DoRA). Default False.
        lora_bias: Whether the branch has a bias c, added as s c. Default False.
        lora_dropout: Rate in [0, 1) of dropout on the branch's input. Default 0.
        lora_init: How A and B start: "default", "gaussian", "orthogonal", "pissa",
            "pissa_niter_4", "olora"; see ``LoRAConfig``.
        lora_freeze_a: Whether B alone is trained (LoRA-FA). Default False.
        lora_initializer: Initializer of A. None (default): uniform, +-1/sqrt(in).
        lora_regularizer: Regularizer of A and of B. Default none.
        lora_train_bias: Whether the bias is trained too. Default False.
        lora_qkv: Of a fused projection of attention, whose kernel is made of n blocks of
            columns of equal width, the parts to adapt, letters of "qkv", for example "qv".
            Each has factors of its own, of rank lora_rank; they are kept stacked: with p
            parts A: (in, p lora_rank), B: (p lora_rank, units / n). None (default) adapts
            the kernel as one.
        lora_qkv_layout: The parts of the kernel, in their order. Default "qkv".

    Raises:
        ValueError, TypeError: for an argument out of range or of the wrong type.

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

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        backend = backend_of(self)
        rank = backend.rank_of(inputs)
        known = has_keras_call(type(self)) and backend.is_dense_tensor(inputs)
        if self.merged or not known or rank is None:
            return super().call(inputs, *args, **kwargs)
        ops = backend.ops
        x = ops.cast(inputs, backend.compute_dtype(self))
        # The static last axis of x may be unknown; that of the kernel is not.
        width, units = self._kernel_variable.shape
        rows = x if rank == 2 else ops.reshape(x, (-1, width))
        outputs = self._adapted(rows, forms.places(x.shape[0], x.shape[1:-1]))
        if self.bias is not None:
            # Right after the product, which TensorFlow then makes one operation of the two.
            outputs = backend.add_bias(outputs, ops.cast(self.bias, outputs.dtype))
        if rank != 2:
            lead = leading_shape(ops.shape(x), x.shape)
            outputs = ops.reshape(outputs, (*lead, units))
        return outputs if self.activation is None else self.activation(outputs)

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, units = kernel_shape
        if self.lora.qkv:
            rank *= len(self.lora.qkv)
            units //= len(self.lora.qkv_layout)
        return (inputs, rank), (rank, units)

    def _started(
        self, kernel: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        settings = self.lora
        if not settings.qkv:
            return super()._started(kernel, rng)
        blocks = np.split(kernel, len(settings.qkv_layout), axis=1)
        each = [
            initial_factors(
                settings.init,
                blocks[settings.qkv_layout.index(part)],
                settings.rank,
                settings.scale,
                rng,
            )
            for part in settings.qkv
        ]
        return np.concatenate([x.a for x in each], 1), np.concatenate([x.b for x in each], 0)

    def _side_by_side(
        self, ops: Any, one: tuple[Any, Any], two: tuple[Any, Any]
    ) -> tuple[Any, Any]:
        if not self.lora.qkv:
            return super()._side_by_side(ops, one, two)
        # The columns of A and the rows of B go by parts.
        parts, rank = len(self.lora.qkv), self.lora.rank
        a = [ops.reshape(x, (-1, parts, rank)) for x, _ in (one, two)]
        b = [ops.reshape(y, (parts, rank, -1)) for _, y in (one, two)]
        return (
            ops.reshape(ops.concatenate(a, axis=2), (-1, 2 * parts * rank)),
            ops.reshape(ops.concatenate(b, axis=1), (2 * parts * rank, -1)),
        )

    def _apart(
        self, ops: Any, both: tuple[Any, Any]
    ) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        if not self.lora.qkv:
            return super()._apart(ops, both)
        parts, rank = len(self.lora.qkv), self.lora.rank
        a = ops.split(ops.reshape(both[0], (-1, parts, 2 * rank)), 2, axis=2)
        b = ops.split(ops.reshape(both[1], (parts, 2 * rank, -1)), 2, axis=1)
        a = [ops.reshape(x, (-1, parts * rank)) for x in a]
        b = [ops.reshape(x, (parts * rank, -1)) for x in b]
        return (a[0], b[0]), (a[1], b[1])

    @classmethod
    def _parts_refusal(cls, layer: Any, settings: LayerSettings) -> str | None:
        count = len(settings.qkv_layout)
        if layer.units % count == 0:
            return None
        return (
            f"its {layer.units} units are not {count} parts of equal width "
            f"({', '.join(settings.qkv_layout)})"
        )

    def _product(self, inputs: Any = None) -> Product:
        product = MatrixProduct(backend_of(self))
        if not self.lora.qkv:
            return product
        return PartsOfMatrix(product, self.lora.qkv, self.lora.qkv_layout)

    def _plain_product(self, inputs: Any = None) -> Product:
        return MatrixProduct(backend_of(self))

    def _probe_shape(self) -> tuple[int, ...]:
        return (1, self._kernel_variable.shape[0])
