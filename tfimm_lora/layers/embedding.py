"""``LoRAEmbedding``: an embedding table with a low-rank update."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer, Tensor
from tfimm_lora.layers import mixed_batch
from tfimm_lora.layers.base import LoRALayer, has_keras_call
from tfimm_lora.layers.dense import MatrixProduct
from tfimm_lora.layers.kernel_hook import kernel_shown_as
from tfimm_lora.layers.mixed_product import by_example, scaled_by, sizes


class EmbeddingUpdate(LoRALayer):
    """An embedding whose table has a low-rank update.

    y = W[ids] + s A[ids] B, s = lora_alpha / lora_rank, W frozen.
    ids: (...), W: (input_dim, output_dim), A: (input_dim, lora_rank),
    B: (lora_rank, output_dim). Dropout, if any, is on the rows of A.

    Args:
        input_dim, output_dim, ...: as in ``keras.layers.Embedding``.
        {settings}

    The default initializer of A draws from N(0, 1/lora_rank): an id picks one row, so there
    is no sum over inputs to balance.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> layer = lora.LoRAEmbedding(100, 8, lora_rank=2)
        >>> layer(np.array([[1, 2, 3]])).shape
        TensorShape([1, 3, 8])

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
    """

    _kernel_role = "embedding"

    def call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        backend = backend_of(self)
        known = has_keras_call(type(self)) and backend.is_dense_tensor(inputs)
        if self.merged or not known or getattr(self, "sparse", False):
            return super().call(inputs, *args, **kwargs)
        with kernel_shown_as(self, self._kernel_variable):
            outputs = self._base_call(inputs, *args, **kwargs)
        values = mixed_batch.values_for(self)
        if values is not None:
            return self._with_rows_of(values, outputs, inputs)
        a, b = self._factors()
        rows = backend.ops.take(a, backend.ops.cast(inputs, "int32"), axis=0)
        if self.lora.lora_dropout:
            rows = self.lora_branch_dropout(rows)
        branch = backend.ops.matmul(rows, self.lora.lora_scale * b)
        return self._with_dora_or_bias(outputs + backend.ops.cast(branch, outputs.dtype))

    def _with_rows_of(
        self, values: mixed_batch.RowValues, outputs: Tensor, inputs: Tensor
    ) -> Tensor:
        """The output with the values of a source: g W[ids] + A[ids] B."""
        backend, source = backend_of(self), mixed_batch.current()
        ops, uniform = backend.ops, source is not None and source.uniform
        ids, a = ops.cast(inputs, "int32"), values.a
        if not uniform:
            # As ids in one table of all examples.
            count, vocabulary, rank = sizes(backend, a)
            first = ops.reshape(vocabulary * ops.arange(count), (-1, *[1] * len(ids.shape)))
            ids = by_example(backend, ids, a) + first
            a = ops.reshape(a, (-1, rank))
            rows = ops.take(a, ops.reshape(ids, (count, -1)), axis=0)
        else:
            rows = ops.take(a, ids, axis=0)
        branch = ops.matmul(rows, values.b)
        branch = ops.reshape(ops.cast(branch, outputs.dtype), sizes(backend, outputs))
        if values.gain is not None:
            outputs = scaled_by(self, outputs, values.gain, uniform)
        return outputs + branch

    def _shown_kernel(self) -> Tensor:
        if self.merged:
            return self._kernel_variable
        # Keras casts the rows that it has looked up, not the table.
        backend = backend_of(self)
        dtype = backend.dtype_of(backend.full_precision(self._kernel_variable))
        return backend.ops.cast(self._effective_kernel(), dtype)

    def _product(self, inputs: Tensor = None) -> MatrixProduct:
        return MatrixProduct(backend_of(self))

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ids, width = kernel_shape
        return (ids, rank), (rank, width)

    def _default_initializer(self) -> Any:
        return backend_of(self).keras.initializers.VarianceScaling(
            scale=1.0, mode="fan_out", distribution="untruncated_normal"
        )

    @classmethod
    def _loha_refusal(cls, layer: Layer) -> str | None:
        return "LoHa has no embeddings: a row of it would need the products of all factors"

    @classmethod
    def update_kind(cls, layer: Layer) -> str | None:
        return "embedding"
