"""``explain_targets``: what LoRA would adapt in a model, and for each other layer why not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.config import LayerSettings
from tfimm_lora.layers.base import NotAdaptable, has_keras_call
from tfimm_lora.layers.conversion import adapt_layer, lora_class, restore_layer, supported
from tfimm_lora.model.targeting import check_ready, config_for, select


@dataclass(frozen=True)
class TargetRow:
    """A layer, and what LoRA would make of it.

    Attributes:
        path: Its path in the model; "" for the model itself, if it has weights of its own.
        kind: The name of its class.
        adapted: Whether it would be adapted.
        rank, alpha, scale: Of its update; None where it would not be adapted. An alpha of
            None is a scale of 1.
        reason: Why it would not be adapted; "" where it would.
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
        error: What ``inject_lora`` would raise for these arguments, or None.
    """

    def __init__(self, rows: list[TargetRow], error: str | None = None) -> None:
        super().__init__(rows)
        self.error = error

    @property
    def adapted(self) -> list[str]:
        """The paths of the layers that would be adapted."""
        return [row.path for row in self if row.adapted]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"layers": [dataclasses.asdict(row) for row in self], "error": self.error}

    def __str__(self) -> str:
        lines = [("layer", "kind", "rank", "scale", "")]
        for row in self:
            rank, scale = (str(row.rank), f"{row.scale:g}") if row.adapted else ("-", "-")
            lines.append((row.path or "(the model)", row.kind, rank, scale, row.reason))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        text = [
            "  ".join(
                (
                    *(cell.ljust(width) for cell, width in zip(line[:2], widths)),
                    *(cell.rjust(width) for cell, width in zip(line[2:4], widths[2:])),
                    line[4],
                )
            ).rstrip()
            for line in lines
        ]
        text.append(f"{len(self.adapted)} of {len(self)} layers with weights would be adapted.")
        if self.error:
            text.append(f"inject_lora would refuse this: {self.error}")
        return "\n".join(text)

    __repr__ = __str__


def explain_targets(model: Any, **lora_arguments: Any) -> TargetTable:
    """What ``inject_lora`` would adapt in a model, and for every other layer why not.

    The model stays as it is. Where ``inject_lora`` would raise, because a name matches
    nothing or a layer cannot be adapted, the table tells that too.

    Args:
        model: A built model without LoRA.
        **lora_arguments: As for ``inject_lora``.

    Returns:
        A row for every layer with weights, in the order of the model. The table prints
        itself; ``to_dict`` gives plain values.

    Raises:
        TypeError, ValueError: for an argument that is unknown or out of its range, or a
            model that is not built or has LoRA already.

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


def _refusal(layer: Any, settings: LayerSettings) -> str:
    """Why the call of a layer's own cannot be adapted, which only trying it tells."""
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
