"""``explain``: which places of a picture a model's answer depends on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.explanations.feature_maps import FeatureMap, feature_maps, sides_of
from tfimm_lora.explanations.resizing import enlarged
from tfimm_lora.model.output_activation import like_softmax, returning_logits
from tfimm_lora.model.state import recorded_class_names, recorded_task
from tfimm_lora.validation import check_integer

GRAD_CAM, INTEGRATED_GRADIENTS = "grad_cam", "integrated_gradients"

#: The methods, and what they are called in texts.
METHODS = {GRAD_CAM: "Grad-CAM", INTEGRATED_GRADIENTS: "integrated gradients"}

#: The task whose outputs are numbers and no evidence for labels.
_REGRESSION = "regression"

Target = int | str | None


@dataclass(frozen=True)
class Explanation:
    """Heat maps for pictures, as ``explain`` returns them.

    Attributes:
        maps: For each place of a picture how much the output depends on it, float32 of shape
            (n, h, w). The largest value of a map is 1, of a map without any evidence 0.
        targets: The output that each map is about, (n,).
        outputs: The outputs of the model, (n, k), before a softmax or sigmoid.
        method: "grad_cam" or "integrated_gradients".
        layer: The path of the layer whose feature map was used.
        grid: The places of that feature map, (rows, columns). The maps have no finer details.
        labels: The names of the outputs, if the model records them.
    """

    maps: np.ndarray = field(repr=False)
    targets: np.ndarray
    outputs: np.ndarray = field(repr=False)
    method: str
    layer: str
    grid: tuple[int, int]
    labels: tuple[str, ...] | None = None

    def __str__(self) -> str:
        """The method in words: "Grad-CAM on layer 'conv' (7 x 7 places)"."""
        rows, columns = self.grid
        return f"{METHODS[self.method]} on layer '{self.layer}' ({rows} x {columns} places)"


def explain(
    model: Any,
    pictures: Any,
    target: Target | Sequence[Target] = None,
    method: str = "auto",
    *,
    layer: str | None = None,
    steps: int = 8,
    batch_size: int = 8,
) -> Explanation:
    """Show which places of pictures an output of a model depends on.

    Let F (rows, columns, channels) be the feature map of a layer for a picture, y(F) the output
    before the softmax or sigmoid, and G(F) = dy/dF. The evidence at a place p is

        grad_cam:              sum_c mean_q(G(F)[q, c]) F[p, c]
        integrated_gradients:  sum_c mean_k(G(a_k F)[p, c]) F[p, c]

    with the mean over all places q, and over as many numbers a_k as steps, in the middles of
    equal parts of [0, 1]. Integrated gradients sum up to y(F) - y(0), apart from the error of
    the steps. Grad-CAM uses the last feature map of a convolutional network. In a transformer,
    attention mixes the places, so the tokens of the last layers tell little of them: there the
    first tokens are used, which are the patches of the picture.

    Evidence against a label is set to 0. For a model that was fine-tuned for a regression,
    whose outputs are numbers, the absolute value is taken. The result is enlarged to the size
    of the picture with linear interpolation, and divided by its maximum. So maps show where the
    evidence is and not how much there is; maps of different pictures cannot be compared.

    The model may have LoRA, merged or not.

    Args:
        model: A model for pictures that returns outputs (n, k).
        pictures: Inputs of the model, preprocessed, (n, h, w, channels); or (n, channels, h, w)
            for a model with channels first.
        target: The output to explain: its number, or its label if the model records labels, as
            ``Run.model()`` does. A list has one for each picture. Default: the largest output
            of each picture; of a regression the first number.
        method: "grad_cam" or "integrated_gradients". Default: "auto", integrated gradients if
            the last feature map consists of tokens, as in transformers, otherwise Grad-CAM.
        layer: The path of a layer, as ``lora.explain_targets(model)`` lists them. Class tokens
            and registers of its output are left out. Default: the last layer with a feature map
            of more than one place; for integrated gradients the first one with tokens, if
            there is one.
        steps: The number of steps of integrated gradients. Each takes about as long as a
            training step. Default: 8.
        batch_size: The number of pictures for which gradients are computed at once. Default: 8.

    Returns:
        An ``Explanation`` with the ``maps`` (n, h, w).

    Raises:
        TypeError: if a target is neither a number nor a label.
        ValueError: if the pictures or outputs have another shape, an argument is not one of
            those above, or no layer has a feature map. The model is unchanged.

    Warns:
        UserWarning: if the outputs look like those of a softmax that cannot be left out, whose
            gradients are tiny where the model is sure, or if they do not depend on the feature
            map.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((8, 8, 1)), tf.keras.layers.Conv2D(2, 1, name="features"),
        ...     tf.keras.layers.GlobalAveragePooling2D(), tf.keras.layers.Dense(2)])
        >>> model.layers[0].set_weights([np.array([[[[1.0, -1.0]]]]), np.zeros(2)])
        >>> model.layers[-1].set_weights([np.eye(2), np.zeros(2)])  # 0: bright, 1: dark
        >>> picture = np.zeros((1, 8, 8, 1), "float32")
        >>> picture[0, 2, 5] = 1
        >>> found = lora.explain(model, picture)
        >>> np.argwhere(found.maps[0] > 0.5).tolist()
        [[2, 5]]
        >>> print(found)
        Grad-CAM on layer 'features' (8 x 8 places)

    References: Selvaraju et al., "Grad-CAM", arXiv:1610.02391; Sundararajan et al., "Axiomatic
    Attribution for Deep Networks", arXiv:1703.01365.
    """
    if method not in ("auto", *METHODS):
        raise ValueError(
            f"Received method={method!r}; expected 'auto', {', '.join(map(repr, METHODS))}."
        )
    check_integer(batch_size, "batch_size", least=1)
    check_integer(steps, "steps", least=1)
    pictures = _checked_pictures(pictures)
    backend, task = backend_of(model), recorded_task(model)
    labels = recorded_class_names(model) if task is None else task.labels
    is_regression = task is not None and task.name == _REGRESSION
    targets = _listed(target, len(pictures))
    with backend.eagerly(), returning_logits(model) as is_known:
        found = feature_maps(model, pictures[:1])
        if method == "auto":
            method = INTEGRATED_GRADIENTS if found and found[-1].has_tokens else GRAD_CAM
        chosen = _chosen(found, layer, method, model, pictures.shape)
        gradients = _Gradients(backend, model, chosen, steps, method)
        parts = []
        for start in range(0, len(pictures), batch_size):
            batch = slice(start, start + batch_size)
            features, outputs = gradients.features(pictures[batch])
            values = gradients.array(outputs)
            numbers = _numbers(targets[batch], values, labels, is_regression)
            slopes = gradients.slopes(pictures[batch], features, numbers, values.shape[1])
            parts.append((chosen.places(gradients.array(features)), slopes, values, numbers))
    features, slopes, outputs, numbers = (np.concatenate(x) for x in zip(*parts))
    _warn(model, chosen, slopes, None if is_known else outputs)
    if method == GRAD_CAM:
        slopes = slopes.mean((1, 2), keepdims=True)
    evidence = (features * slopes).sum(-1)
    evidence = np.abs(evidence) if is_regression else np.maximum(evidence, 0)
    maps = enlarged(evidence, sides_of(pictures)[0])
    largest = maps.max((1, 2), keepdims=True)
    maps = np.divide(maps, largest, out=np.zeros_like(maps), where=largest > 0)
    return Explanation(
        maps.astype(np.float32), numbers, outputs, method, chosen.path, chosen.grid, labels
    )


class _Gradients:
    """Feature maps of a layer, and the gradients of a model's outputs with respect to them."""

    def __init__(
        self, backend: Backend, model: Layer, found: FeatureMap, steps: int, method: str
    ) -> None:
        self.backend, self.model, self.found = backend, model, found
        #: The numbers that the feature maps are multiplied with.
        self.factors = [1.0]
        if method == INTEGRATED_GRADIENTS:
            self.factors = [(step + 0.5) / steps for step in range(steps)]

    def array(self, tensor: Tensor) -> np.ndarray:
        return self.backend.to_numpy(tensor).astype(np.float64)

    def features(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """The outputs of the layer and of the model."""
        kept = []

        def function(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            kept.append(call(*args, **kwargs))
            return kept[-1]

        with self.backend.calls_replaced([(self.found.layer, function)]):
            outputs = self.model(pictures, training=False)
        shape = tuple(getattr(outputs, "shape", ()))
        if len(shape) != 2 or shape[0] != len(pictures):
            received = f"outputs of shape {shape}" if shape else f"a {type(outputs).__name__}"
            raise ValueError(
                f"Received model '{self.model.name}', which returns {received} for "
                f"{len(pictures)} pictures; expected outputs of shape (pictures, labels)."
            )
        return kept[0], outputs

    def slopes(
        self, pictures: np.ndarray, features: Tensor, numbers: np.ndarray, count: int
    ) -> np.ndarray:
        """The gradients of these outputs, averaged over the steps: (n, rows, columns, c)."""
        cast = self.backend.ops.cast

        def outputs(features: Tensor) -> Tensor:
            function = lambda call, *args, **kwargs: features  # noqa: E731
            with self.backend.calls_replaced([(self.found.layer, function)]):
                return cast(self.model(pictures, training=False), "float32")

        # The gradient of the sum: no output depends on another picture.
        direction = cast(np.eye(count)[numbers], "float32")
        total = np.zeros(tuple(features.shape))
        for factor in self.factors:
            slopes = self.backend.vjp(outputs, features * factor, direction)
            if slopes is not None:
                total += self.array(slopes)
        return self.found.places(total / len(self.factors))


def _chosen(
    found: Sequence[FeatureMap],
    path: str | None,
    method: str,
    model: Layer,
    shape: tuple[int, ...],
) -> FeatureMap:
    """The layer at a path, or that which suits a method."""
    if not found:
        raise ValueError(
            f"Received model '{model.name}', in which no layer returns a feature map of more "
            f"than one place for pictures of shape {shape[1:]}; expected a convolutional "
            "network or a transformer. Its answers cannot be explained with places."
        )
    if path is None:
        with_tokens = [one for one in found if one.has_tokens]
        first = with_tokens and method == INTEGRATED_GRADIENTS
        return with_tokens[0] if first else found[-1]
    for one in found:
        if one.path == path:
            return one
    known = any(path == other for other, _ in backend_of(model).walk(model))
    problem = (
        "which is called several times or returns no feature map of more than one place"
        if known
        else "which does not exist"
    )
    raise ValueError(
        f"Received layer={path!r} for model '{model.name}', {problem}; expected one of those "
        f"with a feature map. The last of them: {', '.join(x.path for x in found[-8:])}."
    )


def _warn(
    model: Layer, found: FeatureMap, slopes: np.ndarray, unknown: np.ndarray | None
) -> None:
    if not slopes.any():
        warnings.warn(
            f"The outputs of model '{model.name}' do not depend on the feature map of layer "
            f"'{found.path}', so the maps are 0. Pass another layer.",
            stacklevel=3,
        )
    if unknown is not None and unknown.shape[1] > 1 and like_softmax(unknown):
        warnings.warn(
            f"Model '{model.name}' seems to return probabilities, whose gradients are tiny "
            "where it is sure; expected logits. Leave the softmax out of the model.",
            stacklevel=3,
        )


def _checked_pictures(pictures: Any) -> np.ndarray:
    array = np.asarray(pictures)
    if array.ndim != 4 or not len(array) or min(array.shape) < 1:
        raise ValueError(
            f"Received pictures of shape {array.shape}; expected (pictures, height, width, "
            "channels), at least one. For a single picture, pass picture[None]."
        )
    return array.astype(np.float32)


def _listed(target: Any, count: int) -> list[Target]:
    """A target for each picture."""
    if isinstance(target, np.integer):
        target = int(target)
    if target is None or isinstance(target, (str, int)):
        return [target] * count
    if not isinstance(target, (list, tuple, np.ndarray)):
        raise TypeError(
            f"Received target={target!r}; expected the number or label of an output, None, or "
            "a list with one for each picture."
        )
    if len(target) != count:
        raise ValueError(
            f"Received {len(target)} targets for {count} pictures; expected one for each."
        )
    return list(target)


def _numbers(
    targets: Sequence[Target],
    values: np.ndarray,
    labels: Sequence[str] | None,
    is_regression: bool,
) -> np.ndarray:
    """The numbers of the outputs to explain, (n,)."""
    default = np.zeros(len(values), int) if is_regression else values.argmax(1)
    count = values.shape[1]
    pairs = zip(targets, default)
    return np.array([int(x) if t is None else _number(t, count, labels) for t, x in pairs])


def _number(target: Any, count: int, labels: Sequence[str] | None) -> int:
    """The number of an output."""
    if isinstance(target, str):
        if labels is None or target not in labels:
            known = "a number: the model records no labels"
            if labels is not None:
                known = f"one of its labels: {', '.join(map(repr, labels[:20]))}"
            raise ValueError(f"Received target={target!r}; expected {known}.")
        return list(labels).index(target)
    if isinstance(target, bool) or not isinstance(target, (int, np.integer)):
        raise TypeError(
            f"Received target={target!r}; expected the number or label of an output, or None."
        )
    if not 0 <= target < count:
        raise ValueError(
            f"Received target={target} for a model with {count} outputs; expected a number "
            f"from 0 to {count - 1}."
        )
    return int(target)
