"""Choose the layers of a model to adapt and their settings, with reasons for the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer
from tfimm_lora.config import LayerSettings, LoRAConfig, Presets, Targets, lora_field_names
from tfimm_lora.layer_paths import (
    check_expression,
    index_of,
    matches,
    nearest,
    no_match_error,
    resolve,
    unmatched,
    value_for,
)
from tfimm_lora.layers import qkv
from tfimm_lora.layers.conversion import kernel_variable, lora_class, supported
from tfimm_lora.layers.frozen import FrozenLayer
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.merge import has_lora
from tfimm_lora.model.naming import timm_view
from tfimm_lora.model.registry import default_targets, presets
from tfimm_lora.model.trainable_weights import inside_paths, layers_under
from tfimm_lora.validation import check_keywords


@dataclass
class Selection:
    """The layers of a model to adapt, and those to train fully.

    Attributes:
        layers: Path -> layer, for the layers to adapt.
        settings: Path -> settings, for the same layers.
        reasons: Path -> why it is not adapted, for every other layer.
        trained: The ids of the fully trained layers.
        errors: What is wrong with the config for this model; the first error is raised.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    settings: dict[str, LayerSettings] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)
    errors: list[ValueError] = field(default_factory=list)

    def drop(self, paths: Iterable[str], reason: str) -> None:
        """Do not adapt layers, for a reason."""
        for path in list(paths):
            del self.layers[path]
            self.settings.pop(path, None)
            self.reasons[path] = reason


#: Reasons that ``plan`` reports, too.
FULLY_TRAINED = "fully trained"
NOT_TARGETED = "not among the targets"


def not_in_qkv(blocks: str) -> str:
    """Return the reason for a projection without one of the blocks in ``lora_qkv``."""
    return f"not in lora_qkv={blocks!r}"


#: The names of embeddings of positions: "position_embedding", "pos_embed", "positions".
_POSITIONS = re.compile(r"(?<![a-z])pos(ition(al|s)?)?(?![a-z])", re.IGNORECASE)

_NOT_BUILT = (
    "layer '{}' is not built, because the model has never called it; call the model on an "
    "input that uses it, or leave the layer out of lora_targets"
)


def check_ready(model: Layer) -> None:
    """Raise unless a model is built and without LoRA."""
    require_built(model)
    if has_lora(model):
        raise ValueError(
            f"Received model '{model.name}', which has LoRA layers already; expected a model "
            "without LoRA. Call remove_lora first (merge=True keeps the trained updates)."
        )
    if any(isinstance(x, FrozenLayer) for _, x in backend_of(model).walk(model)):
        raise ValueError(
            f"Received model '{model.name}', which is part of a model that LoRA was "
            "injected into: its layers are frozen. Inject LoRA into the outer model, and "
            "choose layers with lora_targets."
        )


def require_built(model: Layer) -> None:
    """Raise unless a model is built."""
    backend = backend_of(model)
    if not model.built or not any(backend.own_variables(x) for _, x in backend.walk(model)):
        raise ValueError(
            f"Received model '{model.name}', which is not built: its layers have no "
            "variables yet. Call it on an input (or model.build(input_shape)) first."
        )


def config_for(model: Layer, arguments: dict[str, Any], what: str) -> LoRAConfig:
    """Create the config from lora_* arguments, with the targets of the model's architecture.

    Raises:
        TypeError, ValueError: If an argument is unknown or out of range.
    """
    check_keywords(arguments, lora_field_names(), what)
    config = LoRAConfig(**arguments)
    if config.lora_targets is None:
        view = timm_view(model)
        config.lora_targets = "default" if view else default_targets(type(model))
    return config


def select(model: Layer, config: LoRAConfig) -> Selection:
    """Choose the layers that a config means in a model, without changing anything.

    Raises:
        ValueError: If a string is not a regular expression. Other errors are collected in
            ``errors``.
    """
    backend = backend_of(model)
    walked = list(backend.walk(model))
    classifier = classifier_paths(model)
    view = timm_view(model)
    table = view.presets if view else presets(type(model))
    aliases = view.paths if view else {}
    chosen = Selection(layers={path: x for path, x in walked if supported(x)})
    candidates = dict(chosen.layers)

    def meant(name: str) -> set[str]:
        targets = getattr(config, name)
        found, error = _meant(name, targets, candidates, aliases, classifier, table)
        chosen.errors += [error] if error else []
        return found

    targeted = meant("lora_targets")
    excluded = meant("lora_exclude") if config.lora_exclude is not None else set()
    _find_trained(chosen, model, config, walked, classifier)
    for path, layer in walked:
        if id(layer) in chosen.trained:
            chosen.reasons[path] = FULLY_TRAINED
        elif not supported(layer):
            chosen.reasons[path] = f"no LoRA for {type(layer).__name__}"
    fully_trained = [path for path, x in candidates.items() if id(x) in chosen.trained]
    chosen.drop(fully_trained, FULLY_TRAINED)
    others = [path for path in chosen.layers if path not in targeted]
    if resolve(config.lora_targets, table)[0] is None:
        chosen.drop([path for path in others if path in classifier], "classifier")
        _drop_unfit(chosen, backend)
    else:
        chosen.drop(others, NOT_TARGETED)
    chosen.drop([p for p in chosen.layers if p in excluded], "in lora_exclude")
    _keep_numbered(chosen, config, aliases)
    if not chosen.layers:
        chosen.errors.append(_nothing_left(model, config))
    _check_patterns(chosen, config, aliases)
    _add_settings(chosen, backend, config, aliases)
    _check_support(chosen)
    _check_shared_variables(chosen, backend, walked)
    return chosen


