"""``activation_bytes``: the memory of the activations in a training step."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of

#: Operations whose output shares the memory of their input.
_ALIASES = frozenset(
    ("Identity", "IdentityN", "Reshape", "Squeeze", "ExpandDims", "StopGradient")
)

#: Operations whose output exists without the forward pass: weights and inputs.
_FREE = frozenset(("ReadVariableOp", "VarHandleOp", "Const", "Placeholder"))


def activation_bytes(model: Any, input_shape: tuple[int, ...], batch_size: int) -> int | None:
    """Count the bytes of the activations that the backward pass of one step needs.

    These are the results of the forward pass that are used by the gradient of a trainable
    weight. They are counted in the graph of the step, which is traced but not run. Temporary
    memory and the memory that libraries reserve are not included. Effective kernels W + s A B
    that are kept for the backward pass are included; their size does not depend on the batch
    size. LoRA saves less memory here than for gradients and optimizer, because the gradients of
    its factors need the input of every adapted layer.

    Args:
        model: A built model, with the trainable weights of the training.
        input_shape: The shape of one input, for example (224, 224, 3).
        batch_size: The number of inputs in a step, a positive integer.

    Returns:
        The number of bytes; None on JAX and torch, where there is no such graph.

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
    """The names of the operations that are needed to compute the tensors."""
    needed: set[str] = set()
    waiting = [tensor.op for tensor in tensors]
    while waiting:
        op = waiting.pop()
        if op.name not in needed:
            needed.add(op.name)
            waiting += [tensor.op for tensor in op.inputs]
    return needed


def _source(tensor: Any) -> Any:
    """The tensor that owns the memory of a tensor."""
    while tensor.op.type in _ALIASES:
        tensor = tensor.op.inputs[tensor.value_index if tensor.op.type == "IdentityN" else 0]
    return tensor


def _bytes(tensor: Any) -> int:
    """The size of a tensor in bytes; 0 if its shape is unknown, as for tensors of shapes."""
    count = tensor.shape.num_elements()
    return 0 if count is None or not tensor.dtype.size else count * tensor.dtype.size
