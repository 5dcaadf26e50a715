"""The memory of a training step beside the weights: ``step_bytes`` and ``program_bytes``."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of

#: Operations whose output shares the memory of their input.
_ALIASES = frozenset(
    ("Identity", "IdentityN", "Reshape", "Squeeze", "ExpandDims", "StopGradient")
)

#: Operations whose output exists without the step: weights and inputs.
_FREE = frozenset(("ReadVariableOp", "VarHandleOp", "Const", "Placeholder"))

#: What a process of ``finetune`` holds beside the tensors of the training: Python, TensorFlow
#: with its compiled operations, the graph, and the next batches of pictures. Measured with
#: TensorFlow 2.21 on Linux; see benchmarks/plan_memory.py.
_PROGRAM = 1_200_000_000

#: TensorFlow's allocator keeps blocks of memory, and parts of them stay unused. This share of
#: the memory of the step, measured likewise.
_UNUSED = 0.1


def step_bytes(model: Any, input_shape: tuple[int, ...], batch_size: int) -> int | None:
    """Count the bytes of the activations and gradients of one step at their highest.

    The graph of the step is traced but not run. Its operations are taken in the order of the
    program: each result is there until its last use, and the gradients of the trainable
    weights until the end. Weights, inputs and what the optimizer keeps are not included, nor
    what an operation needs for itself. Effective kernels W + s A B that are kept for the
    backward pass are included. LoRA saves less memory here than for the optimizer, because the
    gradients of its factors need the input of every adapted layer.

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
        >>> from tfimm_lora.finetuning.step_memory import step_bytes
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((4,)), tf.keras.layers.Dense(8, activation="relu"),
        ...     tf.keras.layers.Dense(3)])
        >>> 1000 * (8 + 3) * 4 <= step_bytes(model, (4,), 1000) <= 1000 * 3 * (8 + 3) * 4
        True
    """
    if batch_size < 1:
        raise ValueError(f"Received batch_size={batch_size}; expected a positive integer.")
    keras = backend_of(model).keras
    if hasattr(keras, "ops") and keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    @tf.function  # type: ignore[untyped-decorator]
    def step(inputs: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
            loss = tf.add_n([tf.reduce_sum(y) for y in tf.nest.flatten(outputs)])
        gradients = tape.gradient(loss, list(model.trainable_weights))
        return [tf.convert_to_tensor(g) for g in gradients if g is not None]

    shape = (batch_size, *input_shape)
    traced = step.get_concrete_function(tf.TensorSpec(shape, "float32"))
    return _highest(traced.graph, traced.structured_outputs)


def program_bytes(step: int) -> int:
    """What a training takes beside its tensors, for a step of so many bytes, approximately."""
    return _PROGRAM + round(_UNUSED * step)


def _highest(graph: Any, results: list[Any]) -> int:
    """The most bytes that the tensors of a function's graph take at once. Its last operations
    take the results, which are therefore there until the end."""
    needed = _needed_for([*(tensor.op for tensor in results), *graph.control_outputs])
    operations = [op for op in graph.get_operations() if op.name in needed]
    last_use: dict[str, int] = {}
    for number, op in enumerate(operations):
        for tensor in op.inputs:
            last_use[_source(tensor).name] = number
    freed: dict[int, int] = {}
    live = highest = 0
    for number, op in enumerate(operations):
        if op.type not in _FREE and op.type not in _ALIASES:
            for tensor in op.outputs:
                live += _bytes(tensor)
                end = last_use.get(tensor.name, number)
                freed[end] = freed.get(end, 0) + _bytes(tensor)
        highest = max(highest, live)
        live -= freed.get(number, 0)
    return highest


def _needed_for(operations: list[Any]) -> set[str]:
    """The names of the operations that are needed to run these."""
    needed: set[str] = set()
    waiting = list(operations)
    while waiting:
        op = waiting.pop()
        if op.name not in needed:
            needed.add(op.name)
            waiting += [*(tensor.op for tensor in op.inputs), *op.control_inputs]
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
