"""``combine_adapters``: combine several adapters into one, and measure the error."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.combine_trained_weights import (
    combine_trained_weights,
    different,
    listed,
)
from tfimm_lora.adapters.combine_updates import CombinationMethod, Loss, Term, norm_of_sum
from tfimm_lora.adapters.decompose import result_dtype
from tfimm_lora.adapters.fit import check_fits
from tfimm_lora.adapters.model_names import in_names_of
from tfimm_lora.adapters.torch_layout import base_kernel
from tfimm_lora.families.recognize import recognize_surely
from tfimm_lora.model.task_record import TaskRecord
from tfimm_lora.validation import check_number
from tfimm_lora.zoo.weights.module_names import ModuleNames

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
    """Combine several adapters into one weighted sum.

    The updates dW_i = s_i B_i A_i may differ in rank, scale (alpha, rsLoRA) and layers. An
    adapter without a layer contributes zero there. The result has the scale 1 everywhere. With
    weights w_i:

    ==================  ====================================================================
    combination_type    the update of a layer
    ==================  ====================================================================
    cat                 exactly sum w_i dW_i: A = [w_i s_i A_i], B = [B_i]; the ranks add up
    svd                 the best approximation of sum w_i dW_i of a given rank
    linear              B A with A = sum sign(w_i s_i) sqrt|w_i s_i| A_i, B = sum
                        sqrt|w_i s_i| B_i. These are PEFT's numbers. They are far from the
                        sum, since B A includes products of one adapter's B and another's A
    ties                keeps the ``density`` largest entries, elects the sign of each entry,
                        and averages the values of this sign
    dare_linear         keeps entries with probability ``density``, divides them by it, and
                        sums
    dare_ties           prunes like dare_linear, then elects signs like ties
    magnitude_prune     keeps the largest entries and sums
    ..._svd             ties, dare_linear, dare_ties or magnitude_prune of w_i dW_i, then the
                        best approximation of a given rank. Without _svd they work on A and B
                        like linear, which is fast and imprecise
    ==================  ====================================================================

    With DoRA this combines the directions. The magnitudes are averaged, sum w_i m_i / sum w_i,
    which needs no base model. No low-rank update is the exact sum of two such adapters, so with
    DoRA no combination type is exact, "cat" included; ``combination_errors(..., model=model)``
    returns the error. Biases of the branches are summed, w_i s_i c_i. An adapter of LoHa is
    combined as that of LoRA which it is equal to, of rank r^2.

    "cat" is the default because without DoRA it is exact for every input, and a larger rank
    costs nothing once the adapter is merged. Pass "svd" and a rank for a smaller adapter.

    Args:
        adapters: The adapters, all of the same base model.
        weights: One number for each adapter; negative numbers subtract (task arithmetic).
            None (default) means 1 for each, which is their sum; for the mean pass 1/n. A
            negative weight is the same as the negated adapter with the positive weight, in
            every combination type.
        combination_type: One of the above.
        rank: For svd and ..._svd, the largest rank of the result. A layer never gets more than
            its shape (and for svd the sum of the ranks) allows. None (default) means the
            largest rank of the adapters in the layer.
        density: For ties, dare_... and magnitude_prune, the fraction of entries to keep, in
            (0, 1]; 0.2 in the TIES paper.
        majority_sign_method: For ties: a sign is elected by the sum of values ("total") or
            by counting adapters ("frequency").
        seed: For dare: a layer uses the generator
            ``np.random.default_rng([seed, *path.encode()])``, which does not depend on the
            other layers.
        trained_whole: How to combine fully trained weights: biases and classifiers. Adapters
            hold their values and not their changes, so there is no sum. None (default)
            requires that all adapters have equal ones; an index keeps the weights of this
            adapter; "average" takes the mean with ``weights``, for adapters of one task.

    Returns:
        A new adapter, in float32, or in float64 if an adapter is. It keeps the base_model, and
        the dropout if the adapters agree (else 0).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; if the adapters are of different models, or
            differ in the shape or kind of a layer (or in its rank, if A and B are mixed); if
            fully trained weights differ and ``trained_whole`` is not given; or if adapters
            have the names of different libraries.

    Warns:
        UserWarning: If truncation to the rank loses more than a tenth of the update's norm.
            ``combination_errors`` returns the error of each layer.

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
    _check_names(adapters)
    method = CombinationMethod(combination_type, rank, density, majority_sign_method, seed)
    terms = _terms(adapters, weights)
    _check_layers(terms, method)
    _check_magnitudes(terms)
    base_model = _common_base_model(adapters)
    values, modules, bias = combine_trained_weights(adapters, weights, trained_whole)
    _check_not_both(terms, values)
    layers, losses = {}, {}
    for path, own in terms.items():
        update, losses[path] = method.combine(path, own)
        layers[path] = dataclasses.replace(update, **_vectors(own))
    _warn_of_losses(losses, method)
    dropouts = {adapter.dropout for adapter in adapters}
    dropout = dropouts.pop() if len(dropouts) == 1 else 0.0
    task = _common_task(adapters, trained_whole)
    return Adapter(layers, values, modules, base_model, bias, dropout, task=task)


