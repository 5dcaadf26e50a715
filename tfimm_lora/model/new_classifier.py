"""Add a classifier to a backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.model.classifier import classifier_paths

#: The names of the new layers, as in keras_hub's ``ImageClassifier``.
_POOLER, _HEAD = "pooler", "predictions"


def with_classifier(backbone: Any, classes: int) -> Any:
    """Create a classifier of pictures from a backbone, which becomes a part of it.

    The pooled features of the backbone are the inputs of a new dense layer:

    | Output of the backbone | Pooled features |
    |---|---|
    | feature maps (height, width, d) | their mean over all positions |
    | a vector (d,), for example SigLIP's pooled output | the vector |
    | tokens of DINOv2, DINOv3 | the class token and the mean of the patch tokens (2 d) |
    | tokens of ViT, DeiT, CLIP, MetaCLIP 2, BLIP-2 | the class token |
    | tokens of Swin, and of a ViT without class token | their mean |

    Args:
        backbone: A functional or Sequential model that takes pictures, of shape
            (batch, height, width, channels), and returns features: of keras_hub,
            ``keras.applications`` with ``include_top=False``, or your own. Its layers are
            reused.
        classes: The number of classes.

    Returns:
        A functional model that returns logits, of shape (batch, classes). Its last layer is a
        ``Dense`` with the name "predictions".

    Raises:
        ValueError: If the backbone does not take pictures, or if it is not known how to pool
            its outputs.

    Example:
        >>> import tensorflow as tf
        >>> from tfimm_lora.model.new_classifier import with_classifier
        >>> backbone = tf.keras.Sequential([
        ...     tf.keras.Input((8, 8, 3)), tf.keras.layers.Conv2D(4, 3)])
        >>> with_classifier(backbone, 5).output_shape
        (None, 5)

    References: Oquab et al., "DINOv2", arXiv:2304.07193, section 7.1;
    ``Dinov2ForImageClassification`` of transformers; ``ImageClassifier`` of keras_hub.
    """
    backend = backend_of(backbone)
    inputs, pooled = _pooled_outputs(backbone)
    dense = backend.keras.layers.Dense(classes, dtype=_policy(backbone), name=_HEAD)
    return backend.keras.Model(inputs, dense(pooled), name=f"{backbone.name}_classifier")


def with_pooling(backbone: Any) -> Any:
    """Create a model of pictures that returns the pooled features of a backbone, (batch, d).

    Args:
        backbone: As for ``with_classifier``, which pools alike.

    Raises:
        ValueError: As ``with_classifier``.
    """
    inputs, pooled = _pooled_outputs(backbone)
    return backend_of(backbone).keras.Model(inputs, pooled, name=backbone.name)


def _pooled_outputs(backbone: Any) -> tuple[Tensor, Tensor]:
    """The symbolic input of a model around a backbone, and the pooled features."""
    backend = backend_of(backbone)
    if not takes_pictures(backbone):
        raise ValueError(
            f"Received the backbone '{backbone.name}' ({type(backbone).__name__}); expected a "
            "functional or Sequential model with one input of shape (batch, height, width, "
            f"channels). {_ADD_YOUR_OWN}"
        )
    entry = backbone.inputs[0]
    name = getattr(backbone, "input_names", None) or [entry.name]
    inputs = backend.keras.Input(
        tuple(entry.shape)[1:], dtype=entry.dtype, name=str(name[0]).partition(":")[0]
    )
    named = isinstance(getattr(backbone, "_inputs_struct", None), dict)
    entries = {key: inputs for key in backbone._inputs_struct} if named else inputs
    return inputs, _pooled(backend, backbone, backbone(entries))


def initialize_classifier(model: Layer) -> None:
    """Initialize the kernels of dense classifiers as Keras' Dense does by default.

    Glorot's uniform initializer takes the inputs and the outputs into account. The
    EfficientNets of ``keras.applications`` scale theirs by the number of classes alone, so that
    with few classes the first loss is large.
    """
    backend = backend_of(model)
    layers = dict(backend.walk(model))
    for path in classifier_paths(model):
        layer: Any = layers[path]
        if isinstance(layer, backend.keras.layers.Dense):
            glorot = backend.keras.initializers.GlorotUniform()
            layer.kernel.assign(glorot(tuple(layer.kernel.shape), layer.kernel.dtype))


def takes_pictures(model: Layer) -> bool:
    """Whether a model is functional or Sequential, with one input of pictures."""
    backend = backend_of(model)
    is_known = backend.is_functional(model) or isinstance(model, backend.keras.Sequential)
    inputs = getattr(model, "inputs", None) or []
    return bool(is_known and len(inputs) == 1 and backend.rank_of(inputs[0]) == 4)


_ADD_YOUR_OWN = (
    "Add a classifier yourself: keras.Model(inputs, keras.layers.Dense(classes)(features))."
)


class _Tokens(NamedTuple):
    """How the tokens of a class of backbones are pooled.

    Attributes:
        class_token: Whether the class token, the first, is among the pooled features.
        patch_tokens: Whether the mean of the patch tokens is.
        prefix: Returns the number of tokens before the patch tokens.
        norm: The epsilon of the layer normalization that the backbone leaves to its user.
    """

    class_token: bool
    patch_tokens: bool
    prefix: Callable[[Any], int] = lambda backbone: 0
    norm: float | None = None


def _with_registers(backbone: Any) -> int:
    return 1 + int(backbone.num_register_tokens)


_CLASS, _MEAN = _Tokens(True, False), _Tokens(False, True)
_BOTH = _Tokens(True, True, _with_registers)

#: The classes of keras_hub whose backbones return tokens.
_TOKENS = {
    "DINOV2Backbone": _BOTH,
    "DINOV3Backbone": _BOTH,
    "ViTBackbone": _CLASS,
    "DeiTBackbone": _CLASS,
    "BLIP2VisionEncoder": _CLASS,
    "CLIPVisionEncoder": _CLASS,
    "MetaCLIP2VisionEncoder": _Tokens(True, False, norm=1e-5),
    "SwinTransformerBackbone": _MEAN,
}


def _pooled(backend: Backend, backbone: Any, outputs: Any) -> Tensor:
    """The symbolic features (batch, d) of a backbone's outputs."""
    if isinstance(outputs, dict):
        if "sequence_output" in outputs:  # CLIP, which returns an inner layer's output, too
            outputs = outputs["sequence_output"]
        elif getattr(backbone, "stage_names", None):  # HGNetV2
            outputs = outputs[backbone.stage_names[-1]]
    layers = backend.keras.layers
    rank = None if isinstance(outputs, (dict, list, tuple)) else backend.rank_of(outputs)
    if rank == 2:
        return outputs
    if rank == 4:
        layout = getattr(backbone, "data_format", None)
        pooler = layers.GlobalAveragePooling2D(layout, dtype=_policy(backbone), name=_POOLER)
        return pooler(outputs)
    names = [cls.__name__ for cls in type(backbone).__mro__]
    rule = next((_TOKENS[name] for name in names if name in _TOKENS), None)
    if rank != 3 or rule is None:
        raise ValueError(
            f"Received the backbone '{backbone.name}' ({type(backbone).__name__}), whose "
            f"outputs have the shape {backbone.output_shape}; expected one output, of shape "
            f"(batch, height, width, d) or (batch, d). {_ADD_YOUR_OWN}"
        )
    if not getattr(backbone, "use_class_token", True):
        rule = _MEAN
    if rule.norm is not None:
        norm = layers.LayerNormalization(
            epsilon=rule.norm, dtype=_policy(backbone), name="post_layer_norm"
        )
        outputs = norm(outputs)
    features = [outputs[:, 0]] if rule.class_token else []
    if rule.patch_tokens:
        pooler = layers.GlobalAveragePooling1D(dtype=_policy(backbone), name=_POOLER)
        features += [pooler(outputs[:, rule.prefix(backbone) :])]
    if len(features) == 1:
        return features[0]
    return layers.Concatenate(dtype=_policy(backbone), name="features")(features)


def _policy(backbone: Any) -> Any:
    return getattr(backbone, "dtype_policy", None)
