"""Random models with random adapters: each example is what its adapter alone gives."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.banks import assert_rows, outputs_alone, random_adapter
from tests.helpers.kerases import BACKEND, LEGACY, keras
from tests.helpers.selection import nightly_except

layers = keras.layers


class Random:
    """A random model on pictures, and random adapters for it."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        keras.utils.set_random_seed(seed)
        self.count = 0
        self.targets = []
        self.size = int(self.rng.integers(5, 9))
        self.channels = int(self.rng.integers(2, 5))
        self.model = self._model()

    def any(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def chance(self, probability):
        return self.rng.random() < probability

    def name(self, kind):
        self.count += 1
        name = f"{kind}{self.count}"
        self.targets.append(name)
        return name

    def _activation(self):
        return self.any(None, "relu", "tanh")

    def _options(self):
        return dict(activation=self._activation(), use_bias=self.chance(0.7))

    def _convolution(self, x):
        groups = self.any(1, 1, 2)
        x = self._pointwise(x, 4) if groups > 1 else x
        padding = self.any("same", "valid") if x.shape[1] > 3 else "same"
        strides = self.any(1, 1, 2, (1, 2) if groups == 1 else 1)
        dilation = self.any(1, 2) if strides == 1 and x.shape[1] > 5 else 1
        return layers.Conv2D(
            self.any(2, 4, 6),
            self.any(1, 2, 3, (1, 3)),
            strides=strides,
            padding=padding,
            dilation_rate=dilation,
            groups=groups,
            name=self.name("conv"),
            **self._options(),
        )(x)

    def _pointwise(self, x, filters):
        return layers.Conv2D(filters, 1, name=self.name("pw"), **self._options())(x)

    def _depthwise(self, x):
        return layers.DepthwiseConv2D(
            self.any(2, 3),
            strides=self.any(1, 2),
            padding="same",
            depth_multiplier=self.any(1, 2),
            name=self.name("dw"),
            **self._options(),
        )(x)

    def _norm(self, x):
        kinds = [layers.BatchNormalization, layers.LayerNormalization]
        if x.shape[-1] % 2 == 0:
            kinds.append(lambda **k: layers.GroupNormalization(2, **k))
        return self.any(*kinds)(name=f"norm{self.count}_{self.rng.integers(10**6)}")(x)

    def _dense(self, x):
        units = self.any(2, 6)
        return layers.Dense(units, name=self.name("fc"), **self._options())(x)

    def _sequence(self, x):
        x = layers.Reshape((-1, x.shape[-1]))(x)
        kind = self.any("attention", "conv1d", "einsum", "shared")
        if kind == "attention":
            self.count += 1
            name = f"mha{self.count}"
            self.targets += [f"{name}/query", f"{name}/value"]
            return layers.MultiHeadAttention(2, 3, name=name)(x, x)
        if kind == "conv1d":
            padding = self.any("same", "causal")
            name = self.name("conv1d")
            return layers.Conv1D(4, 2, padding=padding, name=name, **self._options())(x)
        equation = "abc,cd->abd" if kind == "einsum" else "abc,bcd->abd"
        shape = (None if kind == "einsum" else x.shape[1], 4)
        bias = "d" if kind == "einsum" and self.chance(0.5) else None
        name = self.name("einsum")
        return layers.EinsumDense(equation, shape, bias_axes=bias, name=name)(x)

    def _model(self):
        x = entry = keras.Input((self.size, self.size, self.channels))
        for _ in range(self.rng.integers(1, 4)):
            block = self.any(self._convolution, self._depthwise, self._norm, self._dense)
            y = block(x)
            x = layers.Add()([x, y]) if y.shape == x.shape and self.chance(0.5) else y
        if self.chance(0.5):
            x = self._sequence(x)
            x = layers.GlobalAveragePooling1D()(x)
        else:
            x = layers.GlobalAveragePooling2D()(x)
        x = self._dense(self._norm(x))
        end = self.any(None, "softmax", None)
        return keras.Model(entry, layers.Dense(3, end, name="head")(x))

    def adapter(self, seed):
        """An adapter with random layers, rank, scale and variant."""
        chosen = [name for name in self.targets if self.chance(0.7)] or self.targets[-1:]
        arguments = dict(
            lora_targets=chosen,
            lora_rank=int(self.rng.integers(1, 4)),
            lora_alpha=float(self.rng.normal()),
            lora_use_rslora=self.chance(0.3),
            lora_use_dora=self.chance(0.3),
            lora_train_bias=self.any("none", "lora_only", "all"),
            lora_train_classifier=self.chance(0.4),
        )
        return random_adapter(self.model, seed, **arguments)


SEEDS = nightly_except(range(40), (0,) if BACKEND == "tensorflow" and not LEGACY else ())


@pytest.mark.backends
@pytest.mark.parametrize("seed", SEEDS)
def test_random_models_and_adapters(seed):
    made = Random(seed)
    model, rng = made.model, made.rng
    x = rng.normal(size=(9, made.size, made.size, made.channels)).astype("float32")
    adapters = {f"a{i}": made.adapter(i) for i in range(4)}
    expected = {n: outputs_alone(model, adapters.get(n), x) for n in (*adapters, None)}
    if model.layers[-1].activation is keras.activations.softmax:
        expected = {n: np.log(y) for n, y in expected.items()}
    capacity = int(rng.integers(1, 6))
    with lora.AdapterBank(model, adapters, capacity=capacity) as bank:
        for size in (9, 4):
            names = [[*adapters, None][i] for i in rng.integers(0, 5, size)]
            assert_rows(bank.predict(x[:size], names), names, expected)
        name = made.any(*adapters)
        assert_rows(bank.predict(x, [name] * 9), [name] * 9, expected)
