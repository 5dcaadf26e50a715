"""``explain``: which places of a picture a model's answer depends on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.explanations.feature_maps import FeatureMap, feature_maps, sides_of
from tfimm_lora.explanations.resizing import enlarged
from tfimm_lora.model.output_activation import like_softmax, returning_logits
from tfimm_lora.model.state import recorded_class_names, recorded_task
from tfimm_lora.validation import check_integer

#: The methods, and what they are called in texts.
METHODS = {"grad_cam": "Grad-CAM", "hires_cam": "HiResCAM"}

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
        method: "grad_cam" or "hires_cam".
        layer: The path of the layer whose feature map was used.
        grid: The places of that feature map, (rows, columns). The maps have no finer details.
        labels: The names of the outputs, if the model records them.
    """

    maps: np.ndarray
    targets: np.ndarray
    outputs: np.ndarray
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
    batch_size: int = 8,
) -> Explanation:
    """Show which places of pictures an output of a model depends on.

    Let F (rows, columns, channels) be the feature map of a layer for a picture, y the output
    before the softmax or sigmoid, and G = dy/dF. The evidence at a place p is

        grad_cam:   sum_c mean_q(G[q, c]) F[p, c]
        hires_cam:  sum_c G[p, c] F[p, c]

    where the mean is that over all places. Evidence against a label is set to 0. For a model
    that was fine-tuned for a regression, whose outputs are numbers, the absolute value is
    taken. The result is enlarged to the size of the picture with linear interpolation, and
    divided by its maximum. So maps show where the evidence is and not how much there is; maps
    of different pictures or labels cannot be compared.

    The tokens of a transformer are a feature map, too; class tokens and registers are left out.
    The model may have LoRA, merged or not.

    Args:
        model: A model for pictures that returns outputs (n, k).
        pictures: Inputs of the model, preprocessed, (n, h, w, channels); or (n, channels, h, w)
            for a model with channels first.
        target: The output to explain: its number, or its label if the model was fine-tuned by
            this package. A list has one for each picture. Default: the largest output of each
            picture; of a regression the first number.
        method: "grad_cam" or "hires_cam". Default: "auto", Grad-CAM for maps of convolutional
            networks and HiResCAM for tokens.
        layer: The path of a layer, as in ``lora.plan(model)``. Default: the last one with a
            feature map of more than one place on which the outputs depend.
        batch_size: The number of pictures for which gradients are computed at once. Default: 8.

    Returns:
        An ``Explanation`` with the ``maps`` (n, h, w).

    Raises:
        TypeError: if a target is neither a number nor a label.
        ValueError: if the pictures or outputs have another shape, an argument is not one of
            those above, or no layer has a feature map. The model is unchanged.

    Warns:
        UserWarning: if the outputs look like those of a softmax that cannot be left out, whose
            gradients are tiny where the model is sure.

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

    References: Selvaraju et al., "Grad-CAM", arXiv:1610.02391; Draelos and Carin, "Use HiResCAM
    instead of Grad-CAM", arXiv:2011.08891.
    """
    if method not in ("auto", *METHODS):
        raise ValueError(
            f"Received method={method!r}; expected 'auto', {', '.join(map(repr, METHODS))}."
        )
    check_integer(batch_size, "batch_size", least=1)
    pictures = _checked_pictures(pictures)
    backend, task = backend_of(model), recorded_task(model)
    labels = recorded_class_names(model) if task is None else task.labels
    is_regression = task is not None and task.name == _REGRESSION
    targets = _listed(target, len(pictures))
    with backend.eagerly(), returning_logits(model) as is_known:
        gradients = _Gradients(backend, model)
        found = gradients.feature_map(pictures[:1], layer)
        parts = []
        for start in range(0, len(pictures), batch_size):
            part = slice(start, start + batch_size)
            parts.append(
                gradients.of(found, pictures[part], targets[part], labels, is_regression)
            )
    features, slopes, outputs, numbers = (np.concatenate(x) for x in zip(*parts))
    if not is_known and outputs.shape[1] > 1 and like_softmax(outputs):
        warnings.warn(
            f"Model '{model.name}' seems to return probabilities, whose gradients are tiny "
            "where it is sure; expected logits. Leave the softmax out of the model.",
            stacklevel=2,
        )
    if method == "auto":
        method = "grad_cam" if found.others is None else "hires_cam"
    if method == "grad_cam":
        slopes = slopes.mean((1, 2), keepdims=True)
    evidence = (features * slopes).sum(-1)
    evidence = np.abs(evidence) if is_regression else np.maximum(evidence, 0)
    maps = enlarged(evidence, sides_of(pictures)[0])
    largest = maps.max((1, 2), keepdims=True)
    maps = np.divide(maps, largest, out=np.zeros_like(maps), where=largest > 0)
    return Explanation(
        maps.astype(np.float32), numbers, outputs, method, found.path, found.grid, labels
    )


