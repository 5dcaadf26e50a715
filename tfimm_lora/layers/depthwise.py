"""Conv2D layers with one group per input channel, computed as depthwise convolutions.

With groups = channels, output channel f of a grouped convolution depends on input channel
f // m alone, m = filters / channels. This is the depthwise convolution whose kernel is W, of
shape (kh, kw, 1, channels m), in the shape (kh, kw, channels, m). On the CPU, TensorFlow has no
routine for grouped convolutions, so Keras compiles each with XLA. The routine for depthwise
convolutions takes at most 0.75 of the time for every size and dtype that was measured
(``benchmarks/depthwise.py``).
"""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Tensor
from tfimm_lora.layers.state import original_class


class DepthwiseRoutine:
    """Mixin for Conv2D: with one group per channel, TensorFlow's routine on the CPU."""

    groups: int
    strides: tuple[int, ...]
    dilation_rate: tuple[int, ...]
    padding: str
    data_format: str

    def convolution_op(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        outputs = self._depthwise(inputs, kernel)
        if outputs is not None:
            return outputs
        return super().convolution_op(inputs, kernel)  # type: ignore[misc]

    def _jit_compiled_convolution_op(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """Legacy Keras calls this instead of ``convolution_op`` if there are groups."""
        outputs = self._depthwise(inputs, kernel)
        if outputs is not None:
            return outputs
        return super()._jit_compiled_convolution_op(inputs, kernel)  # type: ignore[misc]

    def _depthwise(self, inputs: Tensor, kernel: Tensor) -> Tensor | None:
        """The convolution, or None if TensorFlow's routine cannot compute it."""
        per_channel = self.groups > 1 and kernel.shape[-2] == 1
        # The routine has one stride for both axes. Keras refuses strides with dilation.
        if not per_channel or len(set(self.strides)) > 1 or self.data_format != "channels_last":
            return None
        backend = backend_of(self)
        if backend.rank_of(inputs) != 4 or not backend.is_tensorflow_on_cpu():
            return None
        if not _computes_as_conv2d(original_class(type(self))):
            return None
        # Keras raises an error if the input is too small for the window; the routine does not
        # on every processor.
        spans = [(k - 1) * d + 1 for k, d in zip(kernel.shape, self.dilation_rate)]
        sizes = zip(inputs.shape[1:3], spans)
        if self.padding == "valid" and any(size is not None and size < n for size, n in sizes):
            return None
        kernel = backend.ops.reshape(kernel, (*kernel.shape[:2], self.groups, -1))
        return backend.depthwise_convolution(self, inputs, kernel)


def depthwise_mixins(cls: type) -> tuple[type, ...]:
    """The mixin, as the base classes of a converted class, if it may apply to ``cls``."""
    return (DepthwiseRoutine,) if _computes_as_conv2d(cls) else ()


def _computes_as_conv2d(cls: Any) -> bool:
    """Whether a class is Conv2D, or a subclass that computes what Conv2D does."""
    conv = backend_of(cls).keras.layers.Conv2D
    own = [getattr(cls, n, None) is not getattr(conv, n) for n in ("call", "convolution_op")]
    return issubclass(cls, conv) and not any(own)