def combination_errors(
    combined: Adapter,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    model: Any = None,
) -> dict[str, float]:
    """Compute the error of each layer of a combined adapter, relative to the exact sum.

    With the kernel W_i of a layer with adapter i, and W of the base model, the exact sum of the
    changes is D = sum w_i (W_i - W), and the error of the combined kernel W_c is
    |W_c - W - D| / |D| in Frobenius norm. Without DoRA W_i - W is the update dW_i, and the
    error is computed from the factors. With DoRA W_i is m_i (W + dW_i) / |W + dW_i|, so the
    base model is needed.

    After "svd" it is the error of the truncation; after "linear" or "ties" it is the distance
    from the sum. Any adapters can be compared, also two single ones. Biases and fully trained
    weights are not measured.

    Args:
        combined: The combined adapter.
        adapters, weights: As in ``combine_adapters``.
        model: The base model, with or without LoRA. Needed if an adapter has DoRA magnitudes.
            Adapters with the names of another library are translated to those of the model.

    Returns:
        Module path, with a model in its names -> relative error. It is infinite if the sum is
        zero and the change by ``combined`` is not.

    Raises:
        TypeError, ValueError: As ``combine_adapters``. Also ValueError if an adapter has
            magnitudes and no model is given, or if an adapter does not fit the model.

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
    if model is not None:
        names = ModuleNames(model)
        combined, *adapters = (in_names_of(names, x) for x in (combined, *adapters))
    _check_names([*adapters, combined])
    expected = _terms(adapters, weights)
    differences = _terms([*adapters, combined], [*weights, -1.0])
    _check_layers(differences, CombinationMethod("cat"))
    with_dora = [
        path
        for path, own in differences.items()
        if any(u.magnitude is not None for u, _ in own)
    ]
    if with_dora and model is None:
        raise ValueError(
            f"Received adapters with magnitudes (DoRA) in {listed(with_dora)}, and no model; "
            "their kernels depend on those of the base model. Pass model=the base model."
        )
    kernels = _base_kernels(model, [*adapters, combined]) if with_dora else {}
    errors = {}
    for path, difference in differences.items():
        own = expected.get(path, [])
        if path in kernels:
            error = _norm_of_changes(difference, kernels[path])
            size = _norm_of_changes(own, kernels[path])
        else:
            error, size = norm_of_sum(difference), norm_of_sum(own)
        errors[path] = error / size if size else (math.inf if error else 0.0)
    return errors


def _base_kernels(model: Any, adapters: Sequence[Adapter]) -> dict[str, np.ndarray]:
    """Return the base kernel of every layer that an adapter changes, in torch's order."""
    for adapter in adapters:
        check_fits(model, adapter)
    names = ModuleNames(model)
    paths = {path for adapter in adapters for path in adapter.layers}
    return {path: base_kernel(names.layers[names.paths[path]]) for path in paths}


def _norm_of_changes(terms: Sequence[Term], kernel: np.ndarray) -> float:
    """Return the Frobenius norm of sum w_i (W_i - W); 0 if it is only rounding."""
    changes = [w * (u.effective_kernel(kernel) - kernel.reshape(u.shape)) for u, w in terms]
    norm = float(np.linalg.norm(sum(changes, np.zeros(1))))
    return norm if norm > 1e-13 * np.linalg.norm(kernel) else 0.0


def _terms(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[Term]]:
    """Return module path -> the updates of this layer, each with its weight."""
    terms: dict[str, list[Term]] = {}
    for adapter, weight in zip(adapters, weights):
        for path, update in adapter.layers.items():
            terms.setdefault(path, []).append((update, weight))
    return terms


def _check_adapters(
    adapters: Iterable[Adapter], weights: Iterable[float] | None
) -> tuple[list[Adapter], list[float]]:
    """Check both arguments and return them as lists; the default weights are 1."""
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
                f"Received {adapter!r} in adapters; expected objects of the class Adapter. "
                "Read one from a folder with Adapter.load(path), or get the adapter of a model "
                "with adapter_of(model)."
            )
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ValueError(
            f"Received {len(weights)} weights for {len(adapters)} adapters; expected one "
            "for each."
        )
    for index, weight in enumerate(weights):
        check_number(weight, f"weights[{index}]")
    return [_as_lora(x) for x in adapters], [float(weight) for weight in weights]


def _as_lora(adapter: Adapter) -> Adapter:
    """Return an adapter of LoHa as that of LoRA which it is equal to."""
    if not adapter.use_loha:
        return adapter
    layers = {path: update.as_lora() for path, update in adapter.layers.items()}
    return dataclasses.replace(adapter, layers=layers)


