"""Weights that an adapter replaced whole, and what they were before."""

from __future__ import annotations

from typing import Any, NamedTuple

_REPLACED, _SHELVED = "_lora_replaced", "_lora_shelved"


class Replaced(NamedTuple):
    """One weight: its variable, and the value that it had before any adapter."""

    variable: Any
    before: Any


def replaced(model: Any) -> dict[str, Replaced]:
    """The replaced weights of a model, by their key in adapters."""
    return dict(model.__dict__.get(_REPLACED, {}))


def remember(model: Any, weights: dict[str, Replaced]) -> None:
    """Say which weights of a model are replaced."""
    model.__dict__[_REPLACED] = weights


def give_back(model: Any) -> None:
    """Assign what the weights were before, and forget that they were replaced."""
    for weight in replaced(model).values():
        weight.variable.assign(weight.before)
    forget(model)


def forget(model: Any) -> None:
    """Take the weights as they are for the model's own."""
    model.__dict__.pop(_REPLACED, None)


def shelve(model: Any, values: dict[str, Any]) -> None:
    """Keep the values of an adapter that is disabled at the moment, by key."""
    model.__dict__[_SHELVED] = values


def shelved(model: Any) -> dict[str, Any]:
    """What ``shelve`` kept; empty where nothing is disabled."""
    return model.__dict__.get(_SHELVED, {})


def unshelve(model: Any) -> None:
    """The adapter is not disabled any more."""
    model.__dict__.pop(_SHELVED, None)
