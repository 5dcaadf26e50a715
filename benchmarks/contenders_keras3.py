"""On Keras 3 and TensorFlow: ours and Keras' ``enable_lora``, the same layers of one model,
with and without XLA."""

import entrants
import keras
import keras_models
import numpy as np
import tensorflow as tf
from worker import Built

import tfimm_lora as lora


def build(task, model):
    net, adapted = keras_models.build(model.keras, task["small"])
    jit = entrants.compiled(task["contender"])
    if task["contender"].startswith("enable_lora"):
        variables = _enable_lora(net, adapted, task["rank"])
    else:
        lora.inject_lora(net, lora_rank=task["rank"], lora_targets=adapted)
        variables = net.trainable_variables
    images = tf.random.normal((task["batch"], *net.input_shape[1:]))
    labels = tf.constant(np.arange(task["batch"]) % net.output_shape[-1])
    optimizer = keras.optimizers.Adam(1e-4)
    values = [v.value for v in variables]

    @tf.function(jit_compile=jit)
    def step():
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            logits = net(images, training=True)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(loss)
        optimizer.apply(tape.gradient(loss, values), variables)
        return loss

    @tf.function(jit_compile=jit)
    def forward():
        return net(images, training=False)

    return Built(
        trained=int(sum(np.prod(v.shape) for v in variables)),
        prepare=lambda: optimizer.build(variables),
        trace=step.get_concrete_function,
        actions={"step": lambda: step().numpy(), "forward": lambda: forward().numpy()},
    )


def _enable_lora(net, adapted, rank):
    """Keras' LoRA in the named layers, all else frozen; the variables that are trained."""
    variables = []
    for layer in net.layers:
        if layer.name not in adapted:
            layer.trainable = False
            continue
        layer.enable_lora(rank)
        variables += [layer.lora_kernel_a, layer.lora_kernel_b]
    return variables
