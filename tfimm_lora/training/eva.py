"""EVA: factors A that start at what varies most in the inputs of their layers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

from tfimm_lora.adapters.peft_config import exact_pattern
from tfimm_lora.backend import backend_of
from tfimm_lora.config import LORA_VARIABLE_NAMES, LayerSettings, LoRAConfig
from tfimm_lora.initializers.covariance import (
    Covariance,
    Directions,
    covariance_for,
    max_rank,
    redistribute_ranks,
)
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.conversion import adapt_layer, restore_layer
from tfimm_lora.layers.input_rows import InputRows
from tfimm_lora.model.inject import forget_traces
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.model.state import config_of, model_state


def initialize_eva(
    model: Any, data: Iterable[Any], *, rho: float = 2.0, max_batches: int | None = 16
) -> dict[str, int]:
    """Let the factors A of a new LoRA model start at the inputs of their layers (EVA).

    The model runs over the data without training. The columns of a layer's A become the
    directions in which its inputs vary most about their mean, the largest first; B stays
    zero, so the model gives the very outputs that it gave. Ranks go from layers whose inputs
    vary in few directions to others: their sum stays, each layer keeps at least 1 and gets
    at most ``rho`` times its rank. A layer's scale stays what it was, so its alpha changes
    with its rank.

    Dense layers, EinsumDense layers and convolutions (by the patches that they see) take
    part. Embeddings, grouped and depthwise convolutions and EinsumDense layers with an axis
    that input, kernel and output share keep the A and the rank that they have. Of a fused
    projection with ``lora_qkv`` every part gets the same directions.

    Up to 1024 inputs (for a convolution of its window and channels) the directions are exact
    for the data; beyond they come from a sketch of the covariance that takes little memory.
    A model whose ranks changed must be compiled (again) afterwards.

    Args:
        model: A built model that LoRA was put into and that was not trained since, neither
            merged nor with disabled adapters.
        data: Batches of what the model takes, as ``fit`` takes them: x alone, or (x, y, ...),
            of which x is used. A ``tf.data.Dataset``, a Keras dataset, a list, a generator.
        rho: At least 1; how many times its rank a layer may get. 1 leaves all ranks. Default
            2, as in PEFT.
        max_batches: How many batches to use at most; None for all. Default 16.

    Returns:
        The rank of every LoRA layer, by its path.

    Raises:
        TypeError: for data that are one array instead of batches, or a rho or max_batches of
            a wrong type.
        ValueError: if the model has no LoRA layers, or none that takes part; if one is
            merged, disabled or not built, or has a B that is not zero; for data without a
            batch, or on which a layer's inputs do not vary or are not finite; for a rho
            below 1. The model is as it was after every error.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((6,)), tf.keras.layers.Dense(8, activation="relu", name="fc1"),
        ...     tf.keras.layers.Dense(3, name="head")])
        >>> _ = lora.inject_lora(model, lora_rank=2, lora_targets=["fc1"])
        >>> x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
        >>> lora.initialize_eva(model, [x])
        {'fc1': 2}
        >>> a = model.get_layer("fc1").kernel_lora_a.numpy()
        >>> bool(np.allclose(a.T @ a, np.eye(2), atol=1e-6))
        True

    Reference: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance
    Adaptation" (first called "One Initialization to Rule them All"), arXiv:2410.07170,
    section 3. Directions and their shares of the variance are about the mean, as in PEFT,
    which takes layers that would get rank 0 out of the model; here they keep rank 1.
    """
    _check_arguments(data, rho, max_batches)
    layers = lora_layers(model)
    for path, layer in layers.items():
        _check_fresh(path, layer)
    readers = {path: layer._input_rows() for path, layer in layers.items()}
    rows = {path: reader for path, reader in readers.items() if reader is not None}
    if not rows:
        raise ValueError(
            f"Received model '{model.name}', none of whose LoRA layers has inputs that EVA "
            f"is defined for: {', '.join(layers)}. Leave their default start."
        )
    ranks = {path: layers[path].lora.rank for path in rows}
    counts = {path: max_rank(rank, rho) for path, rank in ranks.items()}
    covariances = {p: covariance_for(reader.width, counts[p]) for p, reader in rows.items()}
    _collect(model, data, max_batches, layers, rows, covariances)
    found = {path: _directions(path, covariances[path], counts[path]) for path in rows}
    shared = redistribute_ranks({path: x.ratios for path, x in found.items()}, ranks, rho)
    _start(model, layers, rows, found, shared)
    return {path: layer.lora.rank for path, layer in layers.items()}


def _check_arguments(data: Any, rho: Any, max_batches: Any) -> None:
    if isinstance(rho, bool) or not isinstance(rho, numbers.Real):
        raise TypeError(f"Received rho={rho!r}; expected a number of at least 1.")
    if not 1 <= float(rho) < math.inf:
        raise ValueError(
            f"Received rho={rho!r}; expected a number of at least 1: how many times its rank "
            "a layer may get. Pass 1 to leave all ranks as they are."
        )
    whole = isinstance(max_batches, numbers.Integral) and not isinstance(max_batches, bool)
    if max_batches is not None and not whole:
        raise TypeError(
            f"Received max_batches={max_batches!r}; expected a positive integer, or None for "
            "all batches."
        )
    if max_batches is not None and max_batches < 1:
        raise ValueError(
            f"Received max_batches={max_batches!r}; expected a positive integer, or None for "
            "all batches."
        )
    if hasattr(data, "shape") or isinstance(data, (dict, str)):
        raise TypeError(
            f"Received data of type {type(data).__name__}; expected batches, for example a "
            "tf.data.Dataset. Pass one batch as a list: [x]."
        )


def _check_fresh(path: str, layer: Any) -> None:
    """Raise unless a layer is as ``inject_lora`` leaves it."""
    layer._require_built("start")
    layer._require_enabled("started anew")
    if layer.merged:
        raise ValueError(f"Layer '{path}' is merged. Call unmerge_lora_weights first.")
    backend = backend_of(layer)
    for name in LORA_VARIABLE_NAMES:
        is_a = name == "kernel_lora_a"
        if not is_a and name in layer.__dict__ and backend.to_numpy(layer.__dict__[name]).any():
            raise ValueError(
                f"Layer '{path}' has a {name} that is not zero: it was trained or loaded, or "
                "starts by another way. EVA is for a new LoRA; call remove_lora and "
                "inject_lora (with lora_init='default' or 'eva') first."
            )


# -- what the layers are given -----------------------------------------------------------


def _collect(
    model: Any,
    data: Iterable[Any],
    max_batches: int | None,
    layers: dict[str, LoRALayer],
    rows: dict[str, InputRows],
    covariances: dict[str, Covariance],
) -> None:
    """Run the model over the data and add what its layers are given to their covariances."""
    backend, count = backend_of(model), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(backend.eagerly())
        for path, reader in rows.items():
            stack.enter_context(_observed(layers[path], reader, covariances[path]))
        for batch in itertools.islice(_batches(data), max_batches):
            x, _, _ = backend.keras.utils.unpack_x_y_sample_weight(batch)
            model(x, training=False)
            count += 1
    if not count:
        raise ValueError(
            "Received data without a batch, from which nothing can be learned about inputs. "
            "An iterator that was used before is at its end: pass the dataset itself."
        )


def _batches(data: Any) -> Iterator[Any]:
    """The batches in order, also of a Keras dataset, which knows its length alone."""
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return (data[i] for i in range(len(data)))
    return iter(data)


@contextlib.contextmanager
def _observed(layer: Any, reader: InputRows, covariance: Covariance) -> Iterator[None]:
    """Within this block all that a layer multiplies with its kernel goes to ``covariance``."""
    backend, name = backend_of(layer), reader.method
    bound, held = getattr(layer, name), name in layer.__dict__

    def observer(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if not backend.is_dense_tensor(x):
            raise ValueError(
                f"Layer '{layer.name}' was given a {type(x).__name__}, in which rows are not "
                "all there. Pass dense data, or leave the layer out of lora_targets."
            )
        for chunk in reader.chunks(backend.to_numpy(x)):
            covariance.add(chunk)
        return bound(*args, **kwargs)

    layer.__dict__[name] = observer  # past Keras, which keeps track of attributes
    try:
        yield
    finally:
        if held:
            layer.__dict__[name] = bound
        else:
            layer.__dict__.pop(name)


def _directions(path: str, covariance: Covariance, count: int) -> Directions:
    try:
        found = covariance.directions(count)
    except ValueError as error:
        raise ValueError(
            f"Received data on which the input of layer '{path}' {error}."
        ) from error
    if not len(found.ratios):
        why = (
            "was never used"
            if not covariance.count
            else f"was {covariance.count} times the same"
        )
        raise ValueError(
            f"Received data on which the input of layer '{path}' {why}, so it has no "
            "directions. Pass more data, or leave the layer out of lora_targets."
        )
    return found


# -- how they start ----------------------------------------------------------------------


def _start(
    model: Any,
    layers: dict[str, LoRALayer],
    rows: dict[str, InputRows],
    found: dict[str, Directions],
    shared: dict[str, int],
) -> None:
    """Give the layers their ranks and their factors A; none of them on error."""
    backend = backend_of(model)
    before = {
        path: (layers[path].lora, backend.to_numpy(layers[path].kernel_lora_a)) for path in rows
    }
    try:
        for path, reader in rows.items():
            layer: Any = layers[path]
            _resize(layer, _with_rank(layer.lora, shared[path]))
            a = reader.factor(found[path].vectors[:, : shared[path]])
            layer.kernel_lora_a.assign(a.astype("float32"))
    except BaseException:
        for path, (settings, a) in before.items():
            layer = layers[path]
            _resize(layer, settings)
            layer.kernel_lora_a.assign(a)
        raise
    if any(shared[path] != settings.rank for path, (settings, _) in before.items()):
        _record(model, layers)
        forget_traces(model, "Other ranks were given to the layers of")


def _with_rank(settings: LayerSettings, rank: int) -> LayerSettings:
    """A layer's settings with another rank and the same scale."""
    if settings.alpha is None or rank == settings.rank:
        return dataclasses.replace(settings, lora_rank=rank)
    ratio = rank / settings.rank
    alpha = settings.alpha * (math.sqrt(ratio) if settings.use_rslora else ratio)
    return dataclasses.replace(settings, lora_rank=rank, lora_alpha=alpha)