class _Gradients:
    """Feature maps of a model and the gradients of its outputs with respect to them."""

    def __init__(self, backend: Backend, model: Layer) -> None:
        self.backend, self.model = backend, model

    def feature_map(self, pictures: np.ndarray, path: str | None) -> FeatureMap:
        """The layer at a path, or the last one on whose places the outputs depend."""
        found, outputs = feature_maps(self.model, lambda: self._run(pictures), pictures)
        self._check(outputs, len(pictures))
        if path is not None:
            return self._at(path, found)
        if not found:
            raise ValueError(
                f"Received model '{self.model.name}', in which no layer returns a feature map "
                f"for pictures of shape {pictures.shape[1:]}; expected a convolutional network "
                "or a transformer. Its answers cannot be explained with places."
            )
        # In any direction: a single output may not depend on a picture at all.
        direction = np.random.default_rng(0).normal(size=tuple(outputs.shape))
        last = found[-1]
        for one in reversed(found):
            if (one.others is None, one.channels) != (last.others is None, last.channels):
                continue  # such as queries and keys, or what is between two layers of an MLP
            if self._slopes(one, pictures, direction).any():
                return one
        return last

    def _at(self, path: str, found: list[FeatureMap]) -> FeatureMap:
        for one in found:
            if one.path == path:
                return one
        known = any(path == other for other, _ in self.backend.walk(self.model))
        problem = (
            "which is called several times or returns no feature map of more than one place"
            if known
            else "which does not exist"
        )
        listed = ", ".join(x.path for x in found[-8:]) or "none"
        raise ValueError(
            f"Received layer={path!r} for model '{self.model.name}', {problem}; expected one "
            f"of those with a feature map. The last of them: {listed}."
        )

    def _check(self, outputs: Any, count: int) -> None:
        shape = tuple(getattr(outputs, "shape", ()))
        if len(shape) != 2 or shape[0] != count:
            received = f"outputs of shape {shape}" if shape else f"a {type(outputs).__name__}"
            raise ValueError(
                f"Received model '{self.model.name}', which returns {received} for {count} "
                "pictures; expected outputs of shape (pictures, labels)."
            )

    def of(
        self,
        found: FeatureMap,
        pictures: np.ndarray,
        targets: Sequence[Target],
        labels: Sequence[str] | None,
        is_regression: bool,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Feature maps, gradients, outputs and numbers of the targets of a batch."""
        features, outputs = self._features(found, pictures)
        values = self._array(outputs)
        default = np.zeros(len(values), int) if is_regression else values.argmax(1)
        numbers = np.array(
            [
                int(best) if one is None else _number(one, values.shape[1], labels)
                for one, best in zip(targets, default)
            ]
        )
        direction = np.eye(values.shape[1])[numbers]
        slopes = self._slopes(found, pictures, direction, features)
        return found.places(self._array(features)), slopes, values, numbers

    def _run(self, pictures: np.ndarray) -> Tensor:
        return self.model(pictures, training=False)

    def _array(self, tensor: Tensor) -> np.ndarray:
        return self.backend.to_numpy(tensor).astype(np.float64)

    def _features(self, found: FeatureMap, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        """The outputs of the layer and of the model."""
        kept = []

        def function(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            kept.append(call(*args, **kwargs))
            return kept[-1]

        with self.backend.calls_replaced([(found.layer, function)]):
            outputs = self._run(pictures)
        return kept[0], outputs

    def _slopes(
        self,
        found: FeatureMap,
        pictures: np.ndarray,
        direction: np.ndarray,
        features: Tensor | None = None,
    ) -> np.ndarray:
        """The gradient of ``sum(outputs * direction)`` with respect to the feature map."""
        if features is None:
            features, _ = self._features(found, pictures)

        def outputs(features: Tensor) -> Tensor:
            function = lambda call, *args, **kwargs: features  # noqa: E731
            with self.backend.calls_replaced([(found.layer, function)]):
                return self.backend.ops.cast(self._run(pictures), "float32")

        direction = self.backend.ops.cast(direction, "float32")
        slopes = self.backend.vjp(outputs, features, direction)
        zeros = np.zeros(tuple(features.shape))
        return found.places(zeros if slopes is None else self._array(slopes))


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
    if target is None or isinstance(target, (str, int, np.integer)):
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
