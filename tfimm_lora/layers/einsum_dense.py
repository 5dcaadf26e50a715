"""``LoRAEinsumDense``: a dense layer given by an einsum equation, as in attention."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, MeshAxes, Tensor
from tfimm_lora.layers import mixed_batch
from tfimm_lora.layers.base import LoRALayer, has_keras_call
from tfimm_lora.layers.forms import Work, places
from tfimm_lora.layers.forward import Factors
from tfimm_lora.layers.input_rows import InputRows, split_rows
from tfimm_lora.layers.mixed_product import by_example, sizes


class EinsumProduct:
    """einsum("x,W->y"), split at the rank by the axes of the equation.

    Axes of W that are summed over belong to A, axes that W adds to the output to B, and axes
    that x, W and y share to both:
    "abc,cde->abde" has A "cr", B "rde", x A "abc,cr->abr", h B "abr,rde->abde".

    Args:
        ops: Array functions of a backend, or NumPy.
        equation: The equation of the layer.
        input_rank: The number of axes of x; only needed for an equation with "...".
        backend: The backend; only needed for a mixed batch.
    """

    has_cheap_rows = False
    ends_in_units = False

    def __init__(
        self,
        ops: Any,
        equation: str,
        input_rank: int | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.ops, self.equation, self.backend = ops, equation, backend
        inputs, self.kernel, outputs = _parse(equation, input_rank)
        unused = (c for c in string.ascii_letters if c not in equation + inputs)
        rank, self.example = next(unused), next(unused)
        self.shared = "".join(c for c in self.kernel if c in inputs and c in outputs)
        self.added = "".join(c for c in self.kernel if c in outputs and c not in inputs)
        self.summed = "".join(c for c in self.kernel if c not in outputs)
        self.inputs, self.outputs, self.rank = inputs, outputs, rank
        self.a = self.shared + self.summed + rank
        self.b = self.shared + rank + self.added
        self.h = "".join(c for c in outputs if c not in self.added) + rank

    def apply(self, x: Tensor, kernel: Tensor) -> Tensor:
        # The equation as given: with "..." spelled out the rounding may differ.
        return self.ops.einsum(self.equation, x, kernel)

    def update(self, a: Tensor, b: Tensor) -> Tensor:
        return self._einsum(a, self.a, b, self.b, self.kernel)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self._einsum(x, self.inputs, a, self.a, self.h)

    plain_down = down

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return self._einsum(h, self.h, b, self.b, self.outputs)

    def branch_rows(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        assert self.backend is not None
        i = self.example
        grouped = by_example(self.backend, x, a)
        h = self._einsum(grouped, i + self.inputs, a, i + self.a, i + self.h)
        y = self._einsum(h, i + self.h, b, i + self.b, i + self.outputs)
        return self.ops.reshape(y, (-1, *sizes(self.backend, y)[2:]))

    def apply_with_gradient(
        self, x: Tensor, kernel: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        def gradient(dy: Tensor) -> Tensor:
            return self._einsum(dy, self.outputs, kernel, self.kernel, self.inputs)

        return self.apply(x, kernel), gradient

    def up_input_gradient(self, b: Tensor, dy: Tensor) -> Tensor:
        return self._einsum(dy, self.outputs, b, self.b, self.h)

    def up_factor_gradient(self, h: Tensor, b: Tensor, dy: Tensor) -> Tensor:
        return self._einsum(h, self.h, dy, self.outputs, self.b)

    def down_factor_gradient(self, x: Tensor, a: Tensor, dh: Tensor) -> Tensor:
        # With the rank before the axes of x, as in ``Backend.factor_gradient``.
        turned = self.shared + self.rank + self.summed
        da = self._einsum(dh, self.h, x, self.inputs, turned)
        return self.ops.moveaxis(da, len(self.shared), -1)

    def places(self, shape: tuple[int | None, ...]) -> int:
        """How many places an input of a shape has, at each of which the sum runs once."""
        free = [size for c, size in zip(self.inputs, shape) if c not in self.kernel]
        return places(free[0], free[1:]) if free else 1

    def work(self, places: int, kernel_shape: tuple[int, ...], rank: int) -> Work:
        """The amount of work at so many places."""
        sizes = self.sizes(kernel_shape)
        window = math.prod(sizes[c] for c in self.kernel if c not in self.outputs)
        units = math.prod(sizes[c] for c in self.kernel if c not in self.inputs)
        return Work(places, window, window, units, rank)

    def sizes(self, kernel_shape: tuple[int, ...]) -> dict[str, int]:
        """The size of each axis of the kernel."""
        return dict(zip(self.kernel, kernel_shape))

    def positions(self, kernel_shape: tuple[int, ...]) -> int:
        """The number of kernels side by side: one for each position of the shared axes."""
        sizes = self.sizes(kernel_shape)
        return math.prod(sizes[c] for c in self.shared)

    def splits_cleanly(self) -> bool:
        """Whether the gradients are einsums too: no axis of x alone is summed over."""
        return all(c in self.kernel + self.outputs for c in self.inputs)

    def factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for a kernel of this shape."""
        sizes = self.sizes(kernel_shape)
        shape_a = tuple(sizes.get(c, rank) for c in self.a)
        return shape_a, tuple(sizes.get(c, rank) for c in self.b)

    def _einsum(self, x: Tensor, x_axes: str, y: Tensor, y_axes: str, out: str) -> Tensor:
        return self.ops.einsum(f"{x_axes},{y_axes}->{out}", x, y)


