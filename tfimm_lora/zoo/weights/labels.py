"""The names of the classes of a checkpoint."""

from __future__ import annotations

from typing import Any

from tfimm_lora.model.state import recorded_class_names


def labels_of(config: dict[str, Any]) -> list[str] | None:
    """Return the names of the classes in a config.json, or None if it has none.

    transformers writes id2label, timm label_names.

    Example:
        >>> labels_of({"id2label": {"1": "dog", "0": "cat"}})
        ['cat', 'dog']
    """
    table = config.get("id2label")
    if isinstance(table, dict) and table:
        numbered = {int(key): str(value) for key, value in table.items() if str(key).isdigit()}
        if sorted(numbered) == list(range(len(table))):
            return [numbered[index] for index in range(len(numbered))]
    names = config.get("label_names")
    return [str(name) for name in names] if isinstance(names, list) and names else None


def class_names(model: Any) -> tuple[str, ...] | None:
    """Return the names of the classes that a model's outputs stand for.

    Args:
        model: A model whose weights came from a checkpoint with ``load_timm_weights`` or
            ``create_model(pretrained=True)``.

    Returns:
        A name for each output, from the checkpoint's config.json (transformers' id2label or
        timm's label_names), or None if it has none.

    Raises:
        TypeError: If it is not a model.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(3)])
        >>> print(lora.class_names(model))
        None
    """
    if not hasattr(model, "__dict__"):
        raise TypeError(f"Received model={model!r}; expected a Keras model.")
    names = recorded_class_names(model)
    shape = getattr(model, "output_shape", None)
    if names is None or (isinstance(shape, tuple) and shape and shape[-1] != len(names)):
        return None  # the classifier was replaced
    return names
