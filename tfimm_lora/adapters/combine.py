"""``combine_adapters``: one adapter from several, and how far it is from their sum."""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.combine_trained_weights import combine_whole, different, listed
from tfimm_lora.adapters.combine_updates import Loss, Method, Term, norm_of_sum
from tfimm_lora.adapters.decompose import result_dtype

#: ``combine_adapters`` warns if truncation loses more than this share of the norm.
WARN_ABOVE = 0.1


def combine_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    combination_type: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
    trained_whole: int | str | None = None,
) -> Adapter:
    """One adapter that does what several do together, each with a weight.

    The updates dW_i = s_i B_i A_i may differ in rank, scale (alpha, rsLoRA) and in which
    layers they cover: where an adapter has no layer, its update is zero. The result has
    scale 1 everywhere. With weights w_i:

    ==================  ====================================================================
    combination_type    the update of a layer
    ==================  ====================================================================
    cat                 sum w_i dW_i exactly: A = [w_i s_i A_i], B = [B_i]; the ranks add up
    svd                 the nearest to sum w_i dW_i of a given rank
    linear              B A with A = sum sign(w_i s_i) sqrt|w_i s_i| A_i, B = sum
                        sqrt|w_i s_i| B_i: PEFT's numbers, but with the products of one
                        adapter's B and another's A in it, far from the sum
    ties                of entries only the ``density`` largest stay; each entry's sign is
                        elected, and what agrees with it averaged
    dare_linear         entries stay with probability ``density`` and are divided by it, then
                        are summed
    dare_ties           the same, then signs are elected as in ties
    magnitude_prune     only the largest entries stay, then are summed
    ..._svd             ties, dare_linear, dare_ties and magnitude_prune on w_i dW_i, then
                        the nearest update of a given rank; without _svd they are done on A
                        and B, as linear is, which is quick and rough
    ==================  ====================================================================

    Of DoRA's updates these are the directions, and the magnitudes are averaged with the
    weights: sum w_i m_i / sum w_i, which needs no base model. (No low-rank update is the sum of
    two such adapters.) Biases of branches are summed, w_i s_i c_i.

    "cat" is the default because it is what one expects of a sum, for every input; a larger
    rank costs nothing once the adapter is merged. Pass "svd" and a rank for a smaller one.

    Args:
        adapters: The adapters, all of one model.
        weights: A number for each; negative ones subtract (task arithmetic). None (default)
            means 1 for each, their sum; for the mean pass 1/n. A negative weight is the
            same as the negated adapter with the positive weight, in every type.
        combination_type: One of the above.
        rank: For svd and ..._svd, that of the result: at most this, as no layer gets more
            than its shape (and for svd the sum of the ranks) calls for. None (default)
            means the largest rank that an adapter has in the layer.
        density: For ties, dare_... and magnitude_prune, the share of entries that stay, in
            (0, 1]; 0.2 in the paper on TIES.
        majority_sign_method: For ties: a sign is elected by the sum of values ("total") or
            by counting adapters ("frequency").
        seed: For dare: a layer's random numbers are those of
            ``np.random.default_rng([seed, *path.encode()])``, so that they do not depend
            on the other layers.
        trained_whole: What becomes of weights that were trained whole, biases and
            classifiers. Adapters hold their values and not how they changed, so there is
            no sum. None (default) keeps them where all adapters have the same ones; an
            index keeps those of that adapter; "average" takes the mean with ``weights``,
            for adapters of one task.

    Returns:
        A new adapter, in float32, or float64 where an adapter is. It keeps the adapters'
        base_model, and dropout if they agree (else 0).

    Raises:
        TypeError, ValueError: for arguments out of their range, adapters of different
            models, layers that differ in shape or kind (or in rank, where A and B are
            mixed), or weights trained whole that differ and no ``trained_whole``.

    Warns:
        UserWarning: if truncation to the rank loses more than a tenth of the update's norm.
            ``combination_errors`` tells the error of each layer.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> cats = lora.Adapter({"fc": lora.LayerUpdate(np.ones((2, 8)), np.ones((4, 2)))})
        >>> dogs = lora.Adapter({"fc": lora.LayerUpdate(np.eye(1, 8), np.ones((4, 1)))})
        >>> both = combine_adapters([cats, dogs], [0.5, -1.0])
        >>> both.layers["fc"].rank, both.layers["fc"].delta()[0, :2]
        (3, array([0., 1.]))

    Reference: Ilharco et al., "Editing models with task arithmetic", arXiv:2212.04089;
    Yadav et al., "TIES-Merging", arXiv:2306.01708, section 4; Yu et al., "Language models
    are super Mario" (DARE), arXiv:2311.03099, section 3; names as in PEFT's
    ``add_weighted_adapter``.
    """
    adapters, weights = _check_adapters(adapters, weights)
    how = Method(combination_type, rank, density, majority_sign_method, seed)
    terms = _terms(adapters, weights)
    _check_layers(terms, how)
    _check_magnitudes(terms)
    base_model = _common_base_model(adapters)
    values, modules, bias = combine_whole(adapters, weights, trained_whole)
    _check_not_both(terms, values)
    layers, losses = {}, {}
    for path, own in terms.items():
        update, losses[path] = how.combine(path, own)
        layers[path] = dataclasses.replace(update, **_vectors(own))
    _warn_of_losses(losses, how)
    dropouts = {adapter.dropout for adapter in adapters}
    dropout = dropouts.pop() if len(dropouts) == 1 else 0.0
    return Adapter(layers, values, modules, base_model, bias, dropout)


