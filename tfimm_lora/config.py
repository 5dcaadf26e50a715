"""The settings of LoRA: ``LayerSettings`` of a layer, ``LoRAConfig`` of a model.

Every setting of a layer is a field of ``LayerSettings``, which has its default, its check and
its documentation. Whatever else needs a list of settings derives it from these fields: the
arguments of layers, their configs, ``LoRAConfig``, docstrings, and what is read from adapters.
A setting has one name, from the keyword to where it is used.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tfimm_lora.initializers.from_kernel import check_init
from tfimm_lora.peft import translation
from tfimm_lora.validation import (
    check_alpha,
    check_bool,
    check_dropout,
    check_keywords,
    check_names,
    check_pattern,
    check_qkv,
    check_qkv_layout,
    check_rank,
    check_targets,
    check_train_bias,
    indices_of,
    listed,
    patterns_of,
)

#: Names of the variables that LoRA adds to a layer; patterns for ``transfer_weights``.
LORA_WEIGHT_NAMES = ["kernel_lora_a", "kernel_lora_b"]

#: The second pair of factors of LoHa.
LOHA_WEIGHT_NAMES = ["kernel_lora_a2", "kernel_lora_b2"]

#: These, and what only some layers have: the DoRA magnitude (as its difference from the norm
#: of the frozen kernel), the bias of the branch, and the initial A and B if their product is
#: subtracted.
LORA_VARIABLE_NAMES = (
    *LORA_WEIGHT_NAMES,
    *LOHA_WEIGHT_NAMES,
    "kernel_lora_magnitude",
    "kernel_lora_shift",
    "kernel_lora_a0",
    "kernel_lora_b0",
)

Targets = str | Sequence[str] | None

#: Targets by name. "default" is what ``lora_targets=None`` means; without it, everything
#: in the table together. "all" is understood everywhere: see ``lora_targets``.
Presets = Mapping[str, Targets]


def setting(
    default: Any,
    check: Callable[[Any, str], None] | None,
    doc: str,
    keras: str | None = None,
) -> Any:
    """Create a field of ``LayerSettings``.

    Args:
        default: The default value.
        check: Called with the value and the name of the setting; raises if it is not valid.
            None for objects that Keras creates, and checks, itself.
        doc: The description for docstrings.
        keras: The module of Keras that creates the value from a name or config:
            "initializers" or "regularizers". None for other values.
    """
    metadata = {"check": check, "doc": inspect.cleandoc(doc), "keras": keras}
    return field(default=default, metadata=metadata)


@dataclass
class SharedSettings:
    """The settings that ``LayerSettings`` and ``LoRAConfig`` share."""

    lora_rank: int = setting(4, check_rank, "Rank r of the update, a positive integer.")
    lora_alpha: float | None = setting(
        None, check_alpha, "Numerator of the scale s; None is the rank, for a scale of 1."
    )
    lora_use_rslora: bool = setting(
        False,
        check_bool,
        """Whether s is lora_alpha / sqrt(lora_rank) (rsLoRA), so that the update does not
        shrink as the rank grows, instead of lora_alpha / lora_rank.""",
    )
    lora_use_dora: bool = setting(
        False,
        check_bool,
        """Whether the norm of each column of W + s A B is a variable m of its own (DoRA). The
        kernel is m (W + s A B) / |W + s A B|; m is initialized to |W|.""",
    )
    lora_use_loha: bool = setting(
        False,
        check_bool,
        """Whether the update is the elementwise product of two low-rank ones, s (A B) * (A2 B2)
        (LoHa), of a rank up to lora_rank^2 with the parameters of LoRA of rank 2 lora_rank.
        A and A2 are initialized from N(0, 1), B2 from N(0, 0.1^2), B with zeros. Not for
        embeddings.""",
    )
    lora_bias: bool = setting(
        False, check_bool, "Whether the branch has a bias c, which is added as s c."
    )
    lora_dropout: float = setting(
        0.0,
        check_dropout,
        "Rate in [0, 1) of the dropout on the input of the branch during training.",
    )
    lora_init: str = setting(
        "default",
        check_init,
        """How A and B are initialized. "default": A by lora_initializer, B zero. "gaussian": A
        normal with standard deviation 1/rank, B zero. "orthogonal": orthogonal rows,
        A B = 0. "pissa" (or the faster "pissa_niter_4", a randomized decomposition with 4
        iterations): the largest singular vectors of the kernel. "olora": its QR
        decomposition. "eva": directions of the layers' inputs; call
        ``initialize_eva(model, data)``. For "pissa" and "olora" the kernel is
        W + s (A B - A0 B0) with the initial A0 and B0, so that W stays unchanged.""",
    )
    lora_freeze_a: bool = setting(
        False,
        check_bool,
        """Whether A is frozen and only B is trained (LoRA-FA): about half the trained
        parameters, and the inputs of adapted layers need not be kept for the gradient.""",
    )
    lora_initializer: Any = setting(
        None,
        None,
        """Initializer of A, with LoHa of A, A2 and B2: a name, a config or an object. None is
        uniform in +-1/sqrt(fan_in); for LoHa see lora_use_loha.""",
        keras="initializers",
    )
    lora_regularizer: Any = setting(
        None, None, "Regularizer of A and of B.", keras="regularizers"
    )
    lora_qkv: str | None = setting(
        None,
        check_qkv,
        """The blocks to adapt of the projections of attention, letters of "qkv", for example
        "qv". In a fused layer ("qkv", "kv") each of these blocks has its own factors; of
        separate layers ("q", "k", "v") only these are adapted. None adapts all of them, and
        a fused kernel as a whole.""",
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            check = each.metadata.get("check")
            if check is not None:
                check(getattr(self, each.name), each.name)
        if self.lora_use_dora and self.lora_bias:
            raise ValueError(
                "Received lora_use_dora=True and lora_bias=True; expected at most one of "
                "them: DoRA rescales the kernel together with its update, which leaves no "
                "place for a bias of the branch. lora_train_bias='lora_only' trains the "
                "layer's own bias."
            )
        self._check_loha()
        if self.lora_init != "default" and self.lora_initializer is not None:
            raise ValueError(
                f"Received lora_init={self.lora_init!r} and "
                f"lora_initializer={self.lora_initializer!r}; expected one of them: both say "
                "how A is initialized."
            )

    def _check_loha(self) -> None:
        """Raise if LoHa is combined with what is defined for the factors A and B of LoRA."""
        if not self.lora_use_loha:
            return
        names = ("lora_use_dora", "lora_bias", "lora_dropout", "lora_init", "lora_freeze_a")
        values = ((name, getattr(self, name)) for name in names)
        given = [f"{name}={x!r}" for name, x in values if x not in (False, 0, "default")]
        if given:
            raise ValueError(
                f"Received lora_use_loha=True and {', '.join(given)}; expected LoHa without "
                "these, which are defined for the two factors of LoRA."
            )

    @property
    def lora_scale(self) -> float:
        """The scale s of the update: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return scale(self.lora_rank, self.lora_alpha, self.lora_use_rslora)


