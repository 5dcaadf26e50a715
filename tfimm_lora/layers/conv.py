"""``LoRAConv1D``, ``LoRAConv2D``, ``LoRAConv3D`` and ``LoRADepthwiseConv2D``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer, MeshAxes, Tensor
from tfimm_lora.layers import forms, kernel_hook, mixed_batch, row_convolution
from tfimm_lora.layers.base import LoRALayer, has_keras_call
from tfimm_lora.layers.dense import MatrixProduct
from tfimm_lora.layers.forward import Factors
from tfimm_lora.layers.input_rows import InputRows, PatchRows
from tfimm_lora.layers.mixed_product import by_example, sizes
from tfimm_lora.layers.products import leading_shape
from tfimm_lora.layers.state import original_class

_AXES = "abcdefg"


class ConvolutionProduct:
    """conv(x, W) without groups; W: (*size, in, out), A: (*size, in, r), B: (r, out).

    x A is the same convolution with r filters, and h B a product over channels. The
    convolution is the layer's own, so strides, padding, dilation and data format are its.
    """

    has_cheap_rows: bool | None = False

    def __init__(self, layer: Layer) -> None:
        self.layer, self.backend = layer, backend_of(layer)
        self.ops, self.convolve = self.backend.ops, layer._convolve
        self.last = self.ends_in_units = not layer._has_channels_first
        self.matrix = MatrixProduct(self.backend)
        self.space = _AXES[: len(layer.kernel_size)]

    def apply(self, x: Tensor, kernel: Tensor) -> Tensor:
        return self.convolve(x, kernel)

    def apply_rows(self, x: Tensor, kernels: Tensor) -> Tensor:
        return row_convolution.apply_rows(self.layer, x, kernels)

    def branch_rows(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return row_convolution.branch_rows(self.layer, x, a, b)

    def update(self, a: Tensor, b: Tensor) -> Tensor:
        # As one product of matrices; with its four axes it would be a batch of small ones.
        update = self.matrix.update(self._rows(a), b)
        return self.ops.reshape(update, (*a.shape[:-1], b.shape[-1]))

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self.convolve(x, a)

    plain_down = down

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        if not self.last:
            return self._einsum("nr*,ro->no*", h, b)
        return self._over_channels(lambda rows: self.matrix.up(rows, b), h, b.shape[1])

    def apply_with_gradient(
        self, x: Tensor, kernel: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.backend.linear(lambda t: self.convolve(t, kernel), x)

    def up_input_gradient(self, b: Tensor, dy: Tensor) -> Tensor:
        if not self.last:
            return self._einsum("no*,ro->nr*", dy, b)
        gradient = self.matrix.up_input_gradient
        return self._over_channels(lambda rows: gradient(b, rows), dy, b.shape[0])

    def up_factor_gradient(self, h: Tensor, b: Tensor, dy: Tensor) -> Tensor:
        if not self.last:
            return self._einsum("nr*,no*->ro", h, dy)
        return self.matrix.up_factor_gradient(self._rows(h), b, self._rows(dy))

    def down_factor_gradient(self, x: Tensor, a: Tensor, dh: Tensor) -> Tensor:
        return self.backend.vjp(lambda t: self.convolve(x, t), a, dh)

    def _einsum(self, equation: str, x: Tensor, y: Tensor) -> Tensor:
        return self.ops.einsum(equation.replace("*", self.space), x, y)

    def _rows(self, x: Tensor, channels: int | None = None) -> Tensor:
        """A tensor with its channels last as a matrix, with a row for each place."""
        return self.ops.reshape(x, (-1, channels or x.shape[-1]))

    def _over_channels(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        channels: int,
        given: int | None = None,
    ) -> Tensor:
        """Apply a function of rows to a tensor with its channels last. If their number is
        unknown, as in pictures that were decoded in a graph, it must be given."""
        rows = function(self._rows(x, given))
        return self.ops.reshape(rows, (*leading_shape(self.backend, x), channels))


class PointwiseProduct(ConvolutionProduct):
    """A convolution with a window and strides of one and its channels last: a matrix product.

    The narrow products are computed as such, several times as fast as by convolutions with few
    channels. The full product stays the layer's own convolution, so that TensorFlow fuses it
    with what follows.
    """

    has_cheap_rows = None

    def apply_rows(self, x: Tensor, kernels: Tensor) -> Tensor:
        flat = self._without_window(kernels)
        shape = (*leading_shape(self.backend, x), kernels.shape[-1])
        rows = self.ops.matmul(self._rows_of_examples(x, flat), flat)
        return self.ops.reshape(rows, shape)

    def update_rows(self, a: Tensor, b: Tensor) -> Tensor:
        update = self.ops.matmul(self._without_window(a), b)
        return self.ops.reshape(update, (-1, *a.shape[1:-1], b.shape[-1]))

    def branch_rows(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        flat = self._without_window(a)
        h = self.ops.matmul(self._rows_of_examples(x, flat), flat)
        shape = (*leading_shape(self.backend, x), b.shape[-1])
        return self.ops.reshape(self.ops.matmul(h, b), shape)

    def _without_window(self, kernels: Tensor) -> Tensor:
        """(examples, 1, ..., in, out) as (examples, in, out)."""
        return self.ops.reshape(kernels, (-1, *kernels.shape[-2:]))

    def _rows_of_examples(self, x: Tensor, kernels: Tensor) -> Tensor:
        """The places of each example as rows: (examples, places, in)."""
        grouped = by_example(self.backend, x, kernels)
        examples = sizes(self.backend, grouped)[0]
        return self.ops.reshape(grouped, (examples, -1, kernels.shape[-2]))

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self._down(self.matrix.down, x, a)

    def plain_down(self, x: Tensor, a: Tensor) -> Tensor:
        return self._down(self.matrix.plain_down, x, a)

    def _down(self, matmul: Callable[[Tensor, Tensor], Tensor], x: Tensor, a: Tensor) -> Tensor:
        flat, (channels, rank) = self._rows(a), a.shape[-2:]
        return self._over_channels(lambda rows: matmul(rows, flat), x, rank, channels)

    def down_factor_gradient(self, x: Tensor, a: Tensor, dh: Tensor) -> Tensor:
        flat = self.backend.factor_gradient(self._rows(x, a.shape[-2]), self._rows(dh), a)
        return self.ops.reshape(flat, a.shape)


#: Its call pads the inputs and gives them to that of Keras. It never touches the kernel.
_PADDING = "tfimm.layers.conv.PadConv2D"
_PADDING_DEPTHWISE = "tfimm.layers.conv.PadDepthwiseConv2D"


class ConvUpdate(LoRALayer):
    """A convolution whose kernel has a low-rank update.

    y = activation(conv(x, W + s A B) + bias), s = lora_alpha / lora_rank, W frozen.
    W: (*kernel_size, in / groups, filters), A: (*kernel_size, in / groups, lora_rank),
    B: (lora_rank, filters); (A B)[h, w, i, o] = sum over r of A[h, w, i, r] B[r, o].
    Strides, padding, dilation, groups and data format are the base layer's.

    Args:
        filters, kernel_size, strides, padding, ...: as in ``keras.layers.Conv2D`` (or
            Conv1D, Conv3D).
        {settings}

    With groups, or in a class whose call changes the kernel (weight standardisation),
    lora_dropout must be 0 and lora_bias False.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> layer = lora.LoRAConv2D(6, 3, strides=2, padding="same", lora_rank=2)
        >>> layer(np.zeros((1, 8, 8, 3), "float32")).shape
        TensorShape([1, 4, 4, 6])
        >>> tuple(layer.kernel_lora_a.shape), tuple(layer.kernel_lora_b.shape)
        ((3, 3, 3, 2), (2, 6))

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1; for convolutions the form
    of torch's PEFT, whose B is a 1x1 convolution.
    """

    groups: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation_rate: tuple[int, ...]
    data_format: str

    def call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        values = mixed_batch.values_for(self)
        if values is not None and values.kernel is not None and not self.merged:
            return self._classify(inputs, values)
        known = has_keras_call(type(self), or_of=_PADDING) and has_keras_call(
            type(self), "convolution_op"
        )
        if self.merged or self.groups > 1 or not known:
            return super().call(inputs, *args, **kwargs)
        # Such a call gives the kernel attribute to ``convolution_op`` and nothing else, so W
        # itself does as the sign that the adapted product is meant.
        with kernel_hook.kernel_shown_as(self, self._kernel_variable):
            return self._base_call(inputs, *args, **kwargs)

    def convolution_op(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """Keras' convolution. Within a call, and given the kernel that the call is shown, it is
        the adapted product; with a kernel made from that (StdConv2D) the plain convolution."""
        running = kernel_hook.running_call(self)
        if running is None or kernel is not running.kernel or self.merged:
            return self._convolve(inputs, kernel)
        values = mixed_batch.values_for(self)
        if values is not None and has_keras_call(type(self), "convolution_op"):
            running.reached_product = True
            return self._with_adapters(inputs, self._places(tuple(inputs.shape)), values)
        if self.groups > 1 or not has_keras_call(type(self), "convolution_op"):
            return self._convolve(inputs, kernel)
        running.reached_product = True
        if kernel is not self._kernel_variable and self._uses_shown_kernel(kernel):
            return self._convolve(inputs, kernel)
        return self._adapted(inputs, self._places(tuple(inputs.shape)))

    def _uses_shown_kernel(self, kernel: Tensor) -> bool:
        """Whether the effective kernel, which the call of a subclass was given, is used rather
        than the other forms of the product. In a graph they are cheaper, and the kernel, which
        is not used then, is not computed."""
        backend, settings = backend_of(self), self.lora
        branch = settings.lora_dropout or settings.lora_bias or mixed_batch.current()
        return backend.runs_eagerly() and not branch and backend.dtype_of(kernel) == "float32"

    def _jit_compiled_convolution_op(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """Legacy Keras calls this instead of ``convolution_op`` if there are groups."""
        running = kernel_hook.running_call(self)
        if running is not None and mixed_batch.values_for(self) is not None:
            return self.convolution_op(inputs, running.kernel)
        return super()._jit_compiled_convolution_op(inputs, kernel)  # type: ignore[misc]

    def _convolve(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        base: Any = super()
        in_groups = self.groups > 1 and mixed_batch.values_for(self) is not None
        if in_groups and hasattr(original_class(type(self)), "_jit_compiled_convolution_op"):
            with mixed_batch.using(None):  # it calls convolution_op
                return base._jit_compiled_convolution_op(inputs, kernel)
        return base.convolution_op(inputs, kernel)

    def _classify(self, inputs: Tensor, values: mixed_batch.RowValues) -> Tensor:
        """A classifier with the number of classes of the adapters, and not that of its own."""
        outputs = self._with_adapters(inputs, self._places(tuple(inputs.shape)), values)
        return outputs if self.activation is None else self.activation(outputs)

    @property
    def _splits(self) -> bool:
        return self.groups == 1

    def mixed_batch_refusal(self) -> str | None:
        if self._lora_state.kernel_transformed:
            return "standardises its kernel, so that its product is not linear in it"
        return super().mixed_batch_refusal()

    def _computes_mixed_batches(self) -> bool:
        return has_keras_call(type(self), "convolution_op")

    def _product(self, inputs: Tensor = None) -> ConvolutionProduct:
        last = not self._has_channels_first
        pointwise = last and set((*self.kernel_size, *self.strides)) == {1}
        pointwise = pointwise and self.groups == 1
        return (PointwiseProduct if pointwise else ConvolutionProduct)(self)

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *window, filters = kernel_shape
        return (*window, rank), (rank, filters)

    def _places(self, shape: tuple[int | None, ...]) -> int:
        """The number of positions of the output for inputs of a shape, approximately."""
        space = shape[2:] if self._has_channels_first else shape[1:-1]
        steps = zip(space, self.strides)
        return forms.places(shape[0], [size and -(-size // step) for size, step in steps])

    def _input_rows(self) -> InputRows | None:
        return PatchRows(self) if self.groups == 1 else None

    def _probe_shape(self) -> tuple[int, ...]:
        window = zip(self.kernel_size, self.dilation_rate)
        space = [1 + (size - 1) * step for size, step in window]
        channels = self._kernel_variable.shape[-2] * self.groups
        return (1, channels, *space) if self._has_channels_first else (1, *space, channels)

    @classmethod
    def _branch_refusal(cls, layer: Layer) -> str | None:
        # Whether a call of its own changes the kernel shows when it runs.
        if layer.groups > 1:
            return "a grouped convolution has no low-rank branch for dropout or a bias"
        return None

    # -- the order of axes in torch ----------------------------------------------------

    @classmethod
    def torch_kernel_shape(cls, layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[-1], shape[-2], *shape[:-2])

    @classmethod
    def kernel_to_torch(cls, layer: Layer, kernel: np.ndarray) -> np.ndarray:
        return np.moveaxis(kernel, (-1, -2), (0, 1))

    @classmethod
    def update_kind(cls, layer: Layer) -> str | None:
        if layer.groups > 1:
            return "grouped"
        if isinstance(layer, LoRALayer):
            return "standardised" if layer._lora_state.kernel_transformed else "conv"
        return "conv" if has_keras_call(cls) else None

    def factors_to_torch(self, a: np.ndarray, b: np.ndarray) -> Factors:
        ones = (1,) * len(self.kernel_size)
        return np.moveaxis(a, (-1, -2), (0, 1)), b.T.reshape(*b.T.shape, *ones)

    def factors_from_torch(self, a: np.ndarray, b: np.ndarray) -> Factors:
        return np.moveaxis(a, (0, 1), (-1, -2)), b.reshape(b.shape[:2]).T


class Conv1DUpdate(ConvUpdate):
    """As ``LoRAConv2D``, also for causal padding."""

    def _base_call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Keras 3's Conv1D does not call ``convolution_op``; the backend makes it do so.
        if has_keras_call(type(self)):
            return backend_of(self).conv1d_call(self, inputs, super()._base_call)
        return super()._base_call(inputs, *args, **kwargs)

    def _convolve(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        plain = super()._convolve
        return backend_of(self).conv1d_op(self, inputs, kernel, plain)


class DepthwiseProduct:
    """depthwise_conv(x, W), whose update does not split into two narrow products."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.backend = layer, backend_of(layer)

    def apply(self, x: Tensor, kernel: Tensor) -> Tensor:
        return self.backend.depthwise_convolution(self.layer, x, kernel)

    def update(self, a: Tensor, b: Tensor) -> Tensor:
        shape = tuple(self.layer._kernel_variable.shape)
        return self.backend.ops.reshape(self.backend.ops.matmul(a, b), shape)

    has_cheap_rows = True
    ends_in_units = False

    def apply_rows(self, x: Tensor, kernels: Tensor) -> Tensor:
        return row_convolution.depthwise_rows(self.layer, x, kernels)

    def update_rows(self, a: Tensor, b: Tensor) -> Tensor:
        shape = tuple(self.layer._kernel_variable.shape)
        return self.backend.ops.reshape(self.backend.ops.matmul(a, b), (-1, *shape))

    def branch_rows(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.apply_rows(x, self.update_rows(a, b))


class DepthwiseConvUpdate(LoRALayer):
    """A depthwise convolution whose kernel has a low-rank update.

    The kernel W: (kh, kw, in, depth_multiplier) is seen as a matrix of shape
    (kh kw, in depth_multiplier), the only low-rank form that is smaller than W:
    A: (kh kw, lora_rank), B: (lora_rank, in depth_multiplier),
    y = activation(depthwise_conv(x, W + s reshape(A B)) + bias), s = alpha / rank.

    Args:
        kernel_size, strides, padding, ...: as in ``keras.layers.DepthwiseConv2D``.
        {settings}

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> layer = lora.LoRADepthwiseConv2D(3, padding="same", lora_rank=2)
        >>> layer(np.zeros((1, 8, 8, 5), "float32")).shape
        TensorShape([1, 8, 8, 5])
        >>> tuple(layer.kernel_lora_a.shape), tuple(layer.kernel_lora_b.shape)
        ((9, 2), (2, 5))

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
    """

    _kernel_role = "depthwise"
    data_format: str
    pad: Any

    def call(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        backend = backend_of(self)
        dtype, settings = backend.compute_dtype(self), self.lora
        narrow = dtype in ("float16", "bfloat16")
        values = mixed_batch.values_for(self)
        if values is not None and not self.merged and self._computes_mixed_batches():
            return self._mixed_call(inputs, values)
        separate = settings.lora_dropout or settings.lora_bias or narrow
        if self.merged or not separate or not has_keras_call(type(self)):
            return super().call(inputs, *args, **kwargs)
        # The update as a convolution of its own: its input can have dropout, and it is not
        # lost in the rounding of a 16-bit kernel.
        product = self._product()
        update = backend.ops.cast(settings.lora_scale * product.update(*self._factors()), dtype)
        kernel = backend.ops.cast(self._frozen_kernel(), dtype)
        branch = self.lora_branch_dropout(inputs) if settings.lora_dropout else inputs
        outputs = product.apply(inputs, kernel) + product.apply(branch, update)
        return self._with_bias_and_activation(self._with_dora_or_bias(outputs))

    def _mixed_call(self, inputs: Tensor, values: mixed_batch.RowValues) -> Tensor:
        """The call with the values of a source."""
        if not has_keras_call(type(self)) and self.pad is not None:  # of tfimm
            inputs = self.pad(inputs)
        return self._with_bias_and_activation(self._with_adapters(inputs, 1, values))

    def _with_bias_and_activation(self, outputs: Tensor) -> Tensor:
        if self.bias is not None:
            bias = self._along_outputs(self.bias, len(outputs.shape))
            outputs = outputs + backend_of(self).ops.cast(bias, outputs.dtype)
        return outputs if self.activation is None else self.activation(outputs)

    @property
    def _splits(self) -> bool:
        return False

    def _computes_mixed_batches(self) -> bool:
        return has_keras_call(type(self), or_of=_PADDING_DEPTHWISE)

    def _product(self, inputs: Tensor = None) -> Any:
        return DepthwiseProduct(self)

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *window, channels, multiplier = kernel_shape
        return (math.prod(window), rank), (rank, channels * multiplier)

    def _factor_axes(self, kernel_axes: MeshAxes) -> tuple[MeshAxes, MeshAxes]:
        channels = kernel_axes[2]  # of the last axis of B these are the outer ones
        return (None, None), (None, channels)

    def _summed_axes(self) -> tuple[int, ...]:
        return (0, 1)

    # -- the order of axes in torch ----------------------------------------------------

    @classmethod
    def torch_kernel_shape(cls, layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[2] * shape[3], 1, *shape[:2])

    @classmethod
    def kernel_to_torch(cls, layer: Layer, kernel: np.ndarray) -> np.ndarray:
        shape = cls.torch_kernel_shape(layer, kernel.shape)
        result: np.ndarray = kernel.transpose(2, 3, 0, 1).reshape(shape)
        return result

    @classmethod
    def update_kind(cls, layer: Layer) -> str | None:
        return "depthwise"

    def factors_to_torch(self, a: np.ndarray, b: np.ndarray) -> Factors:
        window = tuple(self._kernel_variable.shape)[:2]
        return a.T.reshape(-1, 1, *window), b.T.reshape(*b.T.shape, 1, 1)

    def factors_from_torch(self, a: np.ndarray, b: np.ndarray) -> Factors:
        return a.reshape(a.shape[0], -1).T, b.reshape(b.shape[:2]).T
