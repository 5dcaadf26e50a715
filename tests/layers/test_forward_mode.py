"""Derivatives in forward mode, which plain models support on every backend."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, normal, run
from tests.helpers.selection import nightly_except
from tfimm_lora.layers import forms

layers = keras.layers
pytestmark = pytest.mark.backends

#: Forms of the product, of which one has gradients of its own.
FORMS = {
    "factored": forms.Form("factored", "narrow"),
    "whole": forms.Form("effective", "whole"),
    "narrow": forms.Form("effective", "narrow"),
}
KINDS = {
    "dense": (lambda: layers.Dense(5, activation="tanh", name="layer"), (6,)),
    "conv": (lambda: layers.Conv2D(5, 3, strides=2, name="layer"), (7, 7, 4)),
    "pointwise": (lambda: layers.Conv2D(5, 1, name="layer"), (4, 4, 6)),
    "grouped": (lambda: layers.Conv2D(6, 3, groups=2, name="layer"), (5, 5, 4)),
    "depthwise": (lambda: layers.DepthwiseConv2D(3, name="layer"), (5, 5, 4)),
}


def adapted(kind, monkeypatch, form="narrow", **options):
    """An adapted layer with frozen normalization behind it, in a given form, and its input."""
    make, shape = KINDS[kind]
    if kind == "grouped" and BACKEND in ("tensorflow", "torch") and LEGACY:
        pytest.skip("legacy Keras has no derivative in forward mode of grouped convolutions")
    monkeypatch.setattr(forms, "choose", lambda *args: FORMS[form])
    model = keras.Sequential(
        [
            keras.Input(shape),
            make(),
            layers.BatchNormalization(),
            layers.LayerNormalization(),
            layers.Activation("gelu"),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ]
    )
    lora.inject_lora(model, lora_rank=2, lora_targets=["layer"], **options)
    for seed, variable in enumerate(model.trainable_weights):
        variable.assign(0.3 * normal(*variable.shape, seed=seed))
    return model, normal(3, *shape, seed=7)


def forward_derivative(model, x, dx, compiled):
    """The derivative of the output in the direction dx of the input."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        x, dx = tf.constant(x), tf.constant(dx)
        call = tf.function(lambda t: model(t)) if compiled else model
        with tf.autodiff.ForwardAccumulator(x, dx) as accumulator:
            y = call(x)
        return array(accumulator.jvp(y))
    if BACKEND == "jax":
        import jax

        trained = [v.value for v in model.trainable_variables]
        others = [v.value for v in model.non_trainable_variables]
        call = lambda t: model.stateless_call(trained, others, t)[0]  # noqa: E731
        return np.asarray(jax.jvp(jax.jit(call) if compiled else call, (x,), (dx,))[1])
    import torch

    x, dx = torch.tensor(x), torch.tensor(dx)
    if not compiled:
        return array(torch.func.jvp(model, (x,), (dx,))[1].detach())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, dx)
        return array(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent.detach())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="lora"),
        pytest.param({"lora_use_dora": True}, id="dora", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("kind", nightly_except(KINDS, ["dense"] if LEGACY else KINDS))
def test_the_derivative_is_that_of_the_merged_model(kind, options, compiled, monkeypatch):
    for form in FORMS if kind in ("dense", "conv", "pointwise") else ["whole"]:
        model, x = adapted(kind, monkeypatch, form, **options)
        dx = normal(*x.shape, seed=8)
        found = forward_derivative(model, x, dx, compiled)
        regular = lora.convert_to_regular_model(model)
        np.testing.assert_allclose(run(regular, x), run(model, x), rtol=1e-4, atol=1e-5)
        # Not compiled: in a graph, TensorFlow takes that of LayerNormalization to be zero.
        expected = forward_derivative(regular, x, dx, compiled=False)
        # Float32 through some ten operations; layer normalization divides by small numbers.
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.skipif(BACKEND == "tensorflow", reason="of JAX and torch")
@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_the_gradient_of_functional_calls_is_that_of_training(kind, monkeypatch):
    model, x = adapted(kind, monkeypatch)
    trained = [v.value for v in model.trainable_variables]
    others = [v.value for v in model.non_trainable_variables]

    def loss(trained):
        return (model.stateless_call(trained, others, x)[0] ** 2).sum()

    if BACKEND == "jax":
        import jax

        found, expected = jax.jacfwd(loss)(trained), jax.grad(loss)(trained)
    else:
        import torch

        found = torch.func.grad(loss)([t.detach() for t in trained])
        expected = torch.autograd.grad((model(torch.tensor(x)) ** 2).sum(), trained)
    for one, other in zip(found, expected):
        scale = np.abs(array(other)).max()
        np.testing.assert_allclose(array(one), array(other), atol=1e-4 * scale)
