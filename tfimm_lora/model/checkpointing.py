"""Gradient checkpointing: blocks are computed again in the backward pass."""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer
from tfimm_lora.layer_paths import nearest
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.state import original_class
from tfimm_lora.model.targeting import require_built
from tfimm_lora.validation import check_names

#: What ``enable_gradient_checkpointing`` sets in the instance of a block.
_MARK = "_lora_recomputed"


def enable_gradient_checkpointing(
    model: Layer, blocks: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Compute the blocks of a model again in the backward pass, which takes less memory.

    Training then keeps the input of each block instead of everything that is computed inside,
    and one block at a time is computed again for its gradients. The results are the same, also
    with dropout: the second pass draws the same random numbers. ``predict`` and ``evaluate`` do
    not change. Nothing of this is saved with a model, and copies of it do not have it.
    Derivatives in forward mode need it to be disabled.

    Args:
        model: A built model.
        blocks: The paths of the layers to compute again, such as "blocks/0". Default: the
            layers of which the model has several of one class, with layers inside, such as the
            blocks of a transformer or of a ConvNeXt. Stages are divided into theirs.

    Returns:
        The paths of the blocks.

    Raises:
        ValueError: if the model is not built or has no such layers, as functional models made
            of single layers such as those of ``keras.applications``, or a path is unknown or
            inside another, or a layer has a ``call`` that was set in the instance.
            Also in training, if a block receives a mask, adds a loss, or draws random numbers
            other than those of Keras' layers; on TensorFlow also if it is called in a
            ``tf.cond`` or a loop, and on legacy Keras if it changes variables, as batch
            normalization that is trained does.

    Example:
        >>> import tfimm_lora as lora
        >>> model = lora.create_model("vit_tiny_patch16_224", lora_rank=2)
        >>> lora.enable_gradient_checkpointing(model)[:2]
        ('blocks/0', 'blocks/1')
        >>> lora.disable_gradient_checkpointing(model)

    Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
    """
    require_built(model)
    backend = backend_of(model)
    layers = dict(backend.walk(model))
    if blocks is None:
        paths = repeated_blocks(model)
    else:
        check_names(blocks, "blocks")
        paths = list(blocks)
        _check_paths(model, layers, paths)
    for path in paths:
        own = layers[path].__dict__
        if "call" in own and _MARK not in own:
            raise ValueError(
                f"Received model '{model.name}', whose layer '{path}' has a call that was set "
                "in the instance; expected that of its class. Subclass the layer instead."
            )
    disable_gradient_checkpointing(model)
    for path in paths:
        call = _recomputed_call(model, layers[path])
        layers[path].__dict__.update({"call": call, _MARK: True})
    backend.reset_functions(model)
    return tuple(paths)


def disable_gradient_checkpointing(model: Layer) -> None:
    """Undo ``enable_gradient_checkpointing``; nothing happens if it was not called.

    Args:
        model: The model.
    """
    backend = backend_of(model)
    found = [layer for _, layer in backend.walk(model) if layer.__dict__.pop(_MARK, False)]
    for layer in found:
        layer.__dict__.pop("call")
    if found:
        backend.reset_functions(model)


def _recomputed_call(model: Layer, layer: Layer) -> Callable[..., Any]:
    """The ``call`` of a block of a model."""
    backend = backend_of(layer)

    def recomputed(self: Layer, *args: Any, **kwargs: Any) -> Any:
        # A block may use weights that it does not own. A copy has others than the model.
        trained = {id(v): v for v in (*model.trainable_weights, *self.trainable_weights)}
        call = functools.partial(type(self).call, self)
        return backend.recomputed_call(self, list(trained.values()), call, args, kwargs)

    # Keras looks at the arguments of a call, and so does its SavedModel format.
    signature = inspect.signature(type(layer).call)
    recomputed.__signature__ = signature  # type: ignore[attr-defined]
    return types.MethodType(recomputed, layer)


def repeated_blocks(model: Layer) -> list[str]:
    """The paths of the outermost layers with layers inside, of which there are several of one
    class. Those that contain several blocks are stages, and are divided into them.

    Raises:
        ValueError: if there are none.
    """
    backend = backend_of(model)
    layers = dict(backend.walk(model))
    inside = {path: _composite(backend, layer) for path, layer in layers.items()}
    paths = {id(layer): path for path, layer in layers.items()}
    counts = Counter(original_class(type(x)) for found in inside.values() for x in found)
    blocks: list[str] = []

    def visit(layer: Layer) -> None:
        children = inside[paths[id(layer)]]
        for child in children:
            is_stage = _is_stage(backend, inside[paths[id(child)]])
            if counts[original_class(type(child))] > 1 and not is_stage:
                blocks.append(paths[id(child)])
            else:
                visit(child)

    visit(model)
    if not blocks:
        raise ValueError(
            f"Received model '{model.name}', which has no layers of one class with layers "
            "inside, such as the blocks of a transformer; expected such a model, or the paths "
            "of the layers to compute again as blocks."
        )
    return blocks


def _is_stage(backend: Backend, children: list[Layer]) -> bool:
    """Whether some of these layers are the blocks of a stage.

    They are of one class and differ in a number of their names, as the MLPs of a block that are
    named by what they do do not. Attention layers of Keras and Sequential do not count.
    """
    classes = {id(x): original_class(type(x)) for x in children}
    own = [x for x in children if not backend.is_keras_class(classes[id(x)])]
    alike = Counter((classes[id(x)], re.sub(r"\d+", "", x.name)) for x in own)
    return any(count > 1 for count in alike.values())


def _composite(backend: Backend, layer: Layer) -> list[Layer]:
    """The layers directly inside a layer with several layers inside that have weights."""

    def count(child: Layer) -> int:
        return sum(
            bool(backend.own_variables(x)) for _, x in backend.walk(child) if x is not child
        )

    inside = backend.sublayers(layer)
    return [x for x in inside if not isinstance(x, LoRALayer) and count(x) > 1]


def _check_paths(model: Layer, layers: dict[str, Layer], paths: list[str]) -> None:
    unknown = [path for path in paths if path not in layers or not path]
    if unknown or not paths:
        candidates = [path for path in layers if path]
        raise ValueError(
            f"Received blocks={paths!r} for model '{model.name}'; expected paths of its "
            f"layers. Nearest first: {', '.join(nearest(map(str, paths), candidates, 3))}."
        )
    for path in paths:
        around = [other for other in paths if path.startswith(f"{other}/")]
        if around or paths.count(path) > 1:
            other = around[0] if around else path
            raise ValueError(
                f"Received blocks with {path!r} and {other!r}; expected each layer once, and "
                "none inside another."
            )
