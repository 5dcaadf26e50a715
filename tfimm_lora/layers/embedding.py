"""``LoRAEmbedding``: an embedding table with a low-rank update."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.layers import mixed_batch
from tfimm_lora.layers.base import LoRALayer, has_keras_call
from tfimm_lora.layers.dense import MatrixProduct
from tfimm_lora.layers.kernel_hook import kernel_shown_as


class EmbeddingUpdate(LoRALayer):
    """An embedding whose table has a low-rank update.

    y = W[ids] + s A[ids] B, s = lora_alpha / lora_rank, W frozen.
    ids: (...), W: (input_dim, output_dim), A: (input_dim, lora_rank),
    B: (lora_rank, output_dim). Dropout, if any, is on the rows of A.

    Args:
        input_dim, output_dim, ...: as in ``keras.layers.Embedding``.
        lora_rank, lora_alpha, lora_dropout, lora_initializer, lora_regularizer,
        lora_train_bias: as in ``LoRADense``, with the same errors. The default
            initializer of A draws from N(0, 1/lora_rank): an id picks one row, so there
            is no sum over inputs to balance.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> layer = lora.LoRAEmbedding(100, 8, lora_rank=2)
        >>> layer(np.array([[1, 2, 3]])).shape
        TensorShape([1, 3, 8])

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
    """

    _kernel_role = "embedding"

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        backend = backend_of(self)
        known = has_keras_call(type(self)) and backend.is_dense_tensor(inputs)
        if self.merged or not known or getattr(self, "sparse", False):
            return super().call(inputs, *args, **kwargs)
        route = mixed_batch.current()
        with kernel_shown_as(self, lambda: self._kernel_variable):
            outputs = super(LoRALayer, self).call(inputs, *args, **kwargs)  # type: ignore[misc]
        if route is not None:
            return outputs + backend.ops.cast(self._routed(inputs, route), outputs.dtype)
        a, b = self._factors()
        rows = backend.ops.take(a, backend.ops.cast(inputs, "int32"), axis=0)
        if self.lora.dropout:
            rows = self.lora_branch_dropout(rows)
        branch = backend.ops.matmul(rows, self.lora.scale * b)
        return self._finished(outputs + backend.ops.cast(branch, outputs.dtype))

    def _routed(self, inputs: Any, route: mixed_batch.Route) -> Any:
        """The branch for adapters chosen by example."""
        backend = backend_of(self)
        route.used.add(id(self))
        attached = mixed_batch.attached_to(self)
        route.ids(attached.names)
        if not len(attached.members):
            return 0
        rows = backend.ops.take(attached.a, backend.ops.cast(inputs, "int32"), axis=0)
        return backend.ops.matmul(
            mixed_batch.masked(backend, rows, attached, route), attached.b
        )

    def _shown_kernel(self) -> Any:
        if self.merged:
            return self._kernel_variable
        # Keras casts the rows it has looked up, not the table.
        backend = backend_of(self)
        dtype = backend.dtype_of(backend.full_precision(self._kernel_variable))
        return backend.ops.cast(self._effective_kernel(), dtype)

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ids, width = kernel_shape
        return (ids, rank), (rank, width)

    def _default_initializer(self) -> Any:
        return backend_of(self).keras.initializers.VarianceScaling(
            scale=1.0, mode="fan_out", distribution="untruncated_normal"
        )

    def _product(self, inputs: Any = None) -> MatrixProduct:
        return MatrixProduct(backend_of(self))
