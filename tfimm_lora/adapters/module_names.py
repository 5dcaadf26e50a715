"""What the layers and the weights of a model are called in an adapter.

Names are timm's of today for tfimm models; for others the layer's path with dots. Where Keras
named a layer itself, its number counts within the layer around it: another process, or a
second model in this one, gives it another.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.conversion import supported
from tfimm_lora.zoo.weights.key_layouts import layout_of_model
from tfimm_lora.zoo.weights.keys import (
    Wanted,
    fits,
    key_of_path,
    leaf_of,
    to_keras,
    torch_axes,
    wanted_variables,
)

#: Weights of dense layers of tfimm that are those of 1x1 convolutions in timm, by class.
_CONVOLUTIONS_IN_TIMM = {"ResNetV2": ("head.fc.weight",)}


class ModuleNames:
    """The names of one model in adapters.

    Attributes:
        layers: Path -> layer, of every layer in the model.
        modules: Path of a layer -> its module path.
        paths: Module path -> path of the layer. Names of the older layout of timm are
            understood as well.
    """

    def __init__(self, model: Any) -> None:
        layers = {path: x for path, x in backend_of(model).walk(model) if path}
        self._model = model
        self._layout = layout_of_model(model)
        classes = [cls.__name__ for cls in type(model).__mro__]
        self._convolutions = [
            key for name in classes for key in _CONVOLUTIONS_IN_TIMM.get(name, ())
        ]
        self.layers = layers
        self._steady = _steady_paths(layers)
        self._is_tfimm = hasattr(model, "cfg") and any(
            cls.__module__.partition(".")[0] == "tfimm" for cls in type(model).__mro__
        )
        self.modules = {path: self._module(self._steady[path]) for path in layers}
        self.paths = {self._old_module(self._steady[path]): path for path in layers}
        self.paths.update({module: path for path, module in self.modules.items()})
        can = [p for p, x in layers.items() if isinstance(x, LoRALayer) or supported(x)]
        require_unique([(path, self.modules[path]) for path in can], "layers")

    def _old_module(self, path: str) -> str:
        return key_of_path(path) if self._is_tfimm else path.replace("/", ".")

    def _module(self, path: str) -> str:
        return self._current(self._old_module(path))

    def _current(self, key: str) -> str:
        return self._layout.rename_back(key) if self._layout else key

    def module_of(self, weight: Weight, roots: list[str]) -> str:
        """The module by which PEFT would save a weight whole: the largest one that was asked
        for, or that of the weight's own layer."""
        path = weight.path
        root = next((r for r in roots if path == r or path.startswith(r + "/")), path)
        # Where timm has other levels than tfimm, only the layers themselves correspond.
        return self.modules.get(path if self._layout else root, path.replace("/", "."))

    def adapted(self) -> dict[str, LoRALayer]:
        """The LoRA layers by path."""
        return {path: x for path, x in self.layers.items() if isinstance(x, LoRALayer)}

    @functools.cached_property
    def weights(self) -> list[Weight]:
        """The weights of the model, but for LoRA's factors."""
        weights = []
        for wanted in wanted_variables(self._model):
            path, _, leaf = wanted.name.rpartition("/")
            steady = self._steady.get(path, path)
            named = wanted._replace(name=f"{steady}/{leaf}" if steady else leaf)
            if self._is_tfimm:
                old = named.keys
                key = self._current(_key(named))
            else:
                key = f"{self._module(steady)}.{_key(named).rpartition('.')[2]}".strip(".")
                old = (key,)
            weights.append(Weight(key, path, named, old, key in self._convolutions))
        return weights


def require_unique(names: list[tuple[str, str]], what: str) -> None:
    """Raise if two layers or weights would have one name in an adapter."""
    first: dict[str, str] = {}
    for path, name in names:
        if name in first:
            raise ValueError(
                f"The {what} '{first[name]}' and '{path}' would both be called '{name}' in an "
                "adapter. Give them names that differ in more than '/' and '.'."
            )
        first[name] = path


def _steady_paths(layers: dict[str, Any]) -> dict[str, str]:
    """Paths with the numbers of names that Keras gave replaced by an order of appearance."""
    steady: dict[str, str] = {"": ""}
    counts: dict[tuple[str, str], int] = {}
    for path, layer in layers.items():  # parents first
        above = path.rpartition("/")[0]
        while above not in steady:
            above = above.rpartition("/")[0]
        name = path[len(above) :].strip("/")
        given = re.fullmatch(rf"{_own_name(layer)}(_\d+)?", name)
        if given:
            stem = re.sub(r"_\d+$", "", name)
            place = counts.get((above, stem), 0)
            counts[above, stem] = place + 1
            name = f"{stem}_{place}" if place else stem
        steady[path] = f"{steady[above]}/{name}".strip("/")
    return steady


def _own_name(layer: Any) -> str:
    """What Keras calls a layer of this class that is given no name: "multi_head_attention"."""
    plain = next(c for c in type(layer).__mro__ if not c.__module__.startswith("tfimm_lora"))
    words = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", plain.__name__)
    own = re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
    # Legacy Keras calls a functional model so.
    return "(functional|model)" if own == "functional" else own


class Weight(NamedTuple):
    """A weight of the model that an adapter may hold whole."""

    #: Its key in an adapter, for example "head.weight".
    key: str
    #: The path of its layer.
    path: str
    wanted: Wanted
    #: Its keys in the older layout of timm.
    old_keys: tuple[str, ...]
    #: Whether timm has it as the weight of a 1x1 convolution.
    is_convolution: bool = False

    @property
    def variable(self) -> Any:
        return self.wanted.variable

    def value(self) -> np.ndarray:
        """What the variable holds, in torch's order of axes (of a merged layer: unmerged)."""
        layer, backend = self.wanted.layer, backend_of(self.wanted.layer)
        if isinstance(layer, LoRALayer):
            value = layer.value_of(self.variable, merged=False)
        else:
            value = backend.to_numpy(self.variable)
        value = to_torch(value, self.wanted)
        return value[..., None, None] if self.is_convolution else value

    def fits(self, value: np.ndarray) -> bool:
        """Whether a value of an adapter is one of this weight."""
        return fits(value.shape, self.wanted)

    def assign(self, value: np.ndarray) -> None:
        """Give the variable a value of an adapter."""
        dtype = backend_of(self.wanted.layer).to_numpy(self.variable).dtype
        self.variable.assign(to_keras(value, self.wanted).astype(dtype))


def to_torch(value: np.ndarray, wanted: Wanted) -> np.ndarray:
    """The value of a variable in torch's order of axes; the reverse of ``to_keras``."""
    axes = torch_axes(leaf_of(wanted), value.ndim)
    return value.transpose(np.argsort(axes)) if axes else value


def _key(wanted: Wanted) -> str:
    """The key that timm gives to a weight: a gamma of its own is no scale of a norm."""
    is_norm = "Normalization" in "".join(cls.__name__ for cls in type(wanted.layer).__mro__)
    leaf = wanted.name.rpartition("/")[2]
    own = leaf in ("gamma", "beta") and not is_norm
    return wanted.keys[-1] if own else wanted.keys[0]
