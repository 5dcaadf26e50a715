"""On tfimm's models and legacy Keras: the floor, ours, full fine-tuning, tfimm's own LoRA."""

import numpy as np
from worker import Built

import tfimm_lora as lora

import tensorflow as tf  # isort: skip - after tfimm_lora, which chooses legacy Keras
import tfimm  # isort: skip
from tfimm.models.registry import model_config  # isort: skip


def build(task, model):
    name, kind = model.name, task["contender"]
    arguments = _arguments(model, task["small"])
    rank = {"lora_rank": task["rank"]}
    if kind == "ours":
        # In place: what a copied model leaves behind would be memory that the step finds free.
        net = lora.inject_lora(tfimm.create_model(name, **arguments), **rank)
        variables = net.trainable_weights
    elif kind == "tfimm":
        from tfimm.architectures import lora as theirs

        net = theirs.create_model(name, **arguments, **rank)
        variables = theirs.lora_trainable_weights(net)
    else:
        net = tfimm.create_model(name, **arguments)
        variables = net.trainable_weights
        if kind == "floor":
            variables = [lowest_bias(net)]
            net.trainable = False  # batch normalisation in inference mode, as with LoRA
    images = tf.random.normal((task["batch"], *net.cfg.input_size, net.cfg.in_channels))
    labels = tf.constant(np.arange(task["batch"]) % net.cfg.nb_classes)
    optimizer = tf.keras.optimizers.Adam(1e-4)

    @tf.function
    def step():
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            logits = net(images, training=True)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(loss)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    actions = {"step": lambda: step().numpy(), "forward": _forward(net, images)}
    if kind == "ours":
        actions["merged"] = _merged(name, {**arguments, **rank}, images)
    return Built(
        trained=int(sum(np.prod(v.shape) for v in variables)),
        prepare=lambda: optimizer.build(variables),
        trace=step.get_concrete_function,
        actions=actions,
    )


def lowest_bias(net):
    """The bias of the first convolution; where it has none, that of the normalisation
    after it."""
    for layer in net._flatten_layers():
        if isinstance(layer, tf.keras.layers.Conv2D) and layer.use_bias:
            return layer.bias
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            return layer.beta
    raise ValueError("no bias")


def _arguments(model, small):
    """Arguments of tfimm: nothing is dropped, as timm has it by default."""
    config = model_config(model.name)
    rates = {r: 0.0 for r in ("drop_rate", "drop_path_rate") if hasattr(config, r)}
    return {**rates, "input_size": (32, 32), **model.small[0]} if small else rates


def _forward(net, images):
    @tf.function
    def forward():
        return net(images, training=False)

    return lambda: forward().numpy()


def _merged(name, arguments, images):
    """The forward pass of a merged model, which is made at the first call."""
    made = []

    def forward():
        if not made:
            net = lora.create_model(name, **arguments)
            made.append(_forward(lora.merge_lora_weights(net), images))
        return made[0]()

    return forward
