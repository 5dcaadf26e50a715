"""The methods: what is trained, which settings are tried, and how the model is made."""

import dataclasses
import gc
import math

import tfimm_lora as lora
from tfimm_lora.backend import backend_of, default_backend, uses_legacy_keras
from tfimm_lora.finetuning.optimizer import create_optimizer
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.merge import has_lora, lora_layers

#: The fused projection of tfimm's attention; the separate ones of keras_hub's.
_PROJECTIONS = ["attn/qkv"] if uses_legacy_keras() else ["mha/query", "mha/value"]

#: Models without LoRA are made with an update that is zero and frozen.
_IDLE = {
    "lora_rank": 1,
    "lora_targets": _PROJECTIONS,
    "lora_initializer": "zeros",
    "lora_freeze_a": True,
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        arguments: lora_* keywords of ``create_model``.
        rates, decays: The learning rates and weight decays that are tried.
        alphas: The same for ``lora_alpha``; the scale of the update is alpha / rank.
        uses_lora: Whether the update is trained.
    """

    arguments: dict
    rates: tuple[float, ...]
    decays: tuple[float, ...] = (1e-4, 1e-2)
    alphas: tuple[float | None, ...] = (None,)
    uses_lora: bool = False


METHODS = {
    "full": Method(_IDLE, rates=(1e-5, 3e-5, 1e-4, 3e-4)),
    "linear": Method(_IDLE, rates=(1e-3, 3e-3, 1e-2, 3e-2)),
    "bitfit": Method({**_IDLE, "lora_train_bias": "all"}, rates=(1e-3, 3e-3, 1e-2, 3e-2)),
    # 0.29 M parameters: the query and value projections of each block.
    "lora": Method(
        {"lora_rank": 8, "lora_targets": _PROJECTIONS, "lora_qkv": "qv"},
        rates=(5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        alphas=(8.0,),
        uses_lora=True,
    ),
}


def create(method, arguments, *, model, weights, classes, size, seed):
    """Create the model of a method, with a new classifier. Earlier models are forgotten.

    Args:
        method: A name in ``METHODS``.
        arguments: lora_* keywords.
        model: A name for ``lora.create_model``.
        weights: A source for ``lora.load_timm_weights``, or None for random weights.
        classes: The number of classes.
        size: The height and width of the pictures.
        seed: The seed of the new weights.
    """
    keras = default_backend().keras
    keras.backend.clear_session()
    gc.collect()
    keras.utils.set_random_seed(seed)
    net = lora.create_model(
        model,
        nb_classes=classes,
        input_size=(size, size),
        **{**arguments, "lora_train_classifier": True},
    )
    if weights is not None:
        heads = [f"^{path}/" for path in classifier_paths(net)]
        lora.load_timm_weights(net, weights, weights_to_ignore=heads)
    if method == "full":
        lora.remove_lora(net, merge=False)
    if method == "linear":
        for layer in lora_layers(net).values():
            layer.trainable = False
    return net


def train(net, batches, *, epochs, warmup, rate, decay, seed):
    """Train a model for all epochs, as ``lora.finetune`` does; also one without LoRA.

    Raises:
        FloatingPointError: If the loss is NaN or infinite.
    """
    settings = {"learning_rate": rate, "weight_decay": decay, "warmup": warmup / epochs}
    settings["clip_norm"] = 0  # not part of the protocol
    if has_lora(net):
        lora.finetune(net, batches, epochs=epochs, seed=seed, verbose="none", **settings)
        return
    keras, steps = default_backend().keras, batches.steps_per_epoch
    net.compile(
        create_optimizer(keras, steps=epochs * steps, **settings),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    fitted = net.fit(
        batches.epochs(0), epochs=epochs, steps_per_epoch=steps, shuffle=False, verbose=0
    )
    loss = fitted.history["loss"][-1]
    if not math.isfinite(loss):
        raise FloatingPointError(f"The loss is {loss}: the training has diverged.")


def parameters(method, net):
    """Count the parameters: of all, trained, and those of the classifier among the trained."""
    layers = dict(backend_of(net).walk(net))
    head = [v for path in classifier_paths(net) for v in layers[path].trainable_variables]
    idle = "kernel_lora" if not METHODS[method].uses_lora else None
    trained = [v for v in net.trainable_variables if not (idle and idle in v.name)]
    return {
        "all": _size(net.weights),
        "trained": _size(trained),
        "classifier": _size(head),
    }


def _size(variables):
    return sum(math.prod(v.shape) for v in variables)
