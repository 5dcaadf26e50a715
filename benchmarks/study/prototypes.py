"""Methods that the package does not have: LoKr, CoLoRA and LoRA-GA.

They change the 1x1 convolutions of a pretrained model in place. They are written to be
measured, not to be used: nothing can be saved or merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tfimm_lora as lora

import numpy as np  # isort: skip
import tensorflow as tf  # isort: skip - after tfimm_lora, which chooses legacy Keras

from tfimm_lora.model.merge import lora_layers

keras = tf.keras
#: The names of variables that are trained beside the classifier start with it.
PREFIX = "adapter"


def pointwise_layers(model: Any) -> dict[str, Any]:
    """The 1x1 convolutions, by name, as the default targets of LoRA choose them."""
    return {
        name: layer
        for name, layer in named_layers(model).items()
        if isinstance(layer, keras.layers.Conv2D) and layer.kernel_size == (1, 1)
    }


def named_layers(model: Any) -> dict[str, Any]:
    """All layers with weights of their own, by path."""
    found = {}
    for layer in model._flatten_layers():
        if layer._trainable_weights or layer._non_trainable_weights:
            path = layer.weights[0].name.split("/", 1)[1].rsplit("/", 1)[0]
            found[path] = layer
    return found


def train_only(model: Any, select: Callable[[str], bool]) -> None:
    """Freeze all variables but the classifier's (or decoder's) and those whose name ``select``
    chooses."""
    for path, layer in named_layers(model).items():
        is_head = path.split(".")[0] in ("classifier", "pixel_head")
        for variable in () if is_head else list(layer._trainable_weights):
            if not select(variable.name.split("/")[-1]):
                layer._trainable_weights.remove(variable)
                layer._non_trainable_weights.append(variable)


def freeze_statistics(model: Any) -> None:
    """Batch normalization with the statistics of the pretraining, whatever is trained."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.call = _inference_of(layer.call)


def _inference_of(call: Callable) -> Callable:
    return lambda inputs, training=None: call(inputs, training=False)


def _add_update(layer: Any, update: Callable[[], tf.Tensor]) -> None:
    """Let a 1x1 convolution compute with its kernel plus ``update()`` (inputs, outputs)."""

    def call(inputs: tf.Tensor) -> tf.Tensor:
        kernel = layer.kernel + update()[None, None]
        outputs = tf.nn.conv2d(inputs, kernel, layer.strides, "VALID")
        return tf.nn.bias_add(outputs, layer.bias) if layer.use_bias else outputs

    layer.call = call


def _weight(layer: Any, name: str, shape: tuple[int, ...], initializer: Any) -> Any:
    return layer.add_weight(f"{PREFIX}_{name}", shape, initializer=initializer)


def _prepare(model: Any) -> dict[str, Any]:
    freeze_statistics(model)
    return pointwise_layers(model)


def _finish(model: Any) -> None:
    train_only(model, lambda name: name.startswith(PREFIX))


def with_kronecker(rank: int) -> Callable:
    """LoKr: dW = C (x) (A B), the Kronecker product. arXiv:2309.14859; the start is PEFT's."""

    def prepare(model: Any, data: Any, preprocess: Any) -> None:
        def add(layer: Any) -> None:
            (inputs_1, inputs_2), (outputs_1, outputs_2) = (
                _factors(n) for n in layer.kernel.shape[2:]
            )
            c = _weight(layer, "c", (inputs_1, outputs_1), "zeros")
            if rank < max(inputs_2, outputs_2) / 2:
                a = _weight(layer, "a", (inputs_2, rank), "he_uniform")
                b = _weight(layer, "b", (rank, outputs_2), "he_uniform")
            else:
                a = _weight(layer, "a", (inputs_2, outputs_2), "he_uniform")
                b = None
            shape = (inputs_1 * inputs_2, outputs_1 * outputs_2)

            def update() -> tf.Tensor:
                small = a @ b if b is not None else a
                return tf.reshape(tf.einsum("ij,kl->ikjl", c, small), shape)

            _add_update(layer, update)

        for layer in _prepare(model).values():
            add(layer)
        _finish(model)

    return prepare


def _factors(n: int) -> tuple[int, int]:
    """n as a product of two numbers that are as close as possible, the smaller first."""
    small = max(d for d in range(1, int(n**0.5) + 1) if n % d == 0)
    return small, n // small


