"""The names of a model's layers and weights in an adapter.

For tfimm models these are timm's current names; for others the path of the layer with dots. If
Keras named a layer, the number in its name is replaced by a count within the layer around it,
since it differs between processes, and between two models in one process.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.families.recognize import Naming
from tfimm_lora.families.templates import Name
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.conversion import supported
from tfimm_lora.model.naming import is_tfimm, naming_of
from tfimm_lora.model.stable_paths import stable_paths
from tfimm_lora.model.targeting import require_built
from tfimm_lora.zoo.weights.key_layouts import layout_of_model
from tfimm_lora.zoo.weights.keys import (
    CheckpointVariable,
    checkpoint_variables,
    fits,
    key_of_path,
    to_keras,
    to_torch,
    torch_leaf,
)

#: Weights of tfimm's dense layers that are weights of 1x1 convolutions in timm, by class.
_CONVOLUTIONS_IN_TIMM = {"ResNetV2": ("head.fc.weight",)}


class ModuleNames:
    """The module paths and weight keys of one model.

    Attributes:
        model: The model.
        layers: Path -> layer, for every layer in the model.
        modules: Path of a layer -> its module path.
        paths: Module path -> path of the layer. It also has the names of timm's older layout.
        is_tfimm: Whether it is a model of tfimm, whose modules have timm's names.
        layout: timm's current key layout of a tfimm model, if its own is older.
    """

    def __init__(self, model: Any) -> None:
        require_built(model)
        self.model = model
        self.layers = {path: x for path, x in backend_of(model).walk(model) if path}
        self.layout = layout_of_model(model)
        classes = type(model).__mro__
        self._convolutions = [
            key for cls in classes for key in _CONVOLUTIONS_IN_TIMM.get(cls.__name__, ())
        ]
        self.is_tfimm = is_tfimm(model)
        self._stable = stable_paths(self.layers)
        self.modules = {path: self._module(self._stable[path]) for path in self.layers}
        self.paths = {self._old_module(self._stable[path]): path for path in self.layers}
        self.paths.update({module: path for path, module in self.modules.items()})
        adaptable = [path for path in self.layers if self.is_adaptable(path)]
        require_unique([(path, self.modules[path]) for path in adaptable], "layers")

    def _old_module(self, path: str) -> str:
        return key_of_path(path) if self.is_tfimm else path.replace("/", ".")

    def _module(self, path: str) -> str:
        return self._current(self._old_module(path))

    def _current(self, key: str) -> str:
        return self.layout.rename_back(key) if self.layout else key

    @functools.cached_property
    def naming(self) -> Naming | None:
        """The family and library of these names; None if they are not known."""
        return naming_of(self.model, self.modules)

    def timm_names(self, weight: ModelWeight) -> list[Name]:
        """Return the possible names of a weight in timm, the likeliest first."""
        if self.is_tfimm or self.naming is None:
            names = [weight.key, *map(self._current, weight.target.keys), *weight.old_keys]
            return [Name(name) for name in dict.fromkeys(names)]
        found = self.naming.to_timm(weight.key, is_weight=True)
        return [] if found is None else [found]

    def module_of(self, weight: ModelWeight, roots: list[str]) -> str:
        """Return the module under which PEFT would save a fully trained weight.

        Args:
            weight: The weight.
            roots: The paths that the user asked to train fully, the shortest first. If the
                weight is in none of them, it is the module of its own layer.
        """
        path = weight.path
        root = next((r for r in roots if path == r or path.startswith(r + "/")), path)
        # Where timm has other levels than tfimm, only the layers themselves correspond.
        return self.modules.get(path if self.layout else root, path.replace("/", "."))

    def is_adaptable(self, path: str) -> bool:
        """Whether the layer at a path has LoRA or can have it."""
        layer = self.layers[path]
        return isinstance(layer, LoRALayer) or supported(layer)

    def adapted(self) -> dict[str, LoRALayer]:
        """Return the LoRA layers by path."""
        return {path: x for path, x in self.layers.items() if isinstance(x, LoRALayer)}

    @functools.cached_property
    def weights(self) -> list[ModelWeight]:
        """The weights of the model without LoRA's factors."""
        weights = []
        unnamed: Counter[str] = Counter()
        for target in checkpoint_variables(self.model):
            path, _, leaf = target.name.rpartition("/")
            if leaf == "variable":  # it has no name
                leaf = f"variable_{unnamed[path]}" if unnamed[path] else "variable"
                unnamed[path] += 1
            stable = self._stable.get(path, path)
            named = target._replace(name=f"{stable}/{leaf}" if stable else leaf)
            if self.is_tfimm:
                old = named.keys
                key = self._current(_key(named))
            else:
                module = self._module(stable)
                key = f"{module}.{torch_leaf(named)}".strip(".")
                old = (key,)
            weights.append(ModelWeight(key, path, named, old, key in self._convolutions))
        return weights


