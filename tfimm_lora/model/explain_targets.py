"""``explain_targets``: list the layers that LoRA would adapt, and why not the others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer
from tfimm_lora.config import LayerSettings
from tfimm_lora.layers.base import NotAdaptable, has_keras_call
from tfimm_lora.layers.conversion import adapt_layer, lora_class, restore_layer, supported
from tfimm_lora.model.targeting import check_ready, config_for, select
from tfimm_lora.utils.text_table import aligned_lines


@dataclass(frozen=True)
class TargetRow:
    """A layer with weights, and whether LoRA would adapt it.

    Attributes:
        path: Its path in the model; "" for the model itself, if it has weights of its own.
        kind: The name of its class.
        adapted: Whether it would be adapted.
        rank, alpha, scale: Of its update; None if it would not be adapted. An alpha of None
            means a scale of 1.
        reason: Why it would not be adapted; "" if it would be.
    """

    path: str
    kind: str
    adapted: bool
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None
    reason: str = ""


class TargetTable(list[TargetRow]):
    """The rows of ``explain_targets``, a list that prints as a table.

    Attributes:
        error: The message of the error that ``inject_lora`` would raise, or None.
    """

    def __init__(self, rows: list[TargetRow], error: str | None = None) -> None:
        super().__init__(rows)
        self.error = error

    @property
    def adapted(self) -> list[str]:
        """The paths of the layers that would be adapted."""
        return [row.path for row in self if row.adapted]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"layers": [dataclasses.asdict(row) for row in self], "error": self.error}

    def __str__(self) -> str:
        cells = [("layer", "kind", "rank", "scale", "")]
        for row in self:
            rank, scale = (str(row.rank), f"{row.scale:g}") if row.adapted else ("-", "-")
            cells.append((row.path or "(the model)", row.kind, rank, scale, row.reason))
        text = aligned_lines(cells, left=[True, True, False, False, True])
        text.append(f"{len(self.adapted)} of {len(self)} layers with weights would be adapted.")
        if self.error:
            text.append(f"inject_lora would raise: {self.error}")
        return "\n".join(text)

    __repr__ = __str__


def explain_targets(model: Any, **lora_arguments: Any) -> TargetTable:
    """List the layers that ``inject_lora`` would adapt, and for all others the reason.

    The model is not changed. If ``inject_lora`` would raise an error, because a name matches
    nothing or a layer cannot be adapted, the table contains its message.

    Args:
        model: A built model without LoRA.
        **lora_arguments: As for ``inject_lora``.

    Returns:
        A row for every layer with weights, in the order of the model. ``print`` shows it as
        a table; ``to_dict`` returns plain values.

    Raises:
        TypeError, ValueError: If an argument is unknown or out of range, or if the model is
            not built or has LoRA already.

    Example:
        >>> import tensorflow as tf
        >>> from tfimm_lora.model.explain_targets import explain_targets
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(8, name="fc1"),
        ...     tf.keras.layers.LayerNormalization(name="norm"),
        ...     tf.keras.layers.Dense(3, name="head")])
        >>> explain_targets(model, lora_rank=2)
        layer  kind                rank  scale
        fc1    Dense                  2      1
        norm   LayerNormalization     -      -  no LoRA for LayerNormalization
        head   Dense                  -      -  classifier
        1 of 3 layers with weights would be adapted.
    """
    config = config_for(model, lora_arguments, "explain_targets")
    check_ready(model)
    chosen = select(model, config)
    backend = backend_of(model)
    rows = []
    for path, layer in backend.walk(model):
        if not backend.own_variables(layer) and not supported(layer):
            continue
        kind, settings = type(layer).__name__, chosen.settings.get(path)
        reason = chosen.reasons.get(path, "") if settings is None else _refusal(layer, settings)
        if settings is None or reason:
            rows.append(TargetRow(path, kind, False, reason=reason))
        else:
            rows.append(
                TargetRow(path, kind, True, settings.rank, settings.alpha, settings.scale)
            )
    refusals = [row.reason for row in rows if row.path in chosen.settings and not row.adapted]
    problems = [*map(str, chosen.errors), *refusals]
    return TargetTable(rows, problems[0] if problems else None)


def _refusal(layer: Layer, settings: LayerSettings) -> str:
    """Return why a layer with its own ``call`` cannot be adapted, or "".

    This is found by adapting it for a moment.
    """
    if has_keras_call(lora_class(type(layer))):
        return ""
    # Zeros, so that no random number is drawn.
    zeros = backend_of(layer).keras.initializers.Zeros()
    try:
        adapt_layer(
            layer, dataclasses.replace(settings, lora_init="default", lora_initializer=zeros)
        )
    except NotAdaptable as error:
        return str(error)
    restore_layer(layer)
    return ""