@dataclass
class LayerSettings(SharedSettings):
    """The settings of one adapted layer. They cannot be changed; ``replace`` them.

    A setting can be read without its prefix: ``settings.rank`` is ``settings.lora_rank``.
    """

    lora_train_bias: bool = setting(
        False, check_bool, "Whether the layer's own bias is trained, too."
    )
    lora_qkv_layout: str = setting(
        "qkv", check_qkv_layout, "The blocks of a fused kernel, in their order."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_qkv is not None and set(self.lora_qkv) - set(self.lora_qkv_layout):
            raise ValueError(
                f"Received lora_qkv={self.lora_qkv!r} for a kernel with the blocks "
                f"{self.lora_qkv_layout!r}; expected some of these."
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("lora_", "_")):
            raise AttributeError(name)
        return getattr(self, f"lora_{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or name not in self.names():
            raise AttributeError(
                f"Received {name}={value!r} for the settings of a layer, which cannot be "
                "changed. Remove LoRA and inject it with other settings."
            )
        super().__setattr__(name, value)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of all settings."""
        return tuple(each.name for each in dataclasses.fields(cls))

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], keras: Any) -> LayerSettings:
        """Create settings from lora_* keywords, with defaults for the others.

        Args:
            arguments: The keywords.
            keras: The Keras module that creates initializers and regularizers.

        Raises:
            TypeError, ValueError: If a keyword is unknown or a value is not valid.
        """
        check_keywords(arguments, cls.names(), "a LoRA layer")
        values = dict(arguments)
        for each in _made_by_keras(cls):
            values[each.name] = getattr(keras, each.metadata["keras"]).get(
                values.get(each.name)
            )
        return cls(**values)

    def to_config(self, keras: Any) -> dict[str, Any]:
        """Return keywords for ``from_arguments`` that can be written to a file."""
        values = {name: getattr(self, name) for name in self.names()}
        for each in _made_by_keras(type(self)):
            value = values[each.name]
            if value is not None:
                values[each.name] = getattr(keras, each.metadata["keras"]).serialize(value)
        return values


def _made_by_keras(cls: type) -> list[dataclasses.Field[Any]]:
    return [each for each in dataclasses.fields(cls) if each.metadata.get("keras")]


def settings_doc(*classes: type) -> str:
    """Return the settings of some classes as entries of a docstring's Args section."""
    entries: dict[str, str] = {}
    for cls in classes:
        for each in dataclasses.fields(cls):
            if "doc" in each.metadata:
                entries[each.name] = f"{each.metadata['doc']} Default {each.default!r}."
    return "\n".join(
        textwrap.fill(
            f"{name}: {' '.join(text.split())}",
            width=92,
            initial_indent="    ",
            subsequent_indent="        ",
        )
        for name, text in entries.items()
    )


def with_settings_doc(doc: str, *classes: type) -> str:
    """Replace the line ``{settings}`` of a docstring by ``settings_doc(*classes)``."""
    cleaned = inspect.cleandoc(doc)
    return cleaned.replace("    {settings}", settings_doc(*classes))


@dataclass
class LoRAConfig(SharedSettings):
    """The settings of LoRA in a model. Config classes of LoRA architectures inherit from it.

    The update of a kernel is s A B with s = lora_alpha / lora_rank, or with rsLoRA
    s = lora_alpha / sqrt(lora_rank).

    Args:
        {settings}
        lora_rank_pattern, lora_alpha_pattern: Other ranks and alphas for some layers: name
            or regular expression for the end of a path -> value. The first one that matches
            counts, as in PEFT. Empty by default.
        lora_targets: The layers to adapt: a list of names, each the end of a layer's
            path; or a preset, "attention", "mlp" or "all" (every supported layer except the
            classifier, position embeddings and layers that the model never calls); or a
            regular expression that matches a full path; or None (default) for the targets
            of the architecture, or "all" if it has none.
            PEFT's "all-linear" means "all" here.
        lora_exclude: Layers that are not adapted although lora_targets selects them, given
            in the same ways: names, a preset, an expression. Default none.
        lora_layers: The numbers of the blocks to adapt, one or a list; others are not, nor
            are layers outside of blocks. A layer's number is the first level of its path
            that is a number: 3 in ``blocks/3/attn/qkv``. In a model with stages it is the
            stage, 2 in ``stages/2/blocks/0/mlp/fc1``. None (default) adapts all.
        lora_layers_pattern: Which number in a path counts: the name of the level before
            the number, or a regular expression for it. With "blocks" it is 0 in
            ``stages/2/blocks/0/mlp/fc1``. With a pattern the number may also end the name
            of a level, as in Keras: "block" is the pattern for ``block3/fc`` and
            ``block_3/fc``. In a list, the first pattern that occurs in a path counts.
        lora_train_modules: Names of layers that are fully trained, with all layers inside
            them, each the end of a path, or with a leading "/" a full path (PEFT's
            modules_to_save). Default none.
        lora_train_bias: "none" (default), "lora_only" (biases of adapted layers) or
            "all" (every bias-like variable of the model).
        lora_train_classifier: Whether the classifier is fully trained. None (default)
            trains it if it is new, that is, if the number of classes was changed.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a value has the wrong type.

    Example:
        >>> import tfimm_lora as lora
        >>> lora.LoRAConfig(lora_rank=8, lora_alpha=16).lora_scale
        2.0

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1; Kalajdzievski, "A Rank
    Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732; Zhang et al.,
    "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
    arXiv:2308.03303; Liu et al., "DoRA", arXiv:2402.09353, section 4; Meng et al., "PiSSA",
    arXiv:2404.02948; Buyukakyuz, "OLoRA", arXiv:2406.01775; Paischer et al., "One
    Initialization to Rule them All" (EVA), arXiv:2410.07170; Hyeon-Woo et al., "FedPara" (the
    product of LoHa), arXiv:2108.06098.
    """

    lora_rank_pattern: dict[str, int] = field(default_factory=dict)
    lora_alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_targets: Targets = None
    lora_exclude: Targets = None
    lora_layers: int | Sequence[int] | None = None
    lora_layers_pattern: str | Sequence[str] | None = None
    lora_train_modules: Sequence[str] = ()
    lora_train_bias: str = "none"
    lora_train_classifier: bool | None = None

    #: Preset -> targets. These are for models of any class, and match words that are common
    #: in the names of layers. Architectures have their own tables.
    lora_presets: ClassVar[Presets] = {
        "default": None,
        "attention": r"(.*/)?[^/]*(attn|attention)[^/]*/.*",
        "mlp": r"(.*/)?[^/]*(mlp|ffn|feed_?forward)[^/]*/.*",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pattern(self.lora_rank_pattern, "lora_rank_pattern", check_rank)
        check_pattern(self.lora_alpha_pattern, "lora_alpha_pattern", check_alpha)
        check_train_bias(self.lora_train_bias, "lora_train_bias")
        if not isinstance(self.lora_targets, (str, Sequence, type(None))):
            self.lora_targets = tuple(listed(self.lora_targets, "lora_targets"))
        check_targets(self.lora_targets, "lora_targets")
        if not isinstance(self.lora_exclude, (str, type(None))):
            self.lora_exclude = tuple(listed(self.lora_exclude, "lora_exclude")) or None
        check_targets(self.lora_exclude, "lora_exclude")
        self.lora_layers = indices_of(self.lora_layers)
        self.lora_layers_pattern = patterns_of(self.lora_layers_pattern, self.lora_layers)
        check_names(self.lora_train_modules, "lora_train_modules")
        self.lora_train_modules = tuple(self.lora_train_modules)
        if self.lora_train_classifier not in (None, True, False):
            raise TypeError(
                f"Received lora_train_classifier={self.lora_train_classifier!r}; expected "
                "True, False, or None to train the classifier only if it is new."
            )

    def layer_arguments(self) -> dict[str, Any]:
        """Return the arguments of a LoRA layer that are the same for all layers."""
        shared = (each.name for each in dataclasses.fields(SharedSettings))
        return {name: getattr(self, name) for name in shared if name != "lora_qkv"}

    def arguments(self) -> dict[str, Any]:
        """Return the lora_* fields as keyword arguments, for example for ``inject_lora``."""
        return {name: getattr(self, name) for name in lora_field_names()}

    @classmethod
    def from_peft(cls, source: Any, **fields: Any) -> LoRAConfig:
        """Create the config with the same meaning as a config of PEFT.

        Modules are mapped to layers of the same name: "blocks.0.attn.qkv" is
        ``blocks/0/attn/qkv``. For models whose layers have other names in timm use
        ``lora_arguments_from_peft``, which also follows PEFT's rules to the letter: there a
        target that is the full name of a module is adapted whatever layers_to_transform says,
        layers_pattern never finds a number at the end of a level ("block3"), and
        modules_to_save matches the end of a name after a dot or not. Here "all-linear" means
        every supported layer except the classifier, not only linear layers. A new classifier
        is trained even if modules_to_save does not name it, unless
        ``lora_train_classifier=False`` is given.

        Args:
            source: An adapter_config.json or its folder, its fields as a dictionary, or a
                ``peft.LoraConfig``.
            **fields: Fields of this class to set or override.

        Returns:
            The config.

        Raises:
            FileNotFoundError: If there is no such file.
            TypeError: If the source is of another kind, or a field is unknown or has the
                wrong type.
            ValueError: If a field is out of range, or has a value that is not supported here
                (megatron_config, ...). The message names all unsupported fields.

        Example:
            >>> import tfimm_lora as lora
            >>> peft = {"r": 8, "lora_alpha": 16, "target_modules": ["attn.qkv"]}
            >>> config = lora.LoRAConfig.from_peft(peft)
            >>> config.lora_rank, config.lora_scale, config.lora_targets
            (8, 2.0, ['attn/qkv'])
        """
        check_keywords(fields, [f.name for f in dataclasses.fields(cls)], "from_peft")
        given = translation.read_fields(source)
        try:
            arguments = translation.arguments_from(given)
        except ValueError as error:
            where = source if isinstance(source, (str, os.PathLike)) else "a config of PEFT"
            raise ValueError(f"Received {where}, which {error}.") from error
        return cls(**{**arguments, **fields})

    def to_peft(self) -> dict[str, Any]:
        """Return the fields of the PEFT LoraConfig with the same meaning.

        This converts a config without a model; ``from_peft`` is the reverse. For a trained
        adapter use ``save_adapter``, which writes a config with the exact layers.

        Returns:
            A dictionary for ``peft.LoraConfig(**fields)`` or a JSON file.

        Raises:
            ValueError: If the config has settings that PEFT cannot express: targets that
                depend on the model (pass ``explain_targets(model, ...).adapted``), blocks of a
                fused projection, a regularizer, ... The message names all of them.

        Example:
            >>> import tfimm_lora as lora
            >>> config = lora.LoRAConfig(lora_rank=4, lora_targets=["attn/qkv"])
            >>> fields = config.to_peft()
            >>> fields["r"], fields["lora_alpha"], fields["target_modules"]
            (4, 4, ['attn.qkv'])
        """
        try:
            return translation.fields_from(self.arguments(), self.presets())
        except ValueError as error:
            raise ValueError(f"Received a config that {error}.") from error

    @classmethod
    def presets(cls) -> dict[str, Targets]:
        """Return the target presets: "default", "all" and those of the architecture."""
        return with_default(cls.lora_presets)


LoRAConfig.__doc__ = with_settings_doc(LoRAConfig.__doc__ or "", SharedSettings)


def with_default(presets: Presets) -> dict[str, Targets]:
    """Return presets with "all", and with "default" for all of them together."""
    table = dict(presets)
    if "default" not in table:
        together = [name for names in table.values() for name in names or ()]
        table["default"] = tuple(dict.fromkeys(together))
    return {**table, "all": None}


def scale(rank: int, alpha: float | None, use_rslora: bool = False) -> float:
    """Return the scale s: alpha / rank, with rsLoRA alpha / sqrt(rank); 1 without alpha."""
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if use_rslora else rank)


def lora_field_names() -> list[str]:
    """Return the names of all fields of ``LoRAConfig``."""
    return [field.name for field in dataclasses.fields(LoRAConfig)]
