"""On Keras 3: ours, full fine-tuning and the floor, on JAX and on torch."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from contender import Contender
from measure import Entry
from models import CLASSES, RANK, name_of

import tfimm_lora as lora


def build(entry: Entry, small: bool) -> Contender:
    keras.config.set_dtype_policy(
        "mixed_bfloat16" if entry.dtype == "bfloat16" else entry.dtype
    )
    model = prepared(entry, small)
    size = model.input_shape[1:]
    pictures = np.random.default_rng(0).normal(size=(entry.batch, *size)).astype("float32")
    if entry.measurement == "mixed batch":
        return _mixed_batch(model, pictures)
    labels = np.arange(entry.batch, dtype="int32") % CLASSES
    make = _on_torch if keras.backend.backend() == "torch" else _on_jax
    return make(model, pictures, labels)


def prepared(entry: Entry, small: bool) -> Any:
    """The model, with what the contender trains."""
    name, kind = name_of(entry, small), entry.contender.split("-")[0]
    model = lora.create_model(
        name, nb_classes=CLASSES, lora_rank=RANK, lora_train_classifier=True
    )
    if kind == "ours" and entry.measurement != "mixed batch":
        return model
    model = lora.convert_to_regular_model(model)
    model.trainable = True
    if kind == "full":
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
    elif kind == "floor":
        _train_lowest_bias(model)
    return model


def _train_lowest_bias(model: Any) -> None:
    """Freeze all but the bias (or offset) that is nearest to the input."""
    lowest = next(
        v for v in model.trainable_variables if v.path.split("/")[-1] in ("bias", "beta")
    )
    for variable in model.trainable_variables:
        variable.trainable = variable is lowest
    assert [v.path for v in model.trainable_variables] == [lowest.path]


# -- JAX ---------------------------------------------------------------------------------


def _on_jax(model: Any, pictures: np.ndarray, labels: np.ndarray) -> Contender:
    import jax
    import jax.numpy as jnp

    optimizer = keras.optimizers.Adam(1e-4)
    optimizer.build(model.trainable_variables)
    trained = [v.value for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]
    slots = [v.value for v in optimizer.variables]
    x, y = jax.device_put(pictures), jax.device_put(labels)

    def loss_of(trained: list, frozen: list) -> tuple[Any, list]:
        logits, frozen = model.stateless_call(trained, frozen, x, training=True)
        log = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(log, y[:, None], 1)), frozen

    # What is not trained is an argument, as in Keras' own training, and comes back unchanged.
    @jax.jit
    def step(trained: list, slots: list, frozen: list) -> tuple[Any, list, list]:
        (loss, _), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained, frozen)
        trained, slots = optimizer.stateless_apply(slots, gradients, trained)
        return loss, trained, slots

    state = {"trained": trained, "slots": slots, "loss": None}

    def run() -> None:
        state["loss"], state["trained"], state["slots"] = step(
            state["trained"], state["slots"], frozen
        )

    return Contender(
        run,
        lambda: state["loss"].block_until_ready(),
        _jax_peak,
        jax.devices()[0].device_kind,
        sum(int(v.size) for v in trained),
    )


def _jax_peak() -> int | None:
    import jax

    statistics = jax.local_devices()[0].memory_stats()
    return statistics and statistics.get("peak_bytes_in_use")


# -- torch -------------------------------------------------------------------------------


def _on_torch(model: Any, pictures: np.ndarray, labels: np.ndarray) -> Contender:
    import peft_contenders
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    x = torch.from_numpy(pictures).to(device)
    y = torch.from_numpy(labels).long().to(device)
    variables = [v.value for v in model.trainable_variables]
    optimizer = torch.optim.Adam(variables, 1e-4)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(x, training=True)
        torch.nn.functional.cross_entropy(logits.float(), y).backward()
        optimizer.step()

    trained = sum(v.numel() for v in variables)
    return Contender(
        run,
        peft_contenders.wait,
        peft_contenders.peak,
        peft_contenders.device_name(),
        trained,
    )


# -- mixed batches -----------------------------------------------------------------------


def _mixed_batch(model: Any, pictures: np.ndarray) -> Contender:
    """A bank with an adapter for each row, each with a classifier of its own."""
    import jax

    lora.inject_lora(model, lora_rank=RANK, lora_train_classifier=True)
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(0.02 * rng.normal(size=variable.shape).astype("float32"))
    names = [f"a{i}" for i in range(len(pictures))]
    adapter = lora.adapter_of(model)
    lora.remove_lora(model, merge=False)
    plain_of = jax.jit(lambda values, x: model.stateless_call(*values, x)[0])
    values = (
        [v.value for v in model.trainable_variables],
        [v.value for v in model.non_trainable_variables],
    )
    x = jax.device_put(pictures)
    state: dict[str, Any] = {}

    def plain() -> None:
        state["outputs"] = plain_of(values, x)

    plain()
    bank = lora.AdapterBank(model, dict.fromkeys(names, adapter), capacity=len(names))
    routed, slots = bank.model, bank.slots(names)
    routed({"inputs": pictures, "adapter": slots})
    variables = (
        [v.value for v in routed.trainable_variables],
        [v.value for v in routed.non_trainable_variables],
    )
    inputs = {"inputs": x, "adapter": jax.device_put(slots)}
    mixed_of = jax.jit(lambda values, inputs: routed.stateless_call(*values, inputs)[0])

    def run() -> None:
        state["outputs"] = mixed_of(variables, inputs)

    return Contender(
        run,
        lambda: jax.block_until_ready(state["outputs"]),
        _jax_peak,
        jax.devices()[0].device_kind,
        0,
        plain,
    )
