"""``LoRAEinsumDense``: a dense layer given by an einsum equation, as in attention."""

from __future__ import annotations

import math
import string
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.initializers.from_kernel import initial_factors
from tfimm_lora.layers.base import LoRALayer, has_keras_call
from tfimm_lora.layers.forms import Work, places


class EinsumProduct:
    """einsum("x,W->y"), split at the rank by the axes of the equation.

    Axes of W that the sum runs over go to A, axes that W adds to the output go to B, and
    axes that x, W and y share go to both:
    "abc,cde->abde" gives A "cr", B "rde", down "abc,cr->abr", up "abr,rde->abde".
    """

    def __init__(self, ops: Any, equation: str, input_rank: int | None = None) -> None:
        self.ops = ops
        inputs, self.kernel, outputs = _parse(equation, input_rank)
        rank = next(c for c in string.ascii_letters if c not in equation + inputs)
        shared = [c for c in self.kernel if c in inputs and c in outputs]
        added = [c for c in self.kernel if c in outputs and c not in inputs]
        summed = [c for c in self.kernel if c not in outputs]
        self.inputs, self.outputs = inputs, outputs
        self.a = "".join(shared + summed) + rank
        self.b = "".join(shared) + rank + "".join(added)
        self.h = "".join(c for c in outputs if c not in added) + rank

    def apply(self, x: Any, kernel: Any) -> Any:
        return self._einsum(x, self.inputs, kernel, self.kernel, self.outputs)

    def apply_and_back(self, x: Any, kernel: Any) -> tuple[Any, Any]:
        def back(dy: Any) -> Any:
            return self._einsum(dy, self.outputs, kernel, self.kernel, self.inputs)

        return self.apply(x, kernel), back

    def kernel_gradient(self, x: Any, kernel: Any, dy: Any) -> Any:
        return self._einsum(x, self.inputs, dy, self.outputs, self.kernel)

    def update(self, a: Any, b: Any) -> Any:
        return self._einsum(a, self.a, b, self.b, self.kernel)

    def update_gradients(self, a: Any, b: Any, dw: Any) -> tuple[Any, Any]:
        da = self._einsum(dw, self.kernel, b, self.b, self.a)
        return da, self._einsum(a, self.a, dw, self.kernel, self.b)

    def down(self, x: Any, a: Any) -> Any:
        return self._einsum(x, self.inputs, a, self.a, self.h)

    def down_input_gradient(self, x: Any, a: Any, dh: Any) -> Any:
        return self._einsum(dh, self.h, a, self.a, self.inputs)

    def down_factor_gradient(self, x: Any, a: Any, dh: Any) -> Any:
        # With the rank before the axes of x, as in ``MatrixProduct.kernel_gradient``.
        shared, rank = len(self.b.partition(self.a[-1])[0]), self.a[-1]
        turned = self.a[:shared] + rank + self.a[shared:-1]
        da = self._einsum(dh, self.h, x, self.inputs, turned)
        return self.ops.moveaxis(da, shared, -1)

    def up(self, h: Any, b: Any) -> Any:
        return self._einsum(h, self.h, b, self.b, self.outputs)

    def up_input_gradient(self, b: Any, dy: Any) -> Any:
        return self._einsum(dy, self.outputs, b, self.b, self.h)

    def up_factor_gradient(self, h: Any, b: Any, dy: Any) -> Any:
        return self._einsum(h, self.h, dy, self.outputs, self.b)

    def places(self, shape: tuple[int | None, ...]) -> int:
        """How many places an input of a shape has, at each of which the sum runs once."""
        free = [size for c, size in zip(self.inputs, shape) if c not in self.kernel]
        return places(free[0], free[1:]) if free else 1

    def work(self, places: int, kernel_shape: tuple[int, ...], rank: int) -> Work:
        """How much there is to do at so many places."""
        sizes = dict(zip(self.kernel, kernel_shape))
        window = math.prod(sizes[c] for c in self.kernel if c not in self.outputs)
        units = math.prod(sizes[c] for c in self.kernel if c not in self.inputs)
        return Work(places, window, window, units, rank)

    def splits_cleanly(self) -> bool:
        """Whether the gradients are einsums too: no axis of x is summed by itself."""
        return all(c in self.kernel + self.outputs for c in self.inputs)

    def factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for a kernel of this shape."""
        sizes = dict(zip(self.kernel, kernel_shape))
        shape_a = tuple(sizes.get(c, rank) for c in self.a)
        return shape_a, tuple(sizes.get(c, rank) for c in self.b)

    def _einsum(self, x: Any, x_axes: str, y: Any, y_axes: str, out: str) -> Any:
        return self.ops.einsum(f"{x_axes},{y_axes}->{out}", x, y)


def _parse(equation: str, input_rank: int | None) -> tuple[str, str, str]:
    """The axes of input, kernel and output, with "..." spelled out in letters.

    Without ``input_rank`` the ellipsis is left out, which is enough for the factors.
    """
    inputs, _, rest = equation.replace(" ", "").partition(",")
    kernel, _, outputs = rest.partition("->")
    named = len(inputs.replace("...", ""))
    free = [c for c in string.ascii_letters if c not in equation]
    elided = "".join(free[: 0 if input_rank is None else input_rank - named])
    return inputs.replace("...", elided), kernel, outputs.replace("...", elided)


class EinsumDenseUpdate(LoRALayer):
    """An einsum dense layer whose kernel has a low-rank update.

    y = activation(einsum(equation, x, W + s A B) + bias), s = lora_alpha / lora_rank.
    The axes of W that are summed over belong to A, those it adds to the output to B: for
    "abc,cde->abde", W: (c, d, e), A: (c, lora_rank), B: (lora_rank, d, e).

    Args:
        equation, output_shape, ...: as in ``keras.layers.EinsumDense``.
        lora_rank, lora_alpha, lora_dropout, lora_initializer, lora_regularizer,
        lora_train_bias: as in ``LoRADense``, with the same defaults and errors.

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

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        backend = backend_of(self)
        known = has_keras_call(type(self)) and backend.rank_of(inputs) is not None
        if self.merged or not known:
            return super().call(inputs, *args, **kwargs)
        x = backend.ops.cast(inputs, backend.compute_dtype(self))
        outputs = self._adapted(x, self._product(x).places(tuple(x.shape)))
        if self.bias is not None:
            outputs = outputs + backend.ops.cast(self.bias, outputs.dtype)
        return outputs if self.activation is None else self.activation(outputs)

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._product().factor_shapes(kernel_shape, rank)

    def _splits(self, inputs: Any) -> bool:
        return self._product(inputs).splits_cleanly()

    def _work(self, inputs: Any, places: int, rank: int) -> Work:
        return self._product(inputs).work(places, self._kernel_variable.shape, rank)

    def _started(
        self, kernel: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        settings, product = self.lora, self._product()
        shapes = product.factor_shapes(kernel.shape, settings.rank)
        shared, _, added = product.b.partition(product.a[-1])
        summed = product.a[len(shared) : -1]
        turned = np.einsum(f"{product.kernel}->{shared}{summed}{added}", kernel)
        count = math.prod(shapes[0][: len(shared)])
        matrices = turned.reshape(count, math.prod(shapes[0][len(shared) : -1]), -1)
        each = [
            initial_factors(settings.init, w, settings.rank, settings.scale, rng)
            for w in matrices
        ]
        a, b = np.stack([x.a for x in each]), np.stack([x.b for x in each])
        return a.reshape(shapes[0]), b.reshape(shapes[1])

    def _rank_axis_of_b(self) -> int:
        product = self._product()
        return product.b.index(product.a[-1])

    def _summed_axes(self) -> tuple[int, ...]:
        product = self._product()
        return tuple(i for i, axis in enumerate(product.kernel) if axis not in product.outputs)

    def _along_outputs(self, values: Any, rank: int) -> Any:
        product, ops = self._product(), backend_of(self).ops
        kept = [axis for axis in product.kernel if axis in product.outputs]
        sizes = dict(zip(product.kernel, tuple(self._kernel_variable.shape)))
        values = ops.reshape(values, [sizes[axis] for axis in kept])
        ordered = [axis for axis in product.outputs if axis in kept]
        values = ops.einsum(f"{''.join(kept)}->{''.join(ordered)}", values)
        # An ellipsis stands for axes before or among those that are named.
        outputs = self.equation.replace(" ", "").rpartition("->")[2]
        elided = rank - len(outputs.replace("...", ""))
        spelled = outputs.replace("...", "." * elided)
        return ops.reshape(values, [sizes[c] if c in kept else 1 for c in spelled])

    @classmethod
    def _bias_refusal(cls, layer: Any) -> str | None:
        product = EinsumProduct(backend_of(layer).ops, layer.equation)
        added = product.b.partition(product.a[-1])[2]
        if product.b[0] != product.a[-1]:
            return "its kernel has an axis of its input and output, which its bias has not"
        if layer.bias_axes is None:
            return "it has no bias into which that of the branch could be merged"
        if "".join(c for c in product.outputs if c in layer.bias_axes) != added:
            return (
                f"its bias is along {layer.bias_axes!r}; expected the axes that the kernel "
                f"adds to the output, {added!r}"
            )
        return None

    def _product(self, inputs: Any = None) -> EinsumProduct:
        equation = self.equation
        backend = backend_of(self)
        rank = None if inputs is None else backend.rank_of(inputs)
        return EinsumProduct(backend.ops, equation, rank)
