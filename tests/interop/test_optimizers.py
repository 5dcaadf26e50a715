"""LoRA+ beside PEFT's own optimizer for it: parameter groups of torch."""

import numpy as np
import peft
import tensorflow as tf
import torch
from peft.optimizers import create_loraplus_optimizer

import tfimm_lora as lora
from tests.helpers.kerases import keras, normal
from tfimm_lora.training.loraplus import loraplus_optimizer


def test_updates_are_those_of_pefts_optimizer():
    body = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 3))
    theirs = peft.get_peft_model(body, peft.LoraConfig(r=2, target_modules=["0"]))
    entry = keras.Input((6,))
    x = keras.layers.Dense(5, use_bias=False, name="fc")(entry)
    model = keras.Model(entry, keras.layers.Dense(3, name="head")(x))
    lora.inject_lora(model, lora_rank=2)
    a, b = theirs.base_model.model[0].lora_A.default.weight, theirs.base_model.model[0].lora_B
    b = b.default.weight
    layer = model.get_layer("fc")
    for variable, parameter, seed in ((layer.kernel_lora_a, a, 0), (layer.kernel_lora_b, b, 1)):
        value = normal(*parameter.shape, seed=seed)
        parameter.data = torch.from_numpy(value.copy())
        variable.assign(value.T)
    rate, ratio, decay = 0.02, 12.0, 0.3
    of_peft = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=decay,
        eps=1e-12,
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=decay, epsilon=1e-12)
    loraplus_optimizer(model, optimizer, ratio)
    for step in range(8):
        gradients = [normal(*p.shape, seed=10 + 2 * step + i) for i, p in enumerate((a, b))]
        a.grad, b.grad = (torch.from_numpy(g) for g in gradients)
        of_peft.step()
        factors = (layer.kernel_lora_a, layer.kernel_lora_b)
        optimizer.apply_gradients([(tf.constant(g.T), v) for g, v in zip(gradients, factors)])
    for variable, parameter in ((layer.kernel_lora_a, a), (layer.kernel_lora_b, b)):
        expected = parameter.detach().numpy().T
        np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-4, atol=1e-5)