def _drop_unfit(chosen: Selection, backend: Backend) -> None:
    """Drop layers that "all" does not include: position embeddings, and unbuilt layers.

    Some models of keras_hub create layers that they never call.
    """
    unused = [path for path, layer in chosen.layers.items() if not layer.built]
    chosen.drop(unused, "not built")
    embedding = backend.keras.layers.Embedding
    positions = [
        path
        for path, layer in chosen.layers.items()
        if isinstance(layer, embedding) and _POSITIONS.search(layer.name)
    ]
    chosen.drop(positions, "position embedding")


def _meant(
    name: str,
    targets: Targets,
    candidates: dict[str, Layer],
    aliases: Mapping[str, str],
    classifier: list[str],
    table: Presets,
) -> tuple[set[str], ValueError | None]:
    """Return the paths that targets mean, and an error if a name means none of them.

    ``aliases`` are timm's names of the layers of a model of another library. Presets have
    timm's names, and mean no layer whose own name happens to be one of them.
    """
    meant, is_preset = resolve(targets, table)
    check_expression(meant, name)
    if meant is None:
        found = {path for path in candidates if path not in classifier}
    else:
        found = {
            path
            for path in candidates
            if (path in aliases and matches(aliases[path], meant))
            or (matches(path, meant) and not (is_preset and aliases))
        }
    known = [*candidates, *(aliases[path] for path in candidates if path in aliases)]
    missing = [] if is_preset else unmatched(meant, known)
    if missing or not found:
        return found, no_match_error(missing or targets, candidates, table, name)
    return found, None


def _find_trained(
    chosen: Selection,
    model: Layer,
    config: LoRAConfig,
    walked: list[tuple[str, Layer]],
    classifier: list[str],
) -> None:
    """Find the layers to train fully."""
    if config.lora_train_classifier:
        chosen.trained |= inside_paths(walked, classifier)
        if not classifier:
            chosen.errors.append(
                ValueError(
                    f"Received lora_train_classifier=True for model '{model.name}', in which "
                    "no classifier was found: no dense layer computes its output. Leave the "
                    "argument out, and name layers to train fully in lora_train_modules."
                )
            )
    try:
        chosen.trained |= layers_under(walked, config.lora_train_modules)
    except ValueError as error:
        chosen.errors.append(error)


def _keep_numbered(chosen: Selection, config: LoRAConfig, aliases: Mapping[str, str]) -> None:
    """Drop the layers that are not in the blocks of ``lora_layers``."""
    wanted: Any = config.lora_layers
    if wanted is None or not chosen.layers:
        return
    patterns: Any = config.lora_layers_pattern
    numbers = {
        path: _first(index_of(name, patterns) for name in _names(path, aliases))
        for path in chosen.layers
    }
    known = sorted({number for number in numbers.values() if number is not None})
    missing = [number for number in wanted if number not in known]
    if missing:
        which = (
            f"their numbers are {', '.join(map(str, known))}"
            if known
            else f"none of their paths has such a number: {', '.join(list(numbers)[:10])}"
        )
        chosen.errors.append(
            ValueError(
                f"Received lora_layers={list(wanted)} and lora_layers_pattern={patterns}; no "
                f"layer to adapt is in the block {', '.join(map(str, missing))}: {which}. In "
                "lora_layers_pattern pass the name of the level before the number ('block' "
                "for 'block3/fc' or 'block/3/fc'), or choose layers with lora_targets."
            )
        )
    for path, number in numbers.items():
        if number not in wanted:
            where = "in no numbered block" if number is None else f"in block {number}"
            chosen.drop([path], f"{where}, not in lora_layers")


def _nothing_left(model: Layer, config: LoRAConfig) -> ValueError:
    names = ("lora_targets", "lora_exclude", "lora_layers", "lora_train_modules")
    given = {name: getattr(config, name) for name in names}
    listed = ", ".join(f"{n}={v!r}" for n, v in given.items() if v not in (None, (), []))
    return ValueError(
        f"Received {listed or 'lora_targets=None'} for model '{model.name}', which leave no "
        "layer to adapt: excluded and fully trained layers are not adapted. "
        "explain_targets(model, ...) returns the reason for every layer."
    )


def _names(path: str, aliases: Mapping[str, str]) -> list[str]:
    """Return the path of a layer and timm's name of it, if it has one."""
    return [path, aliases[path]] if path in aliases else [path]


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def _value(path: str, pattern: Mapping[str, Any], aliases: Mapping[str, str]) -> Any:
    """Return the value of a pattern for a layer by one of its names, or None."""
    return _first(value_for(name, pattern, None) for name in _names(path, aliases))