class ModelWeight(NamedTuple):
    """A weight of a model that an adapter may hold a fully trained value for."""

    #: Its key in an adapter, for example "head.weight".
    key: str
    #: The path of its layer.
    path: str
    target: CheckpointVariable
    #: Its keys in timm's older layout.
    old_keys: tuple[str, ...]
    #: Whether it is the weight of a 1x1 convolution in timm.
    is_convolution: bool = False

    @property
    def variable(self) -> Any:
        """The Keras variable."""
        return self.target.variable

    @property
    def layer(self) -> Any:
        """The layer that owns the variable."""
        return self.target.layer

    def raw_value(self) -> np.ndarray:
        """Return the value of the variable; of a merged layer, unmerged."""
        if isinstance(self.layer, LoRALayer):
            return self.layer.value_of(self.variable, merged=False)
        value: np.ndarray = backend_of(self.layer).to_numpy(self.variable)
        return value

    def assign_raw(self, value: np.ndarray) -> None:
        """Assign a value to the variable. A merged layer is merged again, with this value."""
        merged = isinstance(self.layer, LoRALayer) and self.layer.merged
        if merged:
            self.layer.unmerge_weights()
        self.variable.assign(value)
        if merged:
            self.layer.merge_weights()

    def value(self) -> np.ndarray:
        """Return ``raw_value`` in torch's order of axes."""
        value = to_torch(self.raw_value(), self.target)
        return value[..., None, None] if self.is_convolution else value

    def fits(self, value: np.ndarray) -> bool:
        """Whether a value of an adapter has the shape of this weight."""
        return fits(value.shape, self.target)

    def in_keras_order(self, value: np.ndarray) -> np.ndarray:
        """Return a value of an adapter as one of the variable, in the dtype of the variable."""
        dtype = backend_of(self.layer).to_numpy(self.variable).dtype
        return to_keras(value, self.target).astype(dtype)

    def assign(self, value: np.ndarray) -> None:
        """Assign a value of an adapter to the variable."""
        self.assign_raw(self.in_keras_order(value))

    def is_bias(self) -> bool:
        """Whether the variable is a bias or the like."""
        return bool(backend_of(self.layer).is_bias_like(self.variable))


def require_unique(names: list[tuple[str, str]], kind: str) -> None:
    """Raise a ValueError if two layers or weights have the same name in an adapter.

    Args:
        names: Pairs of a path and its name in an adapter.
        kind: "layers" or "weights", for the message.
    """
    first: dict[str, str] = {}
    for path, name in names:
        if name in first:
            raise ValueError(
                f"The {kind} '{first[name]}' and '{path}' would both be called '{name}' in an "
                "adapter. Give them names that differ in more than '/' and '.'."
            )
        first[name] = path


def _key(target: CheckpointVariable) -> str:
    """Return timm's key of a weight of a tfimm model."""
    prefix = key_of_path(target.name.rpartition("/")[0])
    leaf = torch_leaf(target)
    return f"{prefix}.{leaf}" if prefix else leaf