def combination_errors(
    combined: Adapter, adapters: Sequence[Adapter], weights: Sequence[float] | None = None
) -> dict[str, float]:
    """How far each layer of a combined adapter is from the sum of the adapters.

    |dW - sum w_i dW_i| / |sum w_i dW_i| in Frobenius norm, computed from the factors alone.
    After "svd" that is the error of the truncation; after "linear" or "ties" it tells how
    far these are from a sum. Any adapter can be compared, also with a single one.

    Args:
        combined: The adapter to judge.
        adapters, weights: As in ``combine_adapters``.

    Returns:
        Module path -> relative error. It is infinite where the sum is zero and the
        combined adapter's update is not.

    Raises:
        TypeError, ValueError: as in ``combine_adapters``.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> one = lora.Adapter({"fc": lora.LayerUpdate(np.eye(1, 8), np.ones((4, 1)))})
        >>> two = lora.Adapter({"fc": lora.LayerUpdate(np.eye(1, 8), 3 * np.ones((4, 1)))})
        >>> errors = combination_errors(two, [one, two])
        >>> round(errors["fc"], 6)
        0.25
    """
    adapters, weights = _check_adapters(adapters, weights)
    _check_adapters([combined], None)
    expected = _terms(adapters, weights)
    differences = _terms([*adapters, combined], [*weights, -1.0])
    _check_layers(differences, Method("cat"))
    errors = {}
    for path, difference in differences.items():
        error = norm_of_sum(difference)
        size = norm_of_sum(expected.get(path, []))
        errors[path] = error / size if size else (math.inf if error else 0.0)
    return errors


def _terms(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Term]]:
    """Module path -> the updates of the adapters that have it, with their weights."""
    terms: dict[str, list[Term]] = {}
    for adapter, weight in zip(adapters, weights):
        for path, update in adapter.layers.items():
            terms.setdefault(path, []).append((update, weight))
    return terms


def _check_adapters(
    adapters: Iterable[Adapter], weights: Iterable[float] | None
) -> tuple[list[Adapter], list[float]]:
    """Both as lists, with weights of 1 where there are none."""
    if isinstance(adapters, Adapter) or not isinstance(adapters, Iterable):
        raise TypeError(
            f"Received adapters={adapters!r}; expected a list, for example [one, two]."
        )
    adapters = list(adapters)
    if not adapters:
        raise ValueError("Received no adapters; expected a list with at least one.")
    for adapter in adapters:
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"Received {adapter!r} among the adapters; expected values of the class "
                "Adapter. Read one from a folder with Adapter.load(path), or take that of a "
                "model with adapter_of(model)."
            )
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ValueError(
            f"Received {len(weights)} weights for {len(adapters)} adapters; expected one "
            "for each."
        )
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"Received weights={weights!r}; expected numbers.")
    weights = [float(weight) for weight in weights]
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"Received weights={weights!r}; expected finite numbers.")
    return adapters, weights


