"""What layers that are computed again in the backward pass have in common on both Kerases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tfimm_lora.backend.interface import Tensor


class Leaves:
    """A nested structure of tensors and other values.

    Args:
        tree: What flattens it: ``keras.tree`` or ``tf.nest``.
        structure: The structure.
        is_tensor: Whether a leaf is a tensor.
    """

    def __init__(self, tree: Any, structure: Any, is_tensor: Callable[[Any], bool]) -> None:
        self.tree, self.structure = tree, structure
        self.values = tree.flatten(structure)
        self.places = [i for i, value in enumerate(self.values) if is_tensor(value)]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.values[place] for place in self.places]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Any:
        """The structure with other tensors in the places of its own."""
        values = list(self.values)
        for place, tensor in zip(self.places, tensors):
            values[place] = tensor
        return self.tree.pack_sequence_as(self.structure, values)


def refusal(name: str, reason: str, expected: str) -> ValueError:
    """The error for a block whose second pass would compute something else."""
    return ValueError(
        f"Block '{name}' {reason}, which gradient checkpointing does not support; expected "
        f"{expected}. Disable gradient checkpointing, or leave the block out."
    )


def added_loss(name: str) -> ValueError:
    """The error for a block that adds a loss."""
    return refusal(
        name,
        "adds a loss in its call (add_loss or an activity regularizer)",
        "a block without, because the loss would have no gradient",
    )


def masked_input(name: str) -> ValueError:
    """The error for a block whose input has a mask."""
    return refusal(
        name,
        "receives a mask with its inputs (Masking, or an embedding with mask_zero)",
        "inputs without, because the second pass would not have it",
    )


def changed_state(name: str, operation: str) -> ValueError:
    """The error for a block with an operation that cannot be repeated."""
    return refusal(
        name,
        f"draws random numbers or changes a state with {operation}",
        "random numbers of Keras' layers, such as Dropout, and no changes, because the second "
        "pass would compute something else",
    )
