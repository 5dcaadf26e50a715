"""EVA: initialize A with the directions in which the inputs of a layer vary most."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from tfimm_lora.adapters.peft_config import exact_pattern
from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer
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
from tfimm_lora.model.inject import drop_compiled
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.model.state import config_of, model_state
from tfimm_lora.validation import check_integer, check_number


def initialize_eva(
    model: Any, data: Iterable[Any], *, rho: float = 2.0, max_batches: int | None = 16
) -> dict[str, int]:
    """Initialize the factors A of a new LoRA model from the inputs of their layers (EVA).

    The model runs over the data without training. The columns of a layer's A become the
    directions in which its inputs vary most about their mean, the largest first. B stays zero,
    so the outputs of the model do not change. Rank is moved from layers whose inputs vary in
    few directions to others: the sum of the ranks stays the same, and each layer gets at least
    1 and at most ``rho`` times its rank. A layer's scale stays the same, so its alpha changes
    with its rank.

    Dense layers, EinsumDense layers and convolutions (with their input patches) are
    initialized. Embeddings, grouped and depthwise convolutions, and EinsumDense layers with an
    axis that input, kernel and output share keep their A and rank. In a fused projection with
    ``lora_qkv`` every block gets the same directions.

    Up to 1024 inputs (for a convolution: window size times channels) the directions are exact
    for the data. For more inputs they are computed from a sketch of the covariance that needs
    little memory.

    Args:
        model: A built model that LoRA was injected into and that has not been trained since.
            It must not be merged or have a disabled adapter.
        data: Batches of inputs, as for ``fit``: x alone, or (x, y, ...), of which only x is
            used. A ``tf.data.Dataset``, a Keras dataset, a list or a generator.
        rho: The largest factor by which the rank of a layer may grow, at least 1. With 1 all
            ranks stay the same. Default 2, as in PEFT.
        max_batches: The largest number of batches to use; None means all. Default 16.

    Returns:
        The rank of every LoRA layer, by its path.

    Raises:
        TypeError: If the data are one array instead of batches, or if rho or max_batches has
            the wrong type.
        ValueError: If the model has no LoRA layers, or none for which EVA is defined; if a
            layer is merged, disabled or not built, or has a B that is not zero; if the data
            contain no batch, or a layer's inputs do not vary or are not finite on them; if
            rho is below 1. After an error the model is unchanged.

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
    section 3. Directions and their shares of the variance are about the mean, as in PEFT.
    Layers that would get rank 0 keep rank 1 here; PEFT removes them from the model.
    """
    _check_arguments(data, rho, max_batches)
    layers = lora_layers(model)
    for path, layer in layers.items():
        _check_untrained(path, layer)
    readers = {path: layer._input_rows() for path, layer in layers.items()}
    rows = {path: reader for path, reader in readers.items() if reader is not None}
    if not rows:
        raise ValueError(
            f"Received model '{model.name}' with the LoRA layers {', '.join(layers)}; expected "
            "at least one whose inputs EVA is defined for. Keep their default initialization."
        )
    ranks = {path: layers[path].lora.rank for path in rows}
    counts = {path: max_rank(rank, rho) for path, rank in ranks.items()}
    covariances = {p: covariance_for(reader.width, counts[p]) for p, reader in rows.items()}
    _collect(model, data, max_batches, layers, rows, covariances)
    found = {path: _directions(path, covariances[path], counts[path]) for path in rows}
    shared = redistribute_ranks({path: x.ratios for path, x in found.items()}, ranks, rho)
    _initialize(model, layers, rows, found, shared)
    return {path: layer.lora.rank for path, layer in layers.items()}


def _check_arguments(data: Any, rho: Any, max_batches: Any) -> None:
    check_number(rho, "rho", 1)
    if max_batches is not None:
        check_integer(max_batches, "max_batches", 1)
    if hasattr(data, "shape") or isinstance(data, (dict, str)):
        raise TypeError(
            f"Received data of type {type(data).__name__}; expected batches, for example a "
            "tf.data.Dataset. Pass one batch as a list: [x]."
        )


def _check_untrained(path: str, layer: LoRALayer) -> None:
    """Raise unless a layer has the state that ``inject_lora`` creates."""
    layer._require_built("initialize")
    layer._require_enabled("initialized")
    if layer.merged:
        raise ValueError(f"Layer '{path}' is merged. Call unmerge_lora_weights first.")
    if layer.lora.lora_use_loha:
        raise ValueError(
            f"Layer '{path}' has LoHa, which has a start of its own. Inject LoRA with "
            "lora_use_loha=False."
        )
    backend = backend_of(layer)
    for name in LORA_VARIABLE_NAMES:
        is_a = name == "kernel_lora_a"
        if not is_a and name in layer.__dict__ and backend.to_numpy(layer.__dict__[name]).any():
            raise ValueError(
                f"Layer '{path}' has a {name} that is not zero; expected a new LoRA layer. It "
                "was trained, loaded or initialized in another way. Call remove_lora and "
                "inject_lora (with lora_init='default' or 'eva') first."
            )


# -- collecting the inputs of layers ------------------------------------------------------


def _collect(
    model: Any,
    data: Iterable[Any],
    max_batches: int | None,
    layers: dict[str, LoRALayer],
    rows: dict[str, InputRows],
    covariances: dict[str, Covariance],
) -> None:
    """Run the model over the data and add the inputs of its layers to their covariances."""
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
            "Received data without a batch; expected at least one. If it is an iterator that "
            "was used before, pass the dataset itself."
        )


def _batches(data: Any) -> Iterator[Any]:
    """Iterate over the batches, also of a Keras dataset, which only has a length and items."""
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return (data[i] for i in range(len(data)))
    return iter(data)


@contextlib.contextmanager
def _observed(layer: Layer, reader: InputRows, covariance: Covariance) -> Iterator[None]:
    """Add the inputs of a layer's kernel product within this block to ``covariance``."""
    backend, name = backend_of(layer), reader.method
    bound, is_in_instance = getattr(layer, name), name in layer.__dict__

    def observer(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if not backend.is_dense_tensor(x):
            raise ValueError(
                f"Layer '{layer.name}' received a {type(x).__name__}; expected a dense tensor. "
                "Pass dense data, or leave the layer out of lora_targets."
            )
        for chunk in reader.chunks(backend.to_numpy(x)):
            covariance.add(chunk)
        return bound(*args, **kwargs)

    layer.__dict__[name] = observer  # bypasses the attribute tracking of Keras
    try:
        yield
    finally:
        if is_in_instance:
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
        n = covariance.count
        why = f"did not vary (number of rows: {n})" if n else "was never used"
        raise ValueError(
            f"Received data on which the input of layer '{path}' {why}, so it has no "
            "directions. Pass more data, or leave the layer out of lora_targets."
        )
    return found


# -- initialization ----------------------------------------------------------------------


def _initialize(
    model: Any,
    layers: dict[str, LoRALayer],
    rows: dict[str, InputRows],
    found: dict[str, Directions],
    shared: dict[str, int],
) -> None:
    """Set the ranks and the factors A of all layers, or of none if an error occurs."""
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
        drop_compiled(model, "The ranks of layers were changed in")


def _with_rank(settings: LayerSettings, rank: int) -> LayerSettings:
    """Return a layer's settings with another rank and the same scale."""
    if settings.alpha is None or rank == settings.rank:
        return dataclasses.replace(settings, lora_rank=rank)
    ratio = rank / settings.rank
    alpha = settings.alpha * (math.sqrt(ratio) if settings.use_rslora else ratio)
    return dataclasses.replace(settings, lora_rank=rank, lora_alpha=alpha)


def _resize(layer: Layer, settings: LayerSettings) -> None:
    """Convert a layer again with other settings, which creates new factors."""
    if isinstance(layer, LoRALayer) and layer.lora == settings:
        return
    trainable = layer.trainable
    if isinstance(layer, LoRALayer):
        restore_layer(layer)
    adapt_layer(layer, settings)
    if layer.trainable != trainable:
        layer.trainable = trainable


def _record(model: Any, layers: dict[str, LoRALayer]) -> None:
    """Record the ranks of the layers in the config from which the model is recreated."""
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
    """Return the pattern that maps the path of each layer to its value."""
    dotted = {path.replace("/", "."): value for path, value in values.items()}
    return {
        key.replace(r"\.", "/"): value for key, value in exact_pattern(dotted, default).items()
    }