def _parse(equation: str, input_rank: int | None) -> tuple[str, str, str]:
    """The axes of input, kernel and output, with "..." replaced by letters.

    Without ``input_rank`` the ellipsis is left out, which is enough for the factors.
    """
    inputs, _, rest = equation.replace(" ", "").partition(",")
    kernel, _, outputs = rest.partition("->")
    named = len(inputs.replace("...", ""))
    free = [c for c in string.ascii_letters if c not in equation]
    elided = "".join(free[: 0 if input_rank is None else input_rank - named])
    return inputs.replace("...", elided), kernel, outputs.replace("...", elided)


class EinsumRows:
    """The input rows of an einsum dense layer: the axes of its input that are summed over."""

    method = "call"

    def __init__(self, layer: Layer) -> None:
        self.equation = layer.equation
        product = EinsumProduct(np, layer.equation)
        sizes = product.sizes(tuple(layer._kernel_variable.shape))
        self.shape = tuple(int(sizes[c]) for c in product.summed)
        self.width = math.prod(self.shape)

    def chunks(self, x: np.ndarray) -> Iterator[np.ndarray]:
        """The rows in an input, a part of them at a time."""
        product = EinsumProduct(np, self.equation, x.ndim)
        places = [c for c in product.inputs if c in product.outputs]
        # Axes that are in neither kernel nor output are summed first.
        axes = f"{product.inputs}->{''.join(places)}{product.summed}"
        yield from split_rows(np.einsum(axes, x).reshape(-1, self.width))

    def factor(self, vectors: np.ndarray) -> np.ndarray:
        """A from orthonormal columns (width, r)."""
        return vectors.reshape(*self.shape, vectors.shape[1])


