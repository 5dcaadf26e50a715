"""``LoRAConv1D``, ``LoRAConv2D``, ``LoRAConv3D`` and ``LoRADepthwiseConv2D``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.layers import forms, kernel_hook, products
from tfimm_lora.layers.base import LoRALayer, has_keras_call
from tfimm_lora.layers.dense import MatrixProduct
from tfimm_lora.layers.products import leading_shape

_AXES = "abcdefg"


class ConvolutionProduct:
    """conv(x, W) without groups; W: (*size, in, out), A: (*size, in, r), B: (r, out).

    The narrow half is the same convolution with r filters, the other half is a product
    over channels. ``convolve`` is the layer's own convolution, so strides, padding,
    dilation and data format are the layer's.
    """

    def __init__(
        self, backend: Any, convolve: Callable[[Any, Any], Any], spatial: int, last: bool
    ) -> None:
        self.backend, self.ops, self.convolve, self.last = backend, backend.ops, convolve, last
        self.matrix = MatrixProduct(backend)
        self.space = _AXES[:spatial]

    def apply(self, x: Any, kernel: Any) -> Any:
        return self.convolve(x, kernel)

    def apply_and_back(self, x: Any, kernel: Any) -> tuple[Any, Any]:
        return self.backend.linear(lambda t: self.convolve(t, kernel), x)

    def kernel_gradient(self, x: Any, kernel: Any, dy: Any) -> Any:
        return self.backend.vjp(lambda t: self.convolve(x, t), kernel, dy)

    def update(self, a: Any, b: Any) -> Any:
        # As one product of matrices; with its four axes it would be a stack of small ones.
        products = self.matrix.update(self._rows(a), b)
        return self.ops.reshape(products, (*a.shape[:-1], b.shape[-1]))

    def update_gradients(self, a: Any, b: Any, dw: Any) -> tuple[Any, Any]:
        da, db = self.matrix.update_gradients(self._rows(a), b, self._rows(dw))
        return self.ops.reshape(da, a.shape), db

    def down(self, x: Any, a: Any) -> Any:
        return self.apply(x, a)

    def down_input_gradient(self, x: Any, a: Any, dh: Any) -> Any:
        return self.backend.vjp(lambda t: self.convolve(t, a), x, dh)

    def down_factor_gradient(self, x: Any, a: Any, dh: Any) -> Any:
        return self.kernel_gradient(x, a, dh)

    def up(self, h: Any, b: Any) -> Any:
        if not self.last:
            return self._einsum("nr*,ro->no*", h, b)
        return self._over_channels(lambda rows: self.matrix.up(rows, b), h, b.shape[1])

    def up_input_gradient(self, b: Any, dy: Any) -> Any:
        if not self.last:
            return self._einsum("no*,ro->nr*", dy, b)
        gradient = self.matrix.up_input_gradient
        return self._over_channels(lambda rows: gradient(b, rows), dy, b.shape[0])

    def up_factor_gradient(self, h: Any, b: Any, dy: Any) -> Any:
        if not self.last:
            return self._einsum("nr*,no*->ro", h, dy)
        return self.matrix.up_factor_gradient(self._rows(h), b, self._rows(dy))

    def _einsum(self, equation: str, x: Any, y: Any) -> Any:
        return self.ops.einsum(equation.replace("*", self.space), x, y)

    def _rows(self, x: Any) -> Any:
        """What has its channels last as a matrix, a row for each place."""
        return self.ops.reshape(x, (-1, x.shape[-1]))

    def _over_channels(self, function: Callable[[Any], Any], x: Any, channels: int) -> Any:
        """A function of rows, over what has its channels last."""
        rows = function(self._rows(x))
        return self.ops.reshape(rows, (*leading_shape(self.ops.shape(x), x.shape), channels))


class PointwiseProduct(ConvolutionProduct):
    """A convolution with a window and strides of one and its channels last, which is a product
    of matrices. What is narrow is computed as such: several times as fast as by convolutions of
    few channels. The product itself stays the layer's own, for whatever fuses with it."""

    def kernel_gradient(self, x: Any, kernel: Any, dy: Any) -> Any:
        flat = self.matrix.kernel_gradient(self._rows(x), self._rows(kernel), self._rows(dy))
        return self.ops.reshape(flat, kernel.shape)

    def down(self, x: Any, a: Any) -> Any:
        flat = self._rows(a)
        return self._over_channels(lambda rows: self.matrix.down(rows, flat), x, a.shape[-1])

    def down_input_gradient(self, x: Any, a: Any, dh: Any) -> Any:
        flat, gradient = self._rows(a), self.matrix.down_input_gradient
        return self._over_channels(lambda rows: gradient(None, flat, rows), dh, a.shape[-2])