def with_shared_rank(rank: int) -> Callable:
    """CoLoRA for two pointwise layers of a block: half of the rank is shared by both.

    For kernels V (inputs, hidden) and W (hidden, outputs), A (inputs, r) and B (r, outputs):

        dV = A (B W^T) / k1,    dW = (V^T A) B / k2,
        k1 = (r c)^(1/4) (std(B W^T) + std(A)),    k2 = (r c)^(1/4) (std(V^T A) + std(B)).

    Unlike the authors' code, V and W are the pretrained kernels throughout, and the branch
    of the depthwise convolution, which does not merge, is left out. The other half is LoRA
    over sqrt(r) (std(A) + std(B)).
    """
    half = rank // 2

    def prepare(model: Any, data: Any, preprocess: Any) -> None:
        layers = _prepare(model)

        def own(layer: Any) -> Callable[[], tf.Tensor]:
            inputs, outputs = layer.kernel.shape[2:]
            a = _weight(layer, "own_a", (inputs, half), "he_uniform")
            b = _weight(layer, "own_b", (half, outputs), "zeros")
            return lambda: a @ b / (half**0.5 * (_std(a) + _std(b)))

        def pair(first: Any, second: Any) -> None:
            inputs, outputs = first.kernel.shape[2], second.kernel.shape[3]
            own_1, own_2 = own(first), own(second)
            a = _weight(first, "a", (inputs, half), "he_uniform")
            b = _weight(first, "b", (half, outputs), "zeros")
            scale = (half * inputs) ** 0.25

            def update_1() -> tf.Tensor:
                right = b @ tf.transpose(second.kernel[0, 0])
                return a @ right / (scale * (_std(right) + _std(a))) + own_1()

            def update_2() -> tf.Tensor:
                left = tf.transpose(first.kernel[0, 0]) @ a
                return left @ b / (scale * (_std(left) + _std(b))) + own_2()

            _add_update(first, update_1)
            _add_update(second, update_2)

        alone = dict(layers)
        for path, first in layers.items():
            second = layers.get(path.replace("conv_pw", "conv_pwl"))
            if path.endswith("conv_pw") and second is not None:
                pair(first, second)
                del alone[path], alone[path.replace("conv_pw", "conv_pwl")]
        for layer in alone.values():
            _add_update(layer, own(layer))
        _finish(model)

    return prepare


def _std(x: tf.Tensor) -> tf.Tensor:
    # The gradient of the square root at zero is infinite.
    return tf.sqrt(tf.math.reduce_variance(x) + 1e-12)


def gradient_start(rank: int, gamma: float = 16.0) -> Callable:
    """LoRA-GA: A and B from the singular vectors of one gradient of the kernels.

    arXiv:2407.05000. For the gradient G = U S V^T: A = U[:, :r] z and B = V[:, r:2r]^T z with
    z = outputs^(1/4) / sqrt(gamma); A B is subtracted from the kernel.
    """

    def prepare(model: Any, data: Any, preprocess: Any) -> None:
        pictures, labels = preprocess(data[0][:128]), data[1][:128]
        freeze_statistics(model)
        kernels = {path: layer.kernel for path, layer in pointwise_layers(model).items()}
        with tf.GradientTape() as tape:
            logits = model(pictures, training=False)
            losses = keras.losses.sparse_categorical_crossentropy(labels, logits, True)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, list(kernels.values()))
        lora.inject_lora(model, lora_rank=rank, lora_train_classifier=True)
        for path, layer in lora_layers(model).items():
            gradient = gradients[list(kernels).index(path)].numpy()[0, 0]
            u, _, vt = np.linalg.svd(gradient, full_matrices=True)
            z = layer.kernel.shape[-1] ** 0.25 / gamma**0.5
            a = np.resize(u.T, (rank, len(u))).T * z
            b = np.resize(vt[rank:] if len(vt) > rank else vt, (rank, len(vt))) * z
            layer.kernel_lora_a.assign(a.reshape(layer.kernel_lora_a.shape))
            layer.kernel_lora_b.assign(b.reshape(layer.kernel_lora_b.shape))
            layer.kernel.assign_sub((a @ b)[None, None])  # alpha is the rank

    return prepare