def _resize(layer: Any, settings: LayerSettings) -> None:
    """Give a layer other settings, and with them new factors, if they differ."""
    if isinstance(layer, LoRALayer) and layer.lora == settings:
        return
    trainable = layer.trainable
    if isinstance(layer, LoRALayer):
        restore_layer(layer)
    adapt_layer(layer, settings)
    if layer.trainable != trainable:
        layer.trainable = trainable


def _record(model: Any, layers: dict[str, LoRALayer]) -> None:
    """Tell the model's config, from which it is created again, of its layers' ranks."""
    config = config_of(model)
    if config is None:  # layers were adapted by hand
        return
    ranks = {path: layer.lora.rank for path, layer in layers.items()}
    alphas = {path: layer.lora.alpha for path, layer in layers.items()}
    changed: LoRAConfig = dataclasses.replace(
        config,
        lora_rank_pattern=_pattern(ranks, config.lora_rank),
        lora_alpha_pattern=_pattern(alphas, config.lora_alpha),
    )
    if getattr(model, "cfg", None) is config:
        model.cfg = changed
    model_state(model).config = changed


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """The pattern that gives each layer its value by its path."""
    dotted = {path.replace("/", "."): value for path, value in values.items()}
    return {
        key.replace(r"\.", "/"): value for key, value in exact_pattern(dotted, default).items()
    }
