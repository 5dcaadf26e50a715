"""One row for every kind of LoRA layer and every option that changes its product."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import tfimm_lora as lora
from tests.helpers import reference
from tests.helpers.kerases import LEGACY, array, keras, normal


@dataclass
class Case:
    """A LoRA layer, an input for it, and its product in NumPy."""

    name: str
    cls: type
    base: type
    args: dict[str, Any]
    input_shape: tuple[int, ...]
    product: Callable[[np.ndarray, np.ndarray], np.ndarray]
    update: Callable[..., np.ndarray] = reference.conv_update
    integers: int = 0
    drops: bool = True
    rank: int = 2
    alpha: float = 3.0
    activation: Callable[[np.ndarray], np.ndarray] = field(default=lambda y: y)
    #: The axes of the kernel that are summed over, where these are not all but the last.
    summed: tuple[int, ...] | None = None

    def make_base(self):
        """The layer without LoRA."""
        own = {k: v for k, v in self.args.items() if not k.startswith("lora_")}
        return self.base(name="layer", **own)

    @property
    def has_bias(self):
        """Whether the layer has a bias."""
        args = self.args
        return "bias_axes" in args or not (
            "equation" in args or "input_dim" in args or (args.get("use_bias") is False)
        )

    @property
    def lora_args(self):
        """What makes a LoRA layer of it, but for alpha."""
        own = {k: v for k, v in self.args.items() if k.startswith("lora_")}
        return {"lora_rank": self.rank, **own}

    def make(self, **kwargs):
        """The LoRA layer, built, with non-zero A and B."""
        merged = {"lora_rank": self.rank, "lora_alpha": self.alpha, **self.args, **kwargs}
        layer = self.cls(name="layer", **merged)
        layer(self.inputs())
        rng = np.random.default_rng(7)
        for variable in layer._lora_variables().values():
            value = rng.normal(size=tuple(variable.shape)).astype("float32")
            variable.assign(value * 0.5)
        if getattr(layer, "bias", None) is not None:
            layer.bias.assign(rng.normal(size=tuple(layer.bias.shape)).astype("float32"))
        return layer

    def inputs(self, seed=0):
        if self.integers:
            rng = np.random.default_rng(seed)
            return rng.integers(0, self.integers, size=self.input_shape).astype("int32")
        return normal(*self.input_shape, seed=seed)

    def expected_kernel(self, layer, a=None, b=None, norm=None):
        """W + alpha / rank * A B, in float64; A and B of the layer unless given. The variants
        of LoRA (DoRA, starts) go by the layer's other variables."""
        values = {n: x.astype("float64") for n, x in layer.lora_values().items()}
        a = values["kernel_lora_a"] if a is None else a
        b = values["kernel_lora_b"] if b is None else b
        kernel = values["kernel"]
        update = self.scaled_update(a, b, kernel.shape)
        if "kernel_lora_a2" in values:
            second = values["kernel_lora_a2"], values["kernel_lora_b2"]
            update = update * self.scaled_update(*second, kernel.shape)
            update = update * self.rank / self.alpha
        adapted = kernel + update
        if "kernel_lora_a0" in values:
            start = values["kernel_lora_a0"], values["kernel_lora_b0"]
            adapted = adapted - self.scaled_update(*start, kernel.shape)
        if "kernel_lora_magnitude" in values:
            below = self.norm(adapted) if norm is None else norm
            above = self.norm(kernel)
            above = above + values["kernel_lora_magnitude"].reshape(above.shape)
            adapted = adapted * above / below
        return adapted

    def scaled_update(self, a, b, kernel_shape):
        shape = (kernel_shape,) if self.update is reference.depthwise_update else ()
        return self.alpha / self.rank * self.update(a, b, *shape)

    def norm(self, kernel):
        """The norms over what the product sums over, one for each output."""
        axes = self.summed or tuple(range(kernel.ndim - 1))
        return np.sqrt((kernel**2).sum(axis=axes, keepdims=True))

    def expected(self, layer, x, a=None, b=None, norm=None):
        """What the layer should give, in float64; with DoRA's norm held fast, if given."""
        y = self.product(x, self.expected_kernel(layer, a, b, norm))
        if getattr(layer, "bias", None) is not None:
            values = layer.lora_values()
            bias = values.get("bias", array(layer.bias)).astype("float64")
            shift = values.get("kernel_lora_shift")
            y = y + bias + (0 if shift is None else self.alpha / self.rank * shift)
        return self.activation(y)


def _conv(padding="valid", strides=(1, 1), dilation=(1, 1), groups=1):
    return lambda x, k: reference.convolution(x, k, strides, padding, dilation, groups)


_layers = keras.layers

