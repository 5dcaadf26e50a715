"""Gradients that compute a function again, on torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tfimm_lora.backend.interface import Tensor


def recomputed(
    function: Callable[..., list[Tensor]], tensors: Sequence[Tensor], trained: Sequence[Any]
) -> list[Tensor]:
    """``function(*tensors)``. Its gradient calls it again instead of keeping what it computed.

    ``torch.utils.checkpoint`` keeps what the gradients of ``keras.ops.custom_gradient`` hold,
    which are the inputs of all adapted layers.

    Args:
        function: It is called twice, and computes the same both times.
        tensors: The tensors that may have a gradient.
        trained: The parameters that may have one.
    """

    class Recomputed(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.save_for_backward(*inputs)
            ctx.random = _random_states()
            return tuple(function(*inputs[: len(tensors)]))

        @staticmethod
        @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, *gradients: Any) -> Any:
            given = ctx.saved_tensors[: len(tensors)]
            inputs = [
                x.detach().requires_grad_(need) for x, need in zip(given, ctx.needs_input_grad)
            ]
            with torch.enable_grad(), _with_random_states(ctx.random):
                again = function(*inputs)
            pairs = [(y, dy) for y, dy in zip(again, gradients) if y.requires_grad]
            needed = [x for x in (*inputs, *trained) if x.requires_grad]
            if not pairs:
                return (None,) * (len(inputs) + len(trained))
            outputs, upstream = zip(*pairs)
            found = iter(torch.autograd.grad(outputs, needed, upstream, allow_unused=True))
            return tuple(next(found) if x.requires_grad else None for x in (*inputs, *trained))

    return list(Recomputed.apply(*tensors, *trained))


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
