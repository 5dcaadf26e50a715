"""``load_adapter``: load an adapter into a live model, in place.

The steps are: check that everything fits (``fit.py``); if the model lacks the LoRA that the
adapter needs, inject it (``lora_arguments.py``); replace the weights that the adapter holds,
and restore those that only the last adapter replaced; assign the updates to the layers. The
updates come last because a DoRA magnitude depends on the kernel. Until the assignments, any
failure restores the model.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.base_architecture import warn_if_other_checkpoint
from tfimm_lora.adapters.fit import (
    FittedUpdate,
    WeightValues,
    does_not_fit_error,
    fitted_updates,
    weight_values,
)
from tfimm_lora.adapters.former_lora import FormerLoRA
from tfimm_lora.adapters.incomplete import warn_if_incomplete
from tfimm_lora.adapters.lora_arguments import lora_arguments
from tfimm_lora.adapters.model_names import check_prefix, in_names_of
from tfimm_lora.adapters.save import fully_trained
from tfimm_lora.adapters.torch_layout import DoesNotFit
from tfimm_lora.backend import backend_of
from tfimm_lora.config import LoRAConfig
from tfimm_lora.model.inject import adapt_model, inject_lora, remove_lora
from tfimm_lora.model.merge import has_lora
from tfimm_lora.model.registry import lora_base_of
from tfimm_lora.model.state import (
    ReplacedWeight,
    model_state,
    record_task,
    recorded_task,
)
from tfimm_lora.validation import check_keywords
from tfimm_lora.zoo.weights.module_names import ModelWeight, ModuleNames


def load_adapter(
    model: Any,
    adapter: Adapter | str | os.PathLike[str],
    *,
    prefix: str | None = None,
    **load_options: Any,
) -> Any:
    """Load an adapter into a model, in place.

    The adapter may have the names of another library: timm, transformers 4 and 5, keras_hub or
    keras.applications. For the families in docs/reference/names.md they are translated, with
    separate query, key and value projections where the model has a fused one, and the reverse.

    If the model has LoRA of the same ranks in the same layers, only values are assigned:
    compiled functions keep working without a new trace, and a merged model stays merged.
    Otherwise the LoRA that the adapter needs is injected, replacing any other LoRA and what it
    learned, and a model that was trained must be compiled again.

    Fully trained weights of the adapter (a classifier, biases) replace the model's. The
    original values return when an adapter without them is loaded. These weights are trained
    further only if LoRA is injected, or if the model trains them already.

    Args:
        model: A built Keras model, with or without LoRA.
        adapter: An ``Adapter``, a folder, or "hf://user/repo".
        prefix: What comes before the names of the backbone in another library, for example
            "encoder." for an adapter of a model that holds a timm model as ``self.encoder``.
            Default: found from the names.
        **load_options: For a path, as in ``Adapter.load``: subfolder, revision, cache_dir.

    Returns:
        The same model.

    Raises:
        FileNotFoundError, ImportError: As ``Adapter.load``.
        TypeError: If options are given with an ``Adapter``, which is loaded already.
        ValueError: If a file is damaged or not supported; or if the adapter does not fit. The
            message names all layers and weights that are missing or have another shape. The
            model is unchanged.

    Warns:
        UserWarning: If the model has fully trained weights that the adapter does not hold.
            They keep their values. Also if the file lacks layers or fully trained modules that
            its config selects in this model (it is incomplete, or of a smaller model), or has
            layers that its config does not select. Also if the adapter names another checkpoint
            on the hub than the model was loaded from.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> def make():
        ...     return tf.keras.Sequential([
        ...         tf.keras.Input((4,)), tf.keras.layers.Dense(3, name="fc")])
        >>> tuned = lora.inject_lora(make(), lora_rank=2, lora_targets=["fc"])
        >>> model = lora.load_adapter(make(), lora.adapter_of(tuned))
        >>> type(model.layers[-1]).__name__
        'LoRADense'
    """
    check_keywords(load_options, ("subfolder", "revision", "cache_dir"), "load_adapter")
    if isinstance(adapter, Adapter):
        if load_options:
            raise TypeError(
                f"Received {', '.join(load_options)} with an Adapter; expected options only "
                "with a path. Pass them to Adapter.load."
            )
    else:
        adapter = Adapter.load(adapter, **load_options)
    check_prefix(prefix, "prefix")
    names = ModuleNames(model)
    adapter = in_names_of(names, adapter, prefix)
    weights = weight_values(names, adapter)
    warn_if_incomplete(names, adapter, stacklevel=2)
    warn_if_other_checkpoint(model, adapter, stacklevel=2)
    unaffected: list[ModelWeight] = []
    if not names.adapted():
        fitted = _inject(model, adapter)
    else:
        _require_enabled(names)
        unaffected = _unaffected_weights(names, adapter)
        try:
            fitted = fitted_updates(names, adapter)
        except DoesNotFit:
            fitted = _replace_lora(model, adapter)
    _replace_weights(names, weights, unaffected)
    for each in fitted:
        each.assign()
    record_task(model, adapter.task)
    return model


def _inject(model: Any, adapter: Adapter) -> list[FittedUpdate]:
    """Inject LoRA into a model without it, and return the updates for its layers."""
    inject_lora(model, **lora_arguments(model, adapter))
    try:
        return fitted_updates(ModuleNames(model), adapter)
    except DoesNotFit as error:
        remove_lora(model, merge=False)
        raise does_not_fit_error(model, adapter, [str(error)]) from error


def _replace_lora(model: Any, adapter: Adapter) -> list[FittedUpdate]:
    """Replace the LoRA of a model, and return the updates for the new layers.

    If that fails, the former LoRA is injected again, with its values.
    """
    inject = _injection(model, adapter)
    arguments = lora_arguments(model, adapter)
    former, task = FormerLoRA(model), recorded_task(model)
    # `_replace_weights` decides which of them get their original values.
    model_state(model).replaced = {}
    remove_lora(model, merge=False)
    try:
        inject(arguments)
        fitted = fitted_updates(ModuleNames(model), adapter)
    except ValueError as error:
        if has_lora(model):
            remove_lora(model, merge=False)
        inject(former.arguments)
        former.restore()
        record_task(model, task)
        raise does_not_fit_error(model, adapter, [str(error)]) from error
    model_state(model).replaced = former.replaced
    return fitted


def _injection(model: Any, adapter: Adapter) -> Callable[[dict[str, Any]], Any]:
    """Return the function that injects LoRA with given arguments after its removal.

    A registered LoRA class, which builds its LoRA from its config, becomes this class again.
    """
    lora_cls, config = type(model), getattr(model, "cfg", None)
    if lora_base_of(lora_cls) in (None, lora_cls):
        return lambda arguments: inject_lora(model, **arguments)
    if not isinstance(config, LoRAConfig):
        raise ValueError(
            f"Received an adapter with other layers or ranks than model '{model.name}' "
            f"({lora_cls.__name__}), whose class chooses its LoRA itself. Create the model "
            f"with the LoRA that the adapter needs: {lora_arguments(model, adapter)}."
        )

    def inject(arguments: dict[str, Any]) -> None:
        backend_of(model).swap_class(model, lora_cls)
        model.cfg = dataclasses.replace(config, **arguments)
        adapt_model(model, model.cfg, rebuilt_by_class=True)

    return inject


def _replace_weights(
    names: ModuleNames, weights: WeightValues, unaffected: list[ModelWeight]
) -> None:
    """Assign the adapter's weights, and restore those that only the last adapter replaced."""
    state = model_state(names.model)
    kept = {
        weight.key: state.replaced.get(weight.key)
        or ReplacedWeight(weight.variable, weight.raw_value())
        for weight in (*(weight for weight, _ in weights), *unaffected)
    }
    for weight in names.weights:
        original = state.replaced.get(weight.key)
        if original is None or original.variable is not weight.variable:
            continue
        if weight.key not in kept:
            weight.assign_raw(original.before)
    for weight, value in weights:
        weight.assign(value)
    state.replaced = kept


def _require_enabled(names: ModuleNames) -> None:
    if any(layer._lora_state.disabled for layer in names.adapted().values()):
        raise ValueError(
            f"The adapter of model '{names.model.name}' is disabled. Leave the "
            "disable_adapter block before you load another one."
        )


def _unaffected_weights(names: ModuleNames, adapter: Adapter) -> list[ModelWeight]:
    """Return the weights trained in this model that have no original value to restore.

    Warns if there are any.
    """
    model = names.model
    known = {*adapter.weights, *model_state(model).replaced}
    found = [weight for weight in fully_trained(names)[1] if weight.key not in known]
    if found:
        listed = [weight.key for weight in found]
        warnings.warn(
            f"Model '{model.name}' fully trains {', '.join(listed[:5])}"
            f"{', ...' if len(found) > 5 else ''}, which the adapter does not hold. Their "
            "values stay as they are.",
            stacklevel=3,
        )
    return found