class ConvUpdate(LoRALayer):
    """A convolution whose kernel has a low-rank update.

    y = activation(conv(x, W + s A B) + bias), s = lora_alpha / lora_rank, W frozen.
    W: (*kernel_size, in / groups, filters), A: (*kernel_size, in / groups, lora_rank),
    B: (lora_rank, filters); (A B)[h, w, i, o] = sum over r of A[h, w, i, r] B[r, o].
    Strides, padding, dilation, groups, data format are the base layer's.

    Args:
        filters, kernel_size, strides, padding, ...: as in ``keras.layers.Conv2D`` (or
            Conv1D, Conv3D).
        lora_rank, lora_alpha, lora_dropout, lora_initializer, lora_regularizer,
        lora_train_bias: as in ``LoRADense``, with the same defaults and errors; fan_in is
            that of the kernel. With groups or with a call that changes the kernel (weight
            standardisation) lora_dropout must be 0.

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

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """Keras' convolution. Handed W + s A B itself it takes the cheap form; handed a
        kernel that was made from it (StdConv2D) it is the plain convolution."""
        frame = kernel_hook.current_frame(self)
        adapted = frame is not None and kernel is frame.effective and not self.merged
        if not adapted:
            return self._convolve(inputs, kernel)
        if self.groups > 1 or not has_keras_call(type(self), "convolution_op"):
            return self._convolve(inputs, kernel)
        assert frame is not None
        frame.reached_product = True
        return self._adapted(inputs, self._places(tuple(inputs.shape)))

    def _convolve(self, inputs: Any, kernel: Any) -> Any:
        return super().convolution_op(inputs, kernel)  # type: ignore[misc]

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *window, filters = kernel_shape
        return (*window, rank), (rank, filters)

    def _product(self, inputs: Any = None) -> ConvolutionProduct:
        last = self.data_format == "channels_last"
        pointwise = last and set((*self.kernel_size, *self.strides)) == {1}
        product = PointwiseProduct if pointwise else ConvolutionProduct
        return product(backend_of(self), self._convolve, len(self.kernel_size), last)

    def _places(self, shape: tuple[int | None, ...]) -> int:
        """The number of positions of the output for inputs of a shape, as near as is of use."""
        space = shape[1:-1] if self.data_format == "channels_last" else shape[2:]
        steps = zip(space, self.strides)
        return forms.places(shape[0], [size and -(-size // step) for size, step in steps])

    def _probe_shape(self) -> tuple[int, ...]:
        window = zip(self.kernel_size, self.dilation_rate)
        space = [1 + (size - 1) * step for size, step in window]
        channels = self._kernel_variable.shape[-2] * self.groups
        if self.data_format == "channels_last":
            return (1, *space, channels)
        return (1, channels, *space)

    @classmethod
    def _branch_refusal(cls, layer: Any) -> str | None:
        # Whether a call of its own hands the kernel on unchanged is seen when it runs.
        if layer.groups > 1:
            return "a grouped convolution has no low-rank branch to drop from or to give a bias"
        return None


class Conv1DUpdate(ConvUpdate):
    """As ``ConvUpdate``, also causal."""

    def _base_call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # Keras 3's Conv1D passes by `convolution_op`; the backend makes it go through.
        if has_keras_call(type(self)):
            return backend_of(self).conv1d_call(self, inputs, super()._base_call)
        return super()._base_call(inputs, *args, **kwargs)

    def _convolve(self, inputs: Any, kernel: Any) -> Any:
        plain = super()._convolve
        return backend_of(self).conv1d_op(self, inputs, kernel, plain)


class DepthwiseConvUpdate(LoRALayer):
    """A depthwise convolution whose kernel has a low-rank update.

    The kernel W: (kh, kw, in, depth_multiplier) is seen as a matrix of shape
    (kh * kw, in * depth_multiplier), the one low-rank form smaller than W:
    A: (kh * kw, lora_rank), B: (lora_rank, in * depth_multiplier),
    y = activation(depthwise_conv(x, W + s reshape(A B)) + bias), s = alpha / rank.

    Args:
        kernel_size, strides, padding, ...: as in ``keras.layers.DepthwiseConv2D``.
        lora_rank, lora_alpha, lora_dropout, lora_initializer, lora_regularizer,
        lora_train_bias: as in ``LoRADense``, with the same defaults and errors.

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

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        backend = backend_of(self)
        dtype = backend.compute_dtype(self)
        narrow = dtype in ("float16", "bfloat16")
        apart = self.lora.dropout or self.lora.branch_bias or narrow
        if self.merged or not apart or not has_keras_call(type(self)):
            return super().call(inputs, *args, **kwargs)
        # The update as a convolution of its own: it can be dropped from, and it is not
        # lost in the rounding of a 16-bit kernel.
        kernel = backend.ops.cast(backend.full_precision(self._kernel_variable), dtype)
        product = self._product()
        scaled = self.lora.scale * product.update(*self._factors())
        outputs = products.doubled(
            product,
            inputs,
            self.lora_branch_dropout(inputs) if self.lora.dropout else inputs,
            backend.ops.stop_gradient(kernel),
            backend.ops.cast(scaled, dtype),
        )
        outputs = self._finished(outputs)
        if self.bias is not None:
            bias = self._along_outputs(self.bias, len(outputs.shape))
            outputs = outputs + backend.ops.cast(bias, dtype)
        return outputs if self.activation is None else self.activation(outputs)

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *window, channels, multiplier = kernel_shape
        return (math.prod(window), rank), (rank, channels * multiplier)

    def _summed_axes(self) -> tuple[int, ...]:
        return (0, 1)

    def _product(self, inputs: Any = None) -> Any:
        return DepthwiseProduct(self)


class DepthwiseProduct:
    """depthwise_conv(x, W), whose update cannot be split in two convolutions."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.backend = layer, backend_of(layer)

    def apply(self, x: Any, kernel: Any) -> Any:
        return self.backend.depthwise_convolution(self.layer, x, kernel)

    def update(self, a: Any, b: Any) -> Any:
        shape = tuple(self.layer._kernel_variable.shape)
        return self.backend.ops.reshape(self.backend.ops.matmul(a, b), shape)
