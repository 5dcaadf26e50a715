"""``translate_adapter``: an adapter with the names of another library."""

from __future__ import annotations

import dataclasses
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.model_names import (
    base_norms,
    base_weights,
    check_library,
    naming_of_adapter,
    target_naming,
)
from tfimm_lora.adapters.translation import translate
from tfimm_lora.families.family import Family
from tfimm_lora.families.recognize import Naming
from tfimm_lora.zoo.weights.module_names import ModuleNames


def translate_adapter(
    adapter: Adapter,
    names: str,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    source_prefix: str | None = None,
    model: Any = None,
) -> Adapter:
    """Return an adapter with the names of another library.

    The updates stay the same. Where one library has separate layers for query, key and value
    and the other a fused projection, they are converted exactly: the rank of a fused projection
    is the sum of their ranks, unless they share A. The families and their names are listed in
    docs/reference/names.md.

    Args:
        adapter: The adapter, in the names of timm, transformers, keras_hub or
            keras.applications. Its library, family and prefix are found from its names and its
            ``base_model``.
        names: The library whose names the result has: "timm", "transformers", "keras_hub" or
            "applications".
        dialect: For transformers, the major version that will load the adapter: "v5" (default)
            or "v4".
        prefix: What comes before the names of the backbone in the result. Default: as in the
            library's model with a classifier, for example "vit." for ViTForImageClassification.
            "" is for a bare backbone (AutoModel).
        source_prefix: What comes before the names of the backbone in ``adapter``. Default:
            found from the names.
        model: The built base model, in any library. It is needed only for an adapter with DoRA
            or trained biases on some of query, key and value: the DoRA magnitude of a fused
            projection contains the norms of the base weights of the others, its bias their
            biases. Also where the names do not show the depths of the stages that they need.

    Returns:
        The adapter with the new names. Its ``base_model`` is the same.

    Raises:
        TypeError: If ``adapter`` is not an ``Adapter``.
        ValueError: If the library, the dialect or the family of the adapter is not known; if
            the library does not have that family, or lacks a name for some layers, which the
            message lists; or if ``model`` is needed and missing, or of another family.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> update = lora.LayerUpdate(np.ones((2, 8)), np.ones((8, 2)))
        >>> block = "vit.encoder.layer.0.attention.attention"
        >>> adapter = lora.Adapter({f"{block}.query": update, f"{block}.value": update})
        >>> timm = lora.translate_adapter(adapter, "timm")
        >>> [(name, x.shape) for name, x in timm.layers.items()]
        [('blocks.0.attn.qkv', (24, 8))]
        >>> list(lora.translate_adapter(timm, "transformers", dialect="v5").layers)
        ['vit.layers.0.attention.q_proj', 'vit.layers.0.attention.v_proj']
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"Received adapter={adapter!r}; expected an Adapter. Read a folder with "
            "Adapter.load."
        )
    check_library(names, dialect, prefix)
    source = naming_of_adapter(adapter, source_prefix)
    if model is None:
        target = target_naming(source, names, dialect, prefix)
        return adapter if source == target else translate(adapter, source, target)
    base = ModuleNames(model)
    own = _naming_of_base(base, source.family)
    source = dataclasses.replace(source, depths=own.depths or source.depths)
    target = target_naming(source, names, dialect, prefix)
    if source == target:
        return adapter
    return translate(adapter, source, target, base_norms(base, own), base_weights(base, own))


def _naming_of_base(names: ModuleNames, family: Family) -> Naming:
    """Return the naming of a model, which must be of a family."""
    model, naming = names.model, names.naming
    # Families may share their names, as ViT and DeiT do.
    if naming is None or not set(naming.family.rows) & set(family.rows):
        found = "not known" if naming is None else naming.family.name
        raise ValueError(
            f"Received model '{model.name}' ({type(model).__name__}), whose family is {found}, "
            f"for an adapter of the family {family.name}; expected its base model."
        )
    return naming
