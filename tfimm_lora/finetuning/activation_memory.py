"""``activation_bytes``: what a training step keeps of its forward pass."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of

#: Operations whose output is the memory of their input.
_ALIASES = frozenset(
    ("Identity", "IdentityN", "Reshape", "Squeeze", "ExpandDims", "StopGradient")
)

#: Operations whose output is there without the forward pass: weights and inputs.
_FREE = frozenset(("ReadVariableOp", "VarHandleOp", "Const", "Placeholder"))


def activation_bytes(model: Any, input_shape: tuple[int, ...], batch_size: int) -> int | None:
    """The bytes of the activations that the backward pass of one step needs.

    Counted in the graph of the step, which is traced and not run: the results of the forward
    pass that are used again for a gradient of a trainable weight. What is needed for a short
    time only, and what libraries reserve, comes on top. LoRA saves less here than elsewhere:
    gradients of its factors need the input of every adapted layer.

    Args:
        model: A built model; its trainable weights are those that are trained.
        input_shape: The shape of one input, for example (224, 224, 3).
        batch_size: The number of inputs in a step, a positive integer.

    Returns:
        The bytes; None where Keras 3 does not run on TensorFlow, as there is no such graph.

    Raises:
        ValueError: for a batch size that is not positive.

    Example:
        >>> import tensorflow as tf
        >>> from tfimm_lora.finetuning.activation_memory import activation_bytes
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(8, activation="relu"),
        ...     tf.keras.layers.Dense(3)])
        >>> activation_bytes(model, (4,), 2) == 2 * 8 * 4
        True
    """
    if batch_size < 1:
        raise ValueError(f"Received batch_size={batch_size}; expected a positive integer.")
    keras = backend_of(model).keras
    if hasattr(keras, "ops") and keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    forward: list[Any] = []

    @tf.function  # type: ignore[untyped-decorator]
    def step(inputs: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
            loss = tf.add_n([tf.reduce_sum(y) for y in tf.nest.flatten(outputs)])
        forward.extend(loss.graph.get_operations())
        gradients = tape.gradient(loss, list(model.trainable_weights))
        return [g for g in gradients if g is not None]

    shape = (batch_size, *input_shape)
    traced = step.get_concrete_function(tf.TensorSpec(shape, "float32"))
    first = {op.name for op in forward}
    backward = _needed_for(traced.structured_outputs) - first
    kept = {}
    for op in forward:
        for tensor in op.outputs:
            if any(user.name in backward for user in tensor.consumers()):
                source = _source(tensor)
                kept[source.name] = source
    return sum(_bytes(tensor) for tensor in kept.values() if tensor.op.type not in _FREE)


def _needed_for(tensors: Any) -> set[str]:
    """The names of the operations that tensors come from: others are never run."""
    needed: set[str] = set()
    waiting = [tensor.op for tensor in tensors]
    while waiting:
        op = waiting.pop()
        if op.name not in needed:
            needed.add(op.name)
            waiting += [tensor.op for tensor in op.inputs]
    return needed


def _source(tensor: Any) -> Any:
    """The tensor whose memory a tensor is."""
    while tensor.op.type in _ALIASES:
        tensor = tensor.op.inputs[tensor.value_index if tensor.op.type == "IdentityN" else 0]
    return tensor


def _bytes(tensor: Any) -> int:
    """Those of a tensor; 0 where its shape is not known before it is run (of shapes)."""
    count = tensor.shape.num_elements()
    return 0 if count is None or not tensor.dtype.size else count * tensor.dtype.size
