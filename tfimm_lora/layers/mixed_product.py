"""The product of an adapted layer in a mixed batch, where example i has factors of its own:

    y_i = g_i (x_i W) + (x_i A_i) B_i + c_i

with the scale and DoRA's factor g_i in B_i. Two forms compute it:

* *factored*: one product with W for all examples, and two narrow products for each.
* *effective*: one product for each example with its own kernel W + A_i B_i. It is used where an
  example has many more places than the kernel has inputs, as in the first stages of
  convolutional networks.

If all examples use one adapter, there is one kernel W + A B for all of them.

The first axis of x is the batch, or the batch times something (windows, positions), with what
belongs to one example side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.layers import dora, forms
from tfimm_lora.layers.mixed_batch import Normalize, RowValues, note_foldable


def mixed_product(
    layer: Layer,
    x: Tensor,
    values: RowValues,
    work: forms.Work | None,
    uniform: bool,
    with_bias: Callable[[Tensor], Tensor],
) -> Tensor:
    """The product of a layer's inputs with the values of a source, and its bias.

    Args:
        layer: The adapted layer.
        x: Its inputs.
        values: The values for the layer.
        work: The sizes of the product for one example, or if uniform for all; None if its
            update does not split into two narrow products.
        uniform: Whether all examples use one adapter.
        with_bias: Adds the bias of the layer to outputs.
    """
    backend, product = backend_of(layer), layer._product(x)
    ops, dtype = backend.ops, backend.compute_dtype(layer)
    a, b, shift, kernel = (
        None if value is None else ops.cast(value, dtype)
        for value in (values.a, values.b, values.shift, values.kernel)
    )
    narrow = dtype in ("float16", "bfloat16")
    folds = product.ends_in_units and shift is None and not uniform
    folds = folds and not backend.runs_eagerly()
    if kernel is not None:
        # A classifier; its own bias is the shift.
        outputs = (product.apply if uniform else product.apply_rows)(x, kernel)
        return outputs if shift is None else _for_outputs(layer, outputs, shift, _add, uniform)
    frozen = ops.cast(layer._frozen_kernel(), dtype)
    if a is None:
        outputs = with_bias(product.apply(x, frozen))
    elif values.gain is None and _is_effective(product, work, narrow, uniform):
        if uniform:
            outputs = with_bias(product.apply(x, frozen + product.update(a, b)))
        else:
            kernels = frozen + product.update_rows(a, b)
            outputs = with_bias(product.apply_rows(x, kernels))
            if folds:

                def scaled_kernels(gain: Tensor, normalize: Normalize) -> Tensor:
                    offset = normalize(with_bias(ops.zeros_like(gain)[None]))
                    return product.apply_rows(x, kernels * gain) + offset

                note_foldable(outputs, scaled_kernels)
    else:
        outputs = product.apply(x, frozen)
        if values.gain is not None:
            outputs = scaled_by(layer, outputs, values.gain, uniform)
        # Before the branch, so that TensorFlow fuses product and bias.
        outputs = with_bias(outputs)
        branch = _branch(product, x, a, b, layer._splits, uniform)
        if folds:
            whole, only_frozen = outputs + branch, outputs

            def scaled_branch(gain: Tensor, normalize: Normalize) -> Tensor:
                scaled = product.branch_rows(x, a, b * gain)
                return normalize(only_frozen) + scaled

            note_foldable(whole, scaled_branch)
            return whole
        outputs = outputs + branch
    return outputs if shift is None else _for_outputs(layer, outputs, shift, _add, uniform)


def scaled_by(layer: Layer, outputs: Tensor, gain: Tensor, uniform: bool) -> Tensor:
    """Outputs times DoRA's factor of the adapter of each example."""
    backend = backend_of(layer)
    narrow = backend.dtype_of(outputs) in ("float16", "bfloat16")

    def scaled(outputs: Tensor, gain: Tensor) -> Tensor:
        return dora.scaled(backend.ops, outputs, gain, narrow)

    return _for_outputs(layer, outputs, gain, scaled, uniform)


def _add(outputs: Tensor, shift: Tensor) -> Tensor:
    return outputs + shift


def _is_effective(product: Any, work: forms.Work | None, narrow: bool, uniform: bool) -> bool:
    """Whether to multiply with W + A B. In 16-bit arithmetic it would lose small updates."""
    if narrow:
        return False
    if uniform:
        return work is None or forms.choose(work, narrow).product == "effective"
    if product.has_cheap_rows is not None:
        return bool(product.has_cheap_rows)
    return work is not None and forms.is_kernel_per_example(work)


def _branch(
    product: Any, x: Tensor, a: Tensor, b: Tensor, splits: bool, uniform: bool
) -> Tensor:
    """(x A) B."""
    if not uniform:
        return product.branch_rows(x, a, b)
    if splits:
        return product.up(product.down(x, a), b)
    return product.apply(x, product.update(a, b))


def _for_outputs(
    layer: Layer,
    outputs: Tensor,
    values: Tensor,
    function: Callable[[Tensor, Tensor], Tensor],
    uniform: bool,
) -> Tensor:
    """``function(outputs, values)`` for values with one number for each output."""
    along = layer._output_shape(len(outputs.shape), values.shape[-1])
    return _by_example(backend_of(layer), outputs, values, along, function, uniform)


def shifted(
    backend: Backend, outputs: Tensor, shift: Tensor, along: list[int], uniform: bool
) -> Tensor:
    """Outputs plus the shift of each example.

    Args:
        backend: The backend.
        outputs: (examples * m, ...).
        shift: (examples, units), or (units,) if uniform.
        along: The shape in which the units broadcast to the outputs.
        uniform: Whether all examples use one adapter.
    """
    return _by_example(backend, outputs, shift, along, _add, uniform)


def _by_example(
    backend: Backend,
    outputs: Tensor,
    values: Tensor,
    along: list[int],
    function: Callable[[Tensor, Tensor], Tensor],
    uniform: bool,
) -> Tensor:
    ops, shape = backend.ops, sizes(backend, outputs)
    if uniform:
        # Without leading ones: oneDNN's layer normalization, into which TensorFlow fuses what
        # is added, takes vectors only.
        first = next((i for i, size in enumerate(along) if size != 1), 0)
        return function(outputs, ops.reshape(values, along[first:]))
    grouped = by_example(backend, outputs, values)
    return ops.reshape(function(grouped, ops.reshape(values, (-1, *along))), shape)


def sizes(backend: Backend, x: Tensor) -> list[Any]:
    """The sizes of all axes, static where they are known."""
    dynamic = backend.ops.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]


def by_example(backend: Backend, x: Tensor, rows: Tensor) -> Tensor:
    """x of shape (examples * m, ...) as (examples, m, ...).

    Args:
        backend: The backend.
        x: The tensor.
        rows: A tensor with the examples as its first axis.

    Raises:
        ValueError: If the sizes are known and do not divide.
    """
    examples, total = rows.shape[0], x.shape[0]
    if examples and total is not None and total % examples:
        raise ValueError(
            f"Received adapters for {examples} examples, but a layer whose input has {total} "
            f"rows, which is not a multiple of {examples}. A layer that mixes examples cannot "
            "have an adapter for each."
        )
    ops = backend.ops
    return ops.reshape(x, (sizes(backend, rows)[0], -1, *sizes(backend, x)[1:]))
