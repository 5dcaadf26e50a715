"""Every kind of layer in a mixed batch: each example is what NumPy gives for its adapter."""

import dataclasses

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import reference
from tests.helpers.kerases import BACKEND, LEGACY, array, keras
from tests.helpers.layer_cases import CASES, Case
from tests.helpers.layer_contracts import CLOSE
from tfimm_lora.adapters.torch_layout import update_of

layers = keras.layers

#: The adapters of a batch of six examples: several, two of them twice, and none.
NAMES = ["low", None, "high", "variant", "low", "high"]


class Plus(layers.Layer):
    """Adds a weight that is zero, so that the layer before it is not taken for a classifier."""

    def build(self, shape):
        self.zero = self.add_weight(name="zero", shape=(), initializer="zeros")
        super().build(shape)

    def call(self, x):
        return x + self.zero


def model_of(case, base):
    kind = dict(dtype="int32") if case.integers else {}
    entry = keras.Input(case.input_shape[1:], **kind)
    return keras.Model(entry, Plus(name="plus")(base(entry)))


def batch_of(case):
    shape = (len(NAMES), *case.input_shape[1:])
    return dataclasses.replace(case, input_shape=shape).inputs(seed=1)


def leaf(variable):
    return variable.name.partition(":")[0].rpartition("/")[2]


def adapted(case, base, seed):
    """A LoRA layer with the weights of a base layer and random factors."""
    layer, weights = case.make(), {leaf(w): array(w) for w in base.weights}
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        own = leaf(variable)
        noise = 0.5 * rng.normal(size=tuple(variable.shape))
        variable.assign(weights.get(own, noise))
    return layer


def channels_first(case):
    """A case with its channels first."""

    def moved(x, k):
        return np.moveaxis(case.product(np.moveaxis(x, 1, -1), k), -1, 1)

    return dataclasses.replace(
        case,
        name=f"{case.name}_channels_first",
        args={**case.args, "data_format": "channels_first", "use_bias": False},
        input_shape=(case.input_shape[0], case.input_shape[-1], *case.input_shape[1:-1]),
        product=moved,
    )


def padded_cases():
    """tfimm's convolutions, which add the zeros of torch before those of Keras."""
    from tfimm.layers.conv import PadConv2D, PadDepthwiseConv2D

    both = dict(kernel_size=3, strides=2, padding="symmetric")
    return [
        Case(
            "tfimm_conv",
            lora.lora_class(PadConv2D),
            PadConv2D,
            dict(filters=5, **both),
            (2, 6, 6, 3),
            lambda x, k: reference.convolution(x, k, (2, 2), (1, 1), (1, 1)),
        ),
        Case(
            "tfimm_depthwise",
            lora.lora_class(PadDepthwiseConv2D),
            PadDepthwiseConv2D,
            dict(depth_multiplier=2, activation="relu", **both),
            (2, 6, 6, 3),
            lambda x, k: reference.depthwise(x, k, (2, 2), (1, 1), (1, 1)),
            reference.depthwise_update,
            summed=(0, 1),
            drops=False,
            activation=lambda y: np.maximum(y, 0),
        ),
    ]


OF_CONVOLUTIONS = ("conv2d_same_strided", "conv2d_dilated", "conv2d_1x1_relu", "depthwise")
MORE = padded_cases() if LEGACY else []
if BACKEND in ("jax", "torch"):  # TensorFlow has no such convolutions on the CPU
    MORE += [channels_first(case) for case in CASES if case.name in OF_CONVOLUTIONS]


@pytest.mark.backends
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
def test_each_example_is_what_numpy_gives_for_its_adapter(case):
    base = case.make_base()
    model, x = model_of(case, base), batch_of(case)
    extra = dict(lora_bias=True) if case.has_bias and case.drops else dict(lora_use_dora=True)
    variants = {
        "low": case,
        "high": dataclasses.replace(case, rank=3, alpha=-4.0),
        "variant": dataclasses.replace(case, args={**case.args, **extra}),
    }
    tuned = {n: adapted(c, base, seed) for seed, (n, c) in enumerate(variants.items())}
    adapters = {n: lora.Adapter({"layer": update_of(layer)}) for n, layer in tuned.items()}
    expected = {n: c.expected(tuned[n], x) for n, c in variants.items()}
    untouched = adapted(case, base, 0)
    untouched.kernel_lora_b.assign(0 * array(untouched.kernel_lora_b))
    expected[None] = case.expected(untouched, x)
    with lora.AdapterBank(model, adapters) as bank:
        rows = bank.predict(x, NAMES)
        same = bank.predict(x[:2], ["variant", "variant"])
    for i, name in enumerate(NAMES):
        np.testing.assert_allclose(rows[i].logits, expected[name][i], **CLOSE)
    for i in range(2):
        np.testing.assert_allclose(same[i].logits, expected["variant"][i], **CLOSE)


def test_parts_of_fused_projections_have_the_sum_of_their_ranks():
    case = next(case for case in CASES if case.name == "dense_parts_of_qkv")
    base = case.make_base()
    model = model_of(case, base)
    adapter = lora.Adapter({"layer": update_of(adapted(case, base, 1))})
    with pytest.raises(ValueError, match="layer has rank 4, more than max_rank=3"):
        lora.AdapterBank(model, {"a": adapter}, max_rank=3)
    assert "max_rank=4" in repr(lora.AdapterBank(model, {"a": adapter}))


def test_the_magnitudes_of_side_by_side_kernels_are_those_of_their_outputs():
    """An einsum with an axis in all its terms: in the order of A and B of the adapter."""
    case = next(case for case in CASES if case.name == "einsum_axis_in_all")
    case = dataclasses.replace(case, args={**case.args, "lora_use_dora": True})
    layer = case.make()
    norms = np.sqrt((case.expected_kernel(layer) ** 2).sum(1)).reshape(-1)
    np.testing.assert_allclose(np.abs(update_of(layer).magnitude), norms, rtol=1e-5)


def test_an_attribute_of_a_depthwise_convolution_that_tfimm_has_too():
    """tfimm's ``pad`` is a layer; of other classes it may be anything."""

    class Named(layers.DepthwiseConv2D):
        pad = 3

    case = next(case for case in CASES if case.name == "depthwise")
    base = Named(name="layer", **case.args)
    model, x = model_of(case, base), batch_of(case)
    tuned = adapted(case, base, 0)
    adapter = lora.Adapter({"layer": update_of(tuned)})
    with lora.AdapterBank(model, {"a": adapter}) as bank:
        rows = bank.predict(x, ["a", None] * 3)
    for i in (0, 2, 4):
        np.testing.assert_allclose(rows[i].logits, case.expected(tuned, x)[i], **CLOSE)