CASES = [
    Case(
        "dense_rows",
        lora.LoRADense,
        _layers.Dense,
        dict(units=5),
        (6, 4),
        reference.dense,
        reference.dense_update,
    ),
    Case(
        "dense_positions_tanh",
        lora.LoRADense,
        _layers.Dense,
        dict(units=5, activation="tanh"),
        (2, 3, 4),
        reference.dense,
        reference.dense_update,
        activation=np.tanh,
    ),
    Case(
        "dense_no_bias",
        lora.LoRADense,
        _layers.Dense,
        dict(units=5, use_bias=False),
        (2, 2, 3, 4),
        reference.dense,
        reference.dense_update,
    ),
    Case(
        "dense_parts_of_qkv",
        lora.LoRADense,
        _layers.Dense,
        dict(units=12, lora_qkv="qv"),
        (2, 3, 4),
        reference.dense,
        lambda a, b: reference.parts_update(a, b, [0, 2], 3),
    ),
    Case(
        "dense_part_of_kv_rows",
        lora.LoRADense,
        _layers.Dense,
        dict(units=6, lora_qkv="v", lora_qkv_layout="kv", activation="tanh"),
        (5, 4),
        reference.dense,
        lambda a, b: reference.parts_update(a, b, [1], 2),
        activation=np.tanh,
    ),
    Case(
        "conv2d_valid",
        lora.LoRAConv2D,
        _layers.Conv2D,
        dict(filters=5, kernel_size=3),
        (2, 6, 5, 3),
        _conv(),
    ),
    Case(
        "conv2d_same_strided",
        lora.LoRAConv2D,
        _layers.Conv2D,
        dict(filters=5, kernel_size=(3, 2), strides=2, padding="same"),
        (2, 6, 5, 3),
        _conv("same", (2, 2)),
    ),
    Case(
        "conv2d_dilated",
        lora.LoRAConv2D,
        _layers.Conv2D,
        dict(filters=4, kernel_size=3, dilation_rate=2, padding="same"),
        (2, 6, 6, 3),
        _conv("same", dilation=(2, 2)),
    ),
    Case(
        "conv2d_grouped",
        lora.LoRAConv2D,
        _layers.Conv2D,
        dict(filters=6, kernel_size=3, groups=3),
        (2, 5, 5, 6),
        _conv(groups=3),
        drops=False,
    ),
    Case(
        "conv2d_one_group_per_channel",
        lora.LoRAConv2D,
        _layers.Conv2D,
        dict(filters=6, kernel_size=3, groups=3),
        (2, 5, 5, 3),
        _conv(groups=3),
        drops=False,
    ),
    Case(
        "conv2d_1x1_relu",
        lora.LoRAConv2D,
        _layers.Conv2D,
        dict(filters=5, kernel_size=1, activation="relu"),
        (2, 4, 4, 3),
        _conv(),
        activation=lambda y: np.maximum(y, 0),
    ),
    Case(
        "conv1d_causal",
        lora.LoRAConv1D,
        _layers.Conv1D,
        dict(filters=5, kernel_size=3, padding="causal", dilation_rate=2),
        (2, 7, 3),
        _conv("causal", (1,), (2,)),
    ),
    Case(
        "conv1d_strided",
        lora.LoRAConv1D,
        _layers.Conv1D,
        dict(filters=5, kernel_size=3, padding="same", strides=2),
        (2, 7, 3),
        _conv("same", (2,), (1,)),
    ),
    Case(
        "conv3d",
        lora.LoRAConv3D,
        _layers.Conv3D,
        dict(filters=4, kernel_size=2, strides=2, padding="same"),
        (2, 4, 3, 4, 2),
        _conv("same", (2, 2, 2), (1, 1, 1)),
    ),
    Case(
        "depthwise",
        lora.LoRADepthwiseConv2D,
        _layers.DepthwiseConv2D,
        dict(kernel_size=3, padding="same", strides=2, depth_multiplier=2),
        (2, 6, 6, 3),
        lambda x, k: reference.depthwise(x, k, (2, 2), "same", (1, 1)),
        reference.depthwise_update,
        summed=(0, 1),
    ),
    Case(
        "einsum_heads",
        lora.LoRAEinsumDense,
        _layers.EinsumDense,
        dict(equation="abc,cde->abde", output_shape=(None, 2, 4), bias_axes="de"),
        (2, 3, 6),
        lambda x, k: np.einsum("abc,cde->abde", x, k),
        lambda a, b: np.einsum("cr,rde->cde", a, b),
        summed=(0,),
    ),
    Case(
        "einsum_two_axes_in",
        lora.LoRAEinsumDense,
        _layers.EinsumDense,
        dict(equation="abcd,cde->abe", output_shape=(None, 5), bias_axes="e"),
        (2, 3, 2, 4),
        lambda x, k: np.einsum("abcd,cde->abe", x, k),
        lambda a, b: np.einsum("cdr,re->cde", a, b),
    ),
    Case(
        "einsum_ellipsis",
        lora.LoRAEinsumDense,
        _layers.EinsumDense,
        dict(equation="...x,xy->...y", output_shape=5, activation="tanh"),
        (2, 3, 2, 4),
        lambda x, k: np.einsum("...x,xy->...y", x, k),
        reference.dense_update,
        activation=np.tanh,
    ),
    Case(
        "einsum_axis_in_all",
        lora.LoRAEinsumDense,
        _layers.EinsumDense,
        dict(equation="abc,bcd->abd", output_shape=(3, 5)),
        (2, 3, 4),
        lambda x, k: np.einsum("abc,bcd->abd", x, k),
        lambda a, b: np.einsum("bcr,brd->bcd", a, b),
        summed=(1,),
    ),
    Case(
        "embedding",
        lora.LoRAEmbedding,
        _layers.Embedding,
        dict(input_dim=9, output_dim=5),
        (3, 4),
        lambda ids, table: table[ids],
        reference.dense_update,
        integers=9,
    ),
]

if LEGACY:
    # Keras 3 refuses this equation at build.
    CASES.append(
        Case(
            "einsum_lone_sum",
            lora.LoRAEinsumDense,
            _layers.EinsumDense,
            dict(equation="abc,cd->ad", output_shape=5),
            (2, 3, 4),
            lambda x, k: np.einsum("abc,cd->ad", x, k),
            reference.dense_update,
        )
    )

IDS = [case.name for case in CASES]
