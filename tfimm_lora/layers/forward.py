"""What an adapted layer computes: its effective kernel, and its product in the fastest form.

Each kind of layer (``dense``, ``conv``, ...) adds its ``Product``, the shapes of A and B, and
how they correspond to the axes of torch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer, MeshAxes, Tensor
from tfimm_lora.config import LOHA_WEIGHT_NAMES, LORA_WEIGHT_NAMES
from tfimm_lora.initializers import from_kernel
from tfimm_lora.layers import dora, forms, loha, mixed_batch, products
from tfimm_lora.layers.input_rows import InputRows
from tfimm_lora.layers.mixed_product import mixed_product
from tfimm_lora.layers.state import AdaptedValues

#: A and B.
Factors = tuple[np.ndarray, np.ndarray]

#: From this many numbers on, a kernel is computed in turn. Smaller ones need little memory, and
#: ViT-Ti is 3 % faster if they do not wait.
IN_TURN = 2**18


class LoRAForward(AdaptedValues):
    """Mixin of ``LoRALayer``: the formulas. The kinds of layers override the first part."""

    lora_branch_dropout: Any

    # -- what each kind defines --------------------------------------------------------

    def _factor_shapes(
        self, kernel_shape: tuple[int, ...], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for a kernel of this shape."""
        raise NotImplementedError

    def _factor_axes(self, kernel_axes: MeshAxes) -> tuple[MeshAxes, MeshAxes]:
        """The axes of a device mesh of A and B: A has those of the inputs of the kernel, B that
        of its outputs."""
        *inputs, output = kernel_axes
        return (*inputs, None), (None, output)

    def _product(self, inputs: Tensor = None) -> products.Product:
        """The layer's product (on ``inputs``)."""
        raise NotImplementedError

    def _has_narrow_gradients(self, inputs: Tensor) -> bool:
        """Whether the product on ``inputs`` splits, with gradients that are products too."""
        return True

    @property
    def _splits(self) -> bool:
        """Whether the update splits the product into two narrow ones."""
        return True

    def _work(self, inputs: Tensor, places: int, rank: int) -> forms.Work:
        """The amount of work; here for a kernel of shape (*window, units)."""
        *window, units = self._kernel_variable.shape
        return forms.Work(places, math.prod(window), window[-1], units, rank)

    def _rank_axis_of_b(self) -> int:
        """The axis of B that is the rank. Of A it is the last one."""
        return 0

    def _summed_axes(self) -> tuple[int, ...]:
        """The axes of the kernel that the product sums over: all but those of the output."""
        return tuple(range(len(self._kernel_variable.shape) - 1))

    def _in_output_order(self, ops: Any, values: Any) -> Any:
        """A value for each output of the kernel, in the order of the axes of the output."""
        return values

    def output_count(self) -> int:
        """The number of outputs of the kernel at each place."""
        return math.prod(dora.shape(tuple(self._kernel_variable.shape), self._summed_axes()))

    def outputs_in_order(self, values: np.ndarray) -> np.ndarray:
        """A value for each output in the order of torch as a vector in that of the output."""
        shape = dora.shape(tuple(self._kernel_variable.shape), self._summed_axes())
        ordered = self._in_output_order(np, self.outputs_from_torch(values, shape))
        return np.asarray(ordered).reshape(-1)

    def _output_shape(self, rank: int, units: int) -> list[int]:
        """The shape in which so many values, one for each output, broadcast to outputs of a
        rank."""
        shape = [1] * rank
        shape[1 if self._has_channels_first else -1] = units
        return shape

    def _along_outputs(self, values: Tensor, rank: int) -> Tensor:
        """A value for each output, in a shape that broadcasts to outputs of a rank."""
        ops, units = backend_of(self).ops, math.prod(values.shape)
        return ops.reshape(self._in_output_order(ops, values), self._output_shape(rank, units))

    def _input_rows(self) -> InputRows | None:
        """What the layer multiplies with its kernel, as rows; None if there are no rows."""
        return None

    def _initial_factors(self, kernel: np.ndarray, rng: np.random.Generator) -> Factors:
        """A and B as ``lora_init`` says, in their shapes."""
        shape_a, shape_b = self._factor_shapes(kernel.shape, self.lora.lora_rank)
        a, b = self._initialized(kernel.reshape(-1, shape_b[-1]), rng)
        return a.reshape(shape_a), b.reshape(shape_b)

    def _side_by_side(self, ops: Any, one: tuple[Any, Any], two: tuple[Any, Any]) -> Any:
        """The factors, of both ranks together, of the sum of two updates."""
        return (
            ops.concatenate([one[0], two[0]], axis=-1),
            ops.concatenate([one[1], two[1]], axis=self._rank_axis_of_b()),
        )

    def _halves(self, a: np.ndarray, b: np.ndarray) -> list[Factors]:
        """The reverse of ``_side_by_side``, for two updates of one rank."""
        axis = self._rank_axis_of_b()
        return list(zip(np.split(a, 2, axis=-1), np.split(b, 2, axis=axis)))

    def _widen(self, ops: Any, a: Any, b: Any) -> tuple[Any, Any]:
        """A and B as the factors of an update of the whole kernel."""
        return a, b

    # -- what each kind defines: the order of axes in torch -----------------------------

    @classmethod
    def torch_kernel_shape(cls, layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in torch of the kernel, of this shape, of a layer, adapted or not."""
        return tuple(reversed(shape))

    @classmethod
    def kernel_to_torch(cls, layer: Layer, kernel: np.ndarray) -> np.ndarray:
        """The kernel of a layer, adapted or not, in the order of axes of torch."""
        result: np.ndarray = kernel.T
        return result

    @classmethod
    def update_kind(cls, layer: Layer) -> str | None:
        """The kind of update in adapter files of a layer, adapted or not. None if that shows
        only once it is adapted and called."""
        return "linear"

    def factors_to_torch(self, a: np.ndarray, b: np.ndarray) -> Factors:
        """The layer's factors (widened) as torch's A (rank, in, ...) and B (out, rank, ...)."""
        return a.T, b.T

    def factors_from_torch(self, a: np.ndarray, b: np.ndarray) -> Factors:
        """The reverse of ``factors_to_torch``.

        Raises:
            ValueError: if they are not factors of such a layer; the message says why.
        """
        return a.T, b.T

    def outputs_to_torch(self, values: np.ndarray) -> np.ndarray:
        """A value for each output of the kernel, (out,), in the order of B's first axis."""
        return values.reshape(-1)

    def outputs_from_torch(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The reverse of ``outputs_to_torch``."""
        return values.reshape(shape)

    # -- the formulas ------------------------------------------------------------------

    @property
    def _has_channels_first(self) -> bool:
        return getattr(self, "data_format", None) == "channels_first"

    def _initialized(self, matrix: np.ndarray, rng: np.random.Generator) -> Factors:
        """A and B as ``lora_init`` says, for a kernel seen as a matrix (inputs, outputs)."""
        settings = self.lora
        found = from_kernel.initial_factors(
            settings.lora_init, matrix, settings.lora_rank, settings.lora_scale, rng
        )
        return found.a, found.b

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A and B as float32 tensors, as the factors of an update of the whole kernel. With
        an initial update that is subtracted, those of A B - A0 B0; with LoHa, those of the
        LoRA that it is equal to."""
        backend = backend_of(self)
        if self.lora.lora_use_loha:
            pairs = self._loha_pairs()
            axis_of_a = len(pairs[0][0].shape) - 1
            axis_of_b, blocks = self._rank_axis_of_b(), len(self.lora.lora_qkv or "1")
            return loha.lora_factors(backend.ops, pairs, axis_of_a, axis_of_b, blocks)
        a, b = (backend.full_precision(self.__dict__[n]) for n in LORA_WEIGHT_NAMES)
        if "kernel_lora_a0" in self.__dict__:
            a0, b0 = (
                backend.ops.stop_gradient(backend.full_precision(self.__dict__[n]))
                for n in ("kernel_lora_a0", "kernel_lora_b0")
            )
            a, b = self._side_by_side(backend.ops, (a, b), (a0, -b0))
        if self.lora.lora_freeze_a:
            a = backend.ops.stop_gradient(a)
        return self._widen(backend.ops, a, b)

    def _loha_pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(A, B) and (A2, B2) as float32 tensors, as factors for the whole kernel."""
        backend = backend_of(self)
        one, two = (
            self._widen(backend.ops, *(backend.full_precision(self.__dict__[n]) for n in names))
            for names in (LORA_WEIGHT_NAMES, LOHA_WEIGHT_NAMES)
        )
        return one, two

    def _frozen_kernel(self) -> Tensor:
        """W, without a gradient, in its own dtype."""
        backend = backend_of(self)
        return backend.ops.stop_gradient(backend.full_precision(self._kernel_variable))

    def _wide_kernel(self) -> Tensor:
        """W in float32, or in its own dtype if that is wider."""
        backend, kernel = backend_of(self), self._frozen_kernel()
        narrow = backend.dtype_of(kernel) in ("float16", "bfloat16")
        return backend.ops.cast(kernel, "float32") if narrow else kernel

    def _effective_kernel(self) -> Tensor:
        """W + s A B, with DoRA rescaled to its magnitude, in the dtype of ``_wide_kernel``."""
        kernel = self._wide_kernel()
        adapted = self._kernel_before_dora(kernel)
        return adapted * self._gain(kernel, adapted) if self.lora.lora_use_dora else adapted

    def _kernel_before_dora(self, kernel: Tensor) -> Tensor:
        """W + s A B, or with LoHa W + s (A B) * (A2 B2), from W."""
        backend, scale = backend_of(self), self.lora.lora_scale
        cast, dtype = backend.ops.cast, backend.dtype_of(kernel)
        if self.lora.lora_use_loha:
            (a, b), (a2, b2) = self._loha_pairs()
            one, two = (cast(a, dtype), cast(b, dtype)), (cast(a2, dtype), cast(b2, dtype))
            return products.hadamard_kernel(self._product(), kernel, one, two, scale)
        a, b = (cast(f, dtype) for f in self._factors())
        return products.effective_kernel(self._product(), kernel, a, b, scale)

    def _gain(self, kernel: Tensor, adapted: Tensor) -> Tensor:
        """DoRA's factor for each output; see ``dora.gain``."""
        backend = backend_of(self)
        offset = backend.full_precision(self.__dict__["kernel_lora_magnitude"])
        offset = backend.ops.cast(offset, backend.dtype_of(kernel))
        return dora.gain(backend.ops, kernel, adapted, offset, self._summed_axes())

    def _in_turn(self, inputs: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Within the block, compute a large kernel no earlier than the inputs."""
        is_large = math.prod(self._kernel_variable.shape) >= IN_TURN
        return backend_of(self).after(inputs) if is_large else contextlib.nullcontext()

    def _adapted(self, inputs: Tensor, places: int) -> Tensor:
        """The product of the inputs, which have so many places, with the adapted kernel."""
        backend, settings, product = backend_of(self), self.lora, self._product(inputs)
        dtype, scale = backend.compute_dtype(self), settings.lora_scale
        kernel = backend.ops.cast(self._frozen_kernel(), dtype)
        a, b = (backend.ops.cast(factor, dtype) for factor in self._factors())
        form = self._form(inputs, places, a.shape[-1], dtype)
        if form.gradients == "whole" and settings.lora_use_loha:
            # Through the two products, whose factors are smaller than those of LoRA.
            return product.apply(inputs, self._kernel_before_dora(kernel))
        if form.product == "factored":
            branch = self.lora_branch_dropout(inputs) if settings.lora_dropout else inputs
            outputs = products.factored(product, inputs, branch, kernel, a, b, scale)
        elif form.gradients == "whole":
            outputs = products.effective(product, inputs, kernel, a, b, scale)
        else:
            train_a = not settings.lora_freeze_a
            outputs = products.effective_narrow(
                backend, product, inputs, kernel, a, b, scale, train_a
            )
        return self._with_dora_or_bias(outputs)

    def _form(self, inputs: Tensor, places: int, rank: int, dtype: str) -> forms.Form:
        """The form of the product. Dropout, and products without narrow gradients, need the
        factored one."""
        if self.lora.lora_dropout or not self._has_narrow_gradients(inputs):
            return forms.Form("factored", "narrow")
        work = self._work(inputs, places, rank)
        form = forms.choose(work, dtype in ("float16", "bfloat16"))
        if form.gradients == "whole" and self.lora.lora_freeze_a:
            return forms.Form("effective", "narrow")  # which keeps x A and not x
        return form

    def _with_adapters(
        self,
        inputs: Tensor,
        places: int,
        values: mixed_batch.RowValues,
        with_bias: Callable[[Tensor], Tensor] = lambda outputs: outputs,
    ) -> Tensor:
        """The product of the inputs, which have so many places, with the values of a source in
        place of the layer's own, and ``with_bias`` of it."""
        source = mixed_batch.current()
        uniform = source is not None and source.uniform
        work = None
        if self._splits and values.a is not None:
            examples = 1 if uniform else values.a.shape[0] or forms.UNKNOWN_BATCH
            work = self._work(inputs, places // examples, int(values.a.shape[-1]))
        return mixed_product(self, inputs, values, work, uniform, with_bias)

    def _with_dora_or_bias(self, outputs: Tensor) -> Tensor:
        """Outputs of the product times DoRA's factor, or plus the bias of the branch."""
        backend, settings = backend_of(self), self.lora
        if settings.lora_use_dora:
            kernel = self._wide_kernel()
            gain = self._gain(kernel, self._kernel_before_dora(kernel))
            narrow = backend.dtype_of(outputs) in ("float16", "bfloat16")
            factor = self._along_outputs(gain, len(outputs.shape))
            return dora.scaled(backend.ops, outputs, factor, narrow)
        if settings.lora_bias:
            shift = backend.full_precision(self.__dict__["kernel_lora_shift"])
            shift = self._along_outputs(settings.lora_scale * shift, len(outputs.shape))
            return outputs + backend.ops.cast(shift, backend.dtype_of(outputs))
        return outputs
