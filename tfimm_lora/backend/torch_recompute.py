"""Gradients that compute a function again, on torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import torch

from tfimm_lora.backend.interface import Tensor


def recomputed(
    function: Callable[..., Any], tensors: Sequence[Tensor], trained: Sequence[Any], name: str
) -> Any:
    """``function(*tensors)``. Its gradient calls it again instead of keeping what it computed.

    ``torch.utils.checkpoint`` keeps what the gradients of ``keras.ops.custom_gradient`` hold,
    which are the inputs of all adapted layers.

    Args:
        function: It is called twice, and computes the same both times.
        tensors: The tensors that may have a gradient.
        trained: The parameters that have one.
        name: The name of the layer; not used here.
    """
    structure: list[Any] = []

    class Recomputed(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.save_for_backward(*inputs)
            ctx.random = _random_states()
            outputs = function(*inputs[: len(tensors)])
            structure[:] = [outputs]
            return tuple(keras.tree.flatten(outputs))

        @staticmethod
        @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, *gradients: Any) -> Any:
            given = ctx.saved_tensors[: len(tensors)]
            inputs = [
                x.detach().requires_grad_(need) for x, need in zip(given, ctx.needs_input_grad)
            ]
            with torch.enable_grad(), _with_random_states(ctx.random):
                again = keras.tree.flatten(function(*inputs))
            pairs = [
                (y, dy)
                for y, dy in zip(again, gradients)
                if torch.is_tensor(y) and y.requires_grad
            ]
            needed = [x for x in (*inputs, *trained) if x.requires_grad]
            outputs, upstream = zip(*pairs)
            found = iter(torch.autograd.grad(outputs, needed, upstream, allow_unused=True))
            return tuple(next(found) if x.requires_grad else None for x in (*inputs, *trained))

    flat = Recomputed.apply(*tensors, *trained)
    return keras.tree.pack_sequence_as(structure[0], list(flat))


def _random_states() -> tuple[Tensor, list[Tensor]]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), devices


@contextlib.contextmanager
def _with_random_states(states: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """For layers that draw from torch's own generators."""
    with torch.random.fork_rng():
        torch.set_rng_state(states[0])
        if states[1]:
            torch.cuda.set_rng_state_all(states[1])
        yield