def _check_patterns(chosen: Selection, config: LoRAConfig, aliases: Mapping[str, str]) -> None:
    """Add an error for each key of a pattern that matches no layer to adapt."""
    for name in ("lora_rank_pattern", "lora_alpha_pattern"):
        for key in getattr(config, name):
            if not any(_value(path, {key: True}, aliases) for path in chosen.layers):
                near = ", ".join(nearest([key], list(chosen.layers), 10))
                chosen.errors.append(
                    ValueError(
                        f"Received {name} with the key {key!r}, which matches none of the "
                        f"layers to adapt: {near}."
                    )
                )


def _add_settings(
    chosen: Selection, backend: Backend, config: LoRAConfig, aliases: Mapping[str, str]
) -> None:
    """Add the settings of each layer to adapt, and drop projections without a block in
    ``lora_qkv``."""

    def settings_of(path: str, **more: Any) -> LayerSettings:
        arguments = config.layer_arguments()
        arguments["lora_train_bias"] = config.lora_train_bias != "none"
        rank = _first([_value(path, config.lora_rank_pattern, aliases), config.lora_rank])
        alpha = _first([_value(path, config.lora_alpha_pattern, aliases), config.lora_alpha])
        return LayerSettings.from_arguments(
            {**arguments, "lora_rank": rank, "lora_alpha": alpha, **more}, backend.keras
        )

    wanted = config.lora_qkv
    layouts = {path: qkv.layout_of(path) for path in chosen.layers}
    if wanted is not None and layouts and not any(layouts.values()):
        chosen.errors.append(
            ValueError(
                f"Received lora_qkv={wanted!r}, but none of the layers to adapt has the name "
                f"of a projection of attention ({', '.join(qkv.LAYOUTS)}). Leave the argument "
                f"out, or target such layers. Layers to adapt: {', '.join(list(layouts)[:10])}."
            )
        )
    for path, layout in layouts.items():
        if wanted is None or layout is None:
            chosen.settings[path] = settings_of(path)
            continue
        blocks = "".join(letter for letter in layout if letter in wanted)
        if not blocks:
            chosen.drop([path], not_in_qkv(wanted))
        elif len(layout) == 1:
            chosen.settings[path] = settings_of(path)
        else:
            chosen.settings[path] = settings_of(path, lora_qkv=blocks, lora_qkv_layout=layout)
    if layouts and not chosen.layers:
        chosen.errors.append(
            ValueError(
                f"Received lora_qkv={wanted!r}, but the layers to adapt have none of these "
                f"blocks: {', '.join(layouts)}. Target other layers."
            )
        )


def _check_support(chosen: Selection) -> None:
    """Add one error for all layers that cannot be adapted, and drop them."""
    problems = {}
    for path, settings in chosen.settings.items():
        layer: Any = chosen.layers[path]
        if not layer.built:
            problems[path] = "not built"
            continue
        try:
            lora_class(type(layer)).check_support(layer, settings)  # type: ignore[attr-defined]
        except ValueError as error:
            problems[path] = str(error)
    if problems:
        messages = (
            _NOT_BUILT.format(path) if x == "not built" else x for path, x in problems.items()
        )
        chosen.errors.append(ValueError("; ".join(messages)))
    for path, problem in problems.items():
        chosen.drop([path], problem)


def _check_shared_variables(
    chosen: Selection, backend: Backend, walked: list[tuple[str, Layer]]
) -> None:
    """Add an error for layers to adapt whose kernel or bias other layers use, too.

    Merging changes these variables, and would change the other layers with them.
    """
    users: dict[int, list[tuple[Any, str]]] = {}
    for path, layer in walked:
        for variable in backend.own_variables(layer):
            if not backend.leaves_kernel_alone(layer):
                users.setdefault(id(variable), []).append((layer, f"'{path or layer.name}'"))
        for variable in backend.variables_in_graph(layer):
            what = f"an operation in the graph of '{path or layer.name}'"
            users.setdefault(id(variable), []).append((None, what))
    problems = []
    for path, settings in chosen.settings.items():
        layer = chosen.layers[path]
        merged = [("kernel", kernel_variable(layer))]
        merged += [("bias", layer.bias)] if settings.lora_bias else []
        for name, variable in merged:
            found = users.get(id(variable), [])
            if not any(user is layer for user, _ in found):
                problems.append(f"the {name} of '{path}' is not a variable of that layer")
            others = [what for user, what in found if user is not layer]
            if others:
                problems.append(f"the {name} of '{path}' is also that of {', '.join(others)}")
    if problems:
        chosen.errors.append(
            ValueError(
                f"Received layers to adapt that share variables: {'; '.join(problems)}. An "
                "update merged into a shared variable would change every layer that uses it. "
                "Leave these layers out of lora_targets (or name them in lora_exclude), give "
                "each its own variable, or hold the layer instead of its variable."
            )
        )