class EinsumDenseUpdate(LoRALayer):
    """An einsum dense layer whose kernel has a low-rank update.

    y = activation(einsum(equation, x, W + s A B) + bias), s = lora_alpha / lora_rank.
    The axes of W that are summed over belong to A, those it adds to the output to B: for
    "abc,cde->abde", W: (c, d, e), A: (c, lora_rank), B: (lora_rank, d, e).

    Args:
        equation, output_shape, ...: as in ``keras.layers.EinsumDense``.
        {settings}

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> layer = lora.LoRAEinsumDense("abc,cde->abde", (None, 2, 4), lora_rank=3)
        >>> layer(np.zeros((1, 5, 6), "float32")).shape
        TensorShape([1, 5, 2, 4])
        >>> tuple(layer.kernel_lora_b.shape)
        (3, 2, 4)

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
    """

    equation: str

    def call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        backend = backend_of(self)
        known = has_keras_call(type(self)) and backend.rank_of(inputs) is not None
        if self.merged or not known:
            return super().call(inputs, *args, **kwargs)
        x = backend.ops.cast(inputs, backend.compute_dtype(self))
        places, values = self._product(x).places(tuple(x.shape)), mixed_batch.values_for(self)
        with self._in_turn(x):
            if values is None:
                outputs = self._with_bias(self._adapted(x, places))
            else:
                outputs = self._with_adapters(x, places, values, self._with_bias)
        return outputs if self.activation is None else self.activation(outputs)

    def _with_bias(self, outputs: Tensor) -> Tensor:
        if self.bias is None:
            return outputs
        return outputs + backend_of(self).ops.cast(self.bias, outputs.dtype)

    def _product(self, inputs: Tensor = None) -> EinsumProduct:
        backend = backend_of(self)
        rank = None if inputs is None else backend.rank_of(inputs)
        return EinsumProduct(backend.ops, self.equation, rank, backend)

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._product().factor_shapes(kernel_shape, rank)

    def _factor_axes(self, kernel_axes: MeshAxes) -> tuple[MeshAxes, MeshAxes]:
        product = self._product()
        axis_of = dict(zip(product.kernel, kernel_axes))
        a, b = (tuple(axis_of.get(c) for c in axes) for axes in (product.a, product.b))
        return a, b

    def _has_narrow_gradients(self, inputs: Tensor) -> bool:
        return self._product(inputs).splits_cleanly()

    def _work(self, inputs: Tensor, places: int, rank: int) -> Work:
        return self._product(inputs).work(places, tuple(self._kernel_variable.shape), rank)

    def _initial_factors(self, kernel: np.ndarray, rng: np.random.Generator) -> Factors:
        product = self._product()
        axes = f"{product.kernel}->{product.shared}{product.summed}{product.added}"
        turned = np.einsum(axes, kernel)
        inside = kernel.shape, self.lora.lora_rank
        shape_a, shape_b = product.factor_shapes(*inside)
        count = product.positions(kernel.shape)
        matrices = turned.reshape(count, math.prod(shape_a[:-1]) // count, -1)
        each = [self._initialized(matrix, rng) for matrix in matrices]
        a, b = (np.stack(factor) for factor in zip(*each))
        return a.reshape(shape_a), b.reshape(shape_b)

    def _rank_axis_of_b(self) -> int:
        return len(self._product().shared)

    def _summed_axes(self) -> tuple[int, ...]:
        product = self._product()
        return tuple(i for i, axis in enumerate(product.kernel) if axis not in product.outputs)

    def _in_output_order(self, ops: Any, values: Any) -> Any:
        product = self._product()
        kept = [axis for axis in product.kernel if axis in product.outputs]
        size_of = product.sizes(tuple(self._kernel_variable.shape))
        values = ops.reshape(values, [size_of[axis] for axis in kept])
        ordered = [axis for axis in product.outputs if axis in kept]
        return ops.einsum(f"{''.join(kept)}->{''.join(ordered)}", values)

    def _output_shape(self, rank: int, units: int) -> list[int]:
        product = self._product()
        size_of = product.sizes(tuple(self._kernel_variable.shape))
        # An ellipsis stands for axes before or among those that are named.
        outputs = self.equation.replace(" ", "").rpartition("->")[2]
        elided = rank - len(outputs.replace("...", ""))
        spelled = outputs.replace("...", "." * elided)
        return [size_of.get(c, 1) for c in spelled]

    def _input_rows(self) -> InputRows | None:
        # With shared axes there are several kernels side by side.
        return None if self._product().shared else EinsumRows(self)

    @classmethod
    def _bias_refusal(cls, layer: Layer) -> str | None:
        product = EinsumProduct(np, layer.equation)
        if product.shared:
            return "its kernel has an axis in common with its input and output, its bias not"
        if layer.bias_axes is None:
            return "it has no bias into which that of the branch could be merged"
        if "".join(c for c in product.outputs if c in layer.bias_axes) != product.added:
            return (
                f"its bias has the axes {layer.bias_axes!r}; expected the axes that the kernel "
                f"adds to the output, {product.added!r}"
            )
        return None

    @classmethod
    def _loha_refusal(cls, layer: Layer) -> str | None:
        if EinsumProduct(np, layer.equation).shared:
            return "its kernel has an axis in common with its input and output"
        return None

    # -- the order of axes in torch ----------------------------------------------------
    #
    # The axes that are summed over are "in", those that the kernel adds "out". With shared axes
    # there is a kernel for each position; their factors are written as those of one update,
    # with A stacked and B block-diagonal.

    @classmethod
    def torch_kernel_shape(cls, layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
        product = EinsumProduct(np, layer.equation)
        a, b = product.factor_shapes(shape, 1)
        return (math.prod(b), math.prod(a) // product.positions(shape))

    @classmethod
    def kernel_to_torch(cls, layer: Layer, kernel: np.ndarray) -> np.ndarray:
        product = EinsumProduct(np, layer.equation)
        axes = f"{product.kernel}->{product.shared}{product.added}{product.summed}"
        turned = np.einsum(axes, kernel)
        result: np.ndarray = turned.reshape(cls.torch_kernel_shape(layer, kernel.shape))
        return result

    @classmethod
    def kernel_from_torch(
        cls, layer: Layer, kernel: np.ndarray, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Return a kernel in Keras' order; the inverse of ``kernel_to_torch``."""
        product = EinsumProduct(np, layer.equation)
        sizes = product.sizes(shape)
        ordered = f"{product.shared}{product.added}{product.summed}"
        turned = kernel.reshape([sizes[axis] for axis in ordered])
        result: np.ndarray = np.einsum(f"{ordered}->{product.kernel}", turned)
        return result

    @classmethod
    def update_kind(cls, layer: Layer) -> str | None:
        product = EinsumProduct(np, layer.equation)
        return "batched" if product.shared else "linear"

    def factors_to_torch(self, a: np.ndarray, b: np.ndarray) -> Factors:
        count, rank = positions_of(self), a.shape[-1]
        blocks_a = a.reshape(count, -1, rank).transpose(0, 2, 1)
        blocks_b = b.reshape(count, rank, -1).transpose(0, 2, 1)
        return blocks_a.reshape(-1, blocks_a.shape[-1]), _block_diagonal(blocks_b)

    def factors_from_torch(self, a: np.ndarray, b: np.ndarray) -> Factors:
        count = positions_of(self)
        blocks_a = a.reshape(count, a.shape[0] // count, -1)
        blocks = b.reshape(count, b.shape[0] // count, count, b.shape[1] // count)
        blocks_b = blocks[np.arange(count), :, np.arange(count)]
        if not np.array_equal(_block_diagonal(blocks_b), b):
            raise ValueError("mixes positions, each of which has a kernel of its own")
        return blocks_a.transpose(0, 2, 1), blocks_b.transpose(0, 2, 1)

    def outputs_to_torch(self, values: np.ndarray) -> np.ndarray:
        kept, ordered = self._output_axes()
        result: np.ndarray = np.einsum(f"{kept}->{ordered}", values).reshape(-1)
        return result

    def outputs_from_torch(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        kept, ordered = self._output_axes()
        sizes = dict(zip(kept, shape))
        turned = values.reshape([sizes[c] for c in ordered])
        result: np.ndarray = np.einsum(f"{ordered}->{kept}", turned)
        return result

    def _output_axes(self) -> tuple[str, str]:
        """The axes of the kernel that are in the output: in its order, and in that of B."""
        product = self._product()
        ordered = product.shared + product.added
        return "".join(c for c in product.kernel if c in ordered), ordered


def positions_of(layer: Layer) -> int:
    """The number of kernels side by side in an einsum layer, adapted or not: one for each
    position of the shared axes."""
    shape = layer.__dict__[backend_of(layer).kernel_attributes["kernel"]].shape
    return EinsumProduct(np, layer.equation).positions(tuple(shape))


def _block_diagonal(blocks: np.ndarray) -> np.ndarray:
    count, out, rank = blocks.shape
    wide = np.zeros((count, out, count, rank), blocks.dtype)
    wide[np.arange(count), :, np.arange(count)] = blocks
    return wide.reshape(count * out, count * rank)