def _vectors(terms: list[Term]) -> dict[str, Any]:
    """The magnitude and the bias of a combined update, where there are any."""
    found: dict[str, Any] = {}
    dtype = result_dtype(*(update.a for update, _ in terms))
    if terms[0][0].magnitude is not None:
        total = sum(weight for _, weight in terms)
        mean: Any = sum(w / total * np.float64(1) * u.magnitude for u, w in terms)
        found["magnitude"] = mean.astype(dtype)
    if any(update.bias is not None for update, _ in terms):
        each = [w * np.float64(u.scale) * u.bias for u, w in terms if u.bias is not None]
        found["bias"] = np.sum(each, axis=0).astype(dtype)
    return found


def _check_magnitudes(terms: Mapping[str, list[Term]]) -> None:
    """Raise unless the magnitudes of updates that belong together have a mean."""
    for path, own in terms.items():
        without = sum(update.magnitude is None for update, _ in own)
        problem = None
        if 0 < without < len(own):
            problem = "in some adapters only; expected all of them with DoRA, or none"
        elif not without and sum(weight for _, weight in own) <= 0:
            problem = "and weights that add up to 0 or less; expected a positive sum"
        if problem:
            raise ValueError(
                f"Received adapters of which '{path}' has magnitudes (DoRA) {problem}."
            )


def _check_layers(terms: Mapping[str, list[Term]], how: Method) -> None:
    """Raise one error with every layer whose updates do not go together."""
    problems, of_rank = [], False
    for path, own in terms.items():
        updates = [update for update, _ in own]
        shapes = different(update.shape for update in updates)
        kinds = different(update.kind for update in updates)
        ranks = different(update.rank for update in updates)
        if len(shapes) > 1:
            problems.append(f"'{path}' has the shapes {listed(shapes)}")
        elif len(kinds) > 1:
            problems.append(f"'{path}' has the kinds {listed(kinds)}")
        elif how.mixes_factors and len(ranks) > 1:
            of_rank = True
            problems.append(f"'{path}' has the ranks {listed(ranks)}")
        elif how.truncates and kinds == ["batched"]:
            problems.append(
                f"'{path}' is of the kind 'batched', whose positions have kernels of their "
                "own and no decomposition together: pass 'cat', or one that mixes factors"
            )
    if not problems:
        return
    advice = ""
    if of_rank:
        name = "svd" if how.combination_type == "linear" else f"{how.combination_type}_svd"
        advice = (
            f"\ncombination_type={how.combination_type!r} mixes A and B by themselves, which "
            f"needs equal ranks. Pass {name!r} or 'cat', which take any."
        )
    raise ValueError(
        "Received adapters that do not go together:\n" + "\n".join(problems) + advice
    )


def _common_base_model(adapters: Sequence[Adapter]) -> str:
    names = different(adapter.base_model for adapter in adapters if adapter.base_model)
    if len(names) > 1:
        raise ValueError(
            f"Received adapters of different models, {listed(names)}; expected one model, "
            "as an update means nothing for other weights. If these are names of the same "
            "one, say so: dataclasses.replace(adapter, base_model=...)."
        )
    return names[0] if names else ""


def _warn_of_losses(losses: Mapping[str, Loss], how: Method) -> None:
    """Warn if the norm of what was truncated, over all layers, is large."""
    size = math.hypot(*(loss.size for loss in losses.values()))
    lost = math.hypot(*(loss.lost for loss in losses.values()))
    if lost <= WARN_ABOVE * size:
        return
    share = {path: loss.lost / loss.size for path, loss in losses.items() if loss.size}
    worst = max(share, key=share.__getitem__)
    exact = ", or combination_type='cat' for the exact sum" if not how.rule else ""
    warnings.warn(
        f"combination_type={how.combination_type!r} lost {lost / size:.0%} of the norm of the "
        f"update when it was truncated to a rank, most in '{worst}' ({share[worst]:.0%}). "
        f"Pass a larger rank{exact}.",
        stacklevel=3,
    )


def _check_not_both(terms: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    both = [path for path in terms if f"{path}.weight" in values]
    if both:
        raise ValueError(
            f"Received adapters of which one trained {listed(both)} whole and another has "
            "an update of the same; expected one or the other. Pass as trained_whole the "
            "index of an adapter with the update, or leave the layer out: "
            "dataclasses.replace(adapter, layers=...)."
        )