def _check_names(adapters: Sequence[Adapter]) -> None:
    """Raise if adapters without a common layer have the names of different libraries."""
    if len(adapters) < 2 or any(a.layers.keys() & adapters[0].layers for a in adapters[1:]):
        return
    found = [recognize_surely([*x.layers], hint=x.base_model) for x in adapters]
    namings = [naming for naming in found if naming is not None]
    if len({(naming.library, naming.prefix) for naming in namings}) > 1:
        each = ", ".join(dict.fromkeys(str(naming) for naming in namings))
        raise ValueError(
            f"Received adapters with the names of several libraries: {each}; expected the same "
            "names in all. Translate them first, with translate_adapter or tfimm-lora convert."
        )


def _vectors(terms: list[Term]) -> dict[str, Any]:
    """Return the magnitude and the bias of a combined update, if it has them."""
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
    """Raise unless the DoRA magnitudes of every layer have a weighted mean."""
    for path, own in terms.items():
        without = sum(update.magnitude is None for update, _ in own)
        if 0 < without < len(own):
            raise ValueError(
                f"Received adapters of which only some have a magnitude (DoRA) in '{path}'; "
                "expected DoRA in all of them or in none."
            )
        total = sum(weight for _, weight in own)
        if not without and total <= 0:
            raise ValueError(
                f"Received weights with the sum {total:g} for the magnitudes (DoRA) of "
                f"'{path}'; expected a positive sum."
            )


def _check_layers(terms: Mapping[str, list[Term]], method: CombinationMethod) -> None:
    """Raise one error that names every layer whose updates cannot be combined."""
    problems, ranks_differ = [], False
    for path, own in terms.items():
        updates = [update for update, _ in own]
        shapes = different(update.shape for update in updates)
        kinds = different(update.kind for update in updates)
        ranks = different(update.rank for update in updates)
        if len(shapes) > 1:
            problems.append(f"'{path}' has the shapes {listed(shapes)}")
        elif len(kinds) > 1:
            problems.append(f"'{path}' has the kinds {listed(kinds)}")
        elif method.mixes_factors and len(ranks) > 1:
            ranks_differ = True
            problems.append(f"'{path}' has the ranks {listed(ranks)}")
        elif method.truncates and kinds == ["batched"]:
            problems.append(
                f"'{path}' is of the kind 'batched', which has a kernel for each position and "
                "cannot be truncated: pass 'cat' or a type that mixes factors"
            )
    if not problems:
        return
    advice = ""
    if ranks_differ:
        name = method.combination_type
        truncating = "svd" if name == "linear" else f"{name}_svd"
        advice = (
            f"\ncombination_type={name!r} combines A and B separately, which needs equal "
            f"ranks. Pass {truncating!r} or 'cat', which accept any ranks."
        )
    raise ValueError(
        "Received adapters that cannot be combined:\n" + "\n".join(problems) + advice
    )


def _common_base_model(adapters: Sequence[Adapter]) -> str:
    names = different(adapter.base_model for adapter in adapters if adapter.base_model)
    if len(names) > 1:
        raise ValueError(
            f"Received adapters of different models, {listed(names)}; expected the same base "
            "model. If these are names of one model, set one of them: "
            "dataclasses.replace(adapter, base_model=...)."
        )
    return names[0] if names else ""


def _common_task(adapters: Sequence[Adapter], choice: int | str | None) -> TaskRecord | None:
    """The task of a combination: that of all, or of the adapter with the classifier.

    What was chosen for the outputs of one adapter does not suit those of a combination.
    """
    tasks = [
        None if adapter.task is None else dataclasses.replace(adapter.task, chosen={})
        for adapter in adapters
    ]
    if isinstance(choice, int):
        return tasks[choice]
    if all(task == tasks[0] for task in tasks):
        return tasks[0]
    warnings.warn(
        "The adapters were trained for different tasks or labels, so the combination records "
        "none. To record one, pass the index of the adapter with the classifier as "
        "trained_whole, or set it: dataclasses.replace(adapter, task=...).",
        stacklevel=3,
    )
    return None


def _warn_of_losses(losses: Mapping[str, Loss], method: CombinationMethod) -> None:
    """Warn if truncation lost much of the norm over all layers."""
    size = math.hypot(*(loss.size for loss in losses.values()))
    lost = math.hypot(*(loss.lost for loss in losses.values()))
    if lost <= WARN_ABOVE * size:
        return
    share = {path: loss.lost / loss.size for path, loss in losses.items() if loss.size}
    worst = max(share, key=share.__getitem__)
    exact = ", or combination_type='cat' for the exact sum" if not method.rule else ""
    warnings.warn(
        f"combination_type={method.combination_type!r} lost {lost / size:.0%} of the norm of "
        f"the update by truncation, most in '{worst}' ({share[worst]:.0%}). "
        f"Pass a larger rank{exact}.",
        stacklevel=3,
    )


def _check_not_both(terms: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    both = [path for path in terms if f"{path}.weight" in values]
    if both:
        raise ValueError(
            f"Received adapters of which one fully trained {listed(both)} and another has an "
            "update of it; expected either in all. Pass the index of an adapter with the "
            "update as trained_whole, or remove the layer: "
            "dataclasses.replace(adapter, layers=...)."
        )
