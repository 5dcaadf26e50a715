"""``LoRAConfig``: what a model's adaptation is made of, validated when it is created."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tfimm_lora.initializers.from_kernel import check_init
from tfimm_lora.peft import translation
from tfimm_lora.utils.suggestions import did_you_mean
from tfimm_lora.validation import (
    check_alpha,
    check_bool,
    check_dropout,
    check_names,
    check_pattern,
    check_qkv,
    check_rank,
    check_targets,
    check_train_bias,
    check_variant,
    indices_of,
    listed,
    patterns_of,
)

#: Names of the variables that LoRA adds to a layer; patterns for ``transfer_weights``.
LORA_WEIGHT_NAMES = ["kernel_lora_a", "kernel_lora_b"]

#: These and what only some layers have: DoRA's magnitude (as its difference from the norm of
#: the frozen kernel), the bias of the branch, and the A and B of a start that is taken off.
LORA_VARIABLE_NAMES = (
    *LORA_WEIGHT_NAMES,
    "kernel_lora_magnitude",
    "kernel_lora_shift",
    "kernel_lora_a0",
    "kernel_lora_b0",
)

Targets = str | Sequence[str] | None

#: Targets by name. "default" is what ``lora_targets=None`` means; without it, everything
#: in the table together. "all" is understood everywhere: every layer but the classifier.
Presets = Mapping[str, Targets]


@dataclass
class LoRAConfig:
    """The adaptation of a model. Config classes of LoRA architectures inherit from it.

    The update of a kernel is ``(lora_alpha / lora_rank) * A B``, with rsLoRA
    ``(lora_alpha / sqrt(lora_rank)) * A B``.

    Args:
        lora_rank: Rank r of the update, a positive integer. Default 4.
        lora_alpha: Numerator of the scale; None (default) means ``lora_rank``, that is a
            scale of 1.
        lora_use_rslora: Whether lora_alpha is divided by the root of the rank instead, so
            that the update does not shrink as the rank grows. Default False.
        lora_rank_pattern, lora_alpha_pattern: Other ranks and alphas for some layers: name
            or regular expression for the end of a path -> value. The first one that matches
            counts, as in PEFT. Default none.
        lora_dropout: Rate in [0, 1) of the dropout on the input of the low-rank branch
            while training. Default 0.
        lora_use_dora: Whether the norm of each column of W + s A B is a variable of its own
            (DoRA): the kernel is m (W + s A B) / |W + s A B|, m starts as |W|. Default False.
        lora_bias: Whether the branch has a bias c, added as s c. Default False.
        lora_init: How A and B start. "default": A as lora_initializer says, B zero.
            "gaussian": A normal with a spread of one over the rank, B zero. "orthogonal": rows
            that are orthogonal, A B = 0. "pissa" (or "pissa_niter_4", faster: a randomized
            decomposition with 4 iterations): the largest singular vectors of the kernel.
            "olora": its QR decomposition. "eva": of the layers' inputs; call
            ``initialize_eva(model, data)``. For "pissa" and "olora" the kernel is
            W + s (A B - A0 B0) with the start A0, B0, so that W itself stays as it is.
        lora_freeze_a: Whether A stays as it was drawn and B alone is trained (LoRA-FA): about
            half the trained parameters, and compiled functions need not keep the inputs of
            adapted layers for the gradient. Default False.
        lora_initializer: Initializer of A (B starts at zero): a name, a config or an
            object. None (default) draws uniformly from +-1/sqrt(fan_in).
        lora_regularizer: Regularizer of A and of B. Default none.
        lora_targets: The layers to adapt: a list of names, each the end of a layer's
            path; or a preset, "attention", "mlp" or "all" (every supported layer but the
            classifier); or a regular expression that matches a whole path; or None
            (default) for the targets of the architecture, elsewhere the same as "all".
            PEFT's "all-linear" is understood as "all".
        lora_exclude: Layers that are not adapted though lora_targets means them, in the
            same ways: names, a preset, an expression. Default none.
        lora_layers: The numbers of the blocks to adapt, one or a list; others are not, nor
            are layers outside of blocks. A layer's number is the first level of its path
            that is one: 3 in ``blocks/3/attn/qkv``. Where a model has stages it is that of
            the stage, 2 in ``stages/2/blocks/0/mlp/fc1``. None (default) adapts all.
        lora_layers_pattern: Which numbers lora_layers means: the name, or a regular
            expression for it, of the level before the number. "blocks" makes it 0 in
            ``stages/2/blocks/0/mlp/fc1``. With a pattern the number may also end the name
            of a level, as it does in Keras: "block" is the pattern for ``block3/fc`` and
            ``block_3/fc``. Of a list, the first that a path has counts.
        lora_qkv: The parts of attention's projections to adapt, letters of "qkv", for
            example "qv". In a fused layer ("qkv", "kv") each of these parts gets factors
            of its own; of separate layers ("q", "k", "v") only these are adapted. None
            (default) adapts all of them, a fused kernel as one.
        lora_train_modules: Names of layers that are trained whole, each the end of a
            path; what is inside them is trained too. Default none.
        lora_train_bias: "none" (default), "lora_only" (biases of adapted layers) or
            "all" (every bias-like variable of the model).
        lora_train_classifier: Whether the classifier is trained whole. None (default)
            trains it where it is new, that is, where the number of classes was changed.

    Raises:
        ValueError: for a value out of its range.
        TypeError: for a value of the wrong type.

    Example:
        >>> import tfimm_lora as lora
        >>> lora.LoRAConfig(lora_rank=8, lora_alpha=16).lora_scale
        2.0

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1; Kalajdzievski, "A Rank
    Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732; Zhang et al.,
    "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
    arXiv:2308.03303; Liu et al., "DoRA", arXiv:2402.09353, section 4; Meng et al., "PiSSA",
    arXiv:2404.02948; Buyukakyuz, "OLoRA", arXiv:2406.01775; Paischer et al., "One
    Initialization to Rule them All" (EVA), arXiv:2410.07170.
    """

    lora_rank: int = 4
    lora_alpha: float | None = None
    lora_use_rslora: bool = False
    lora_rank_pattern: dict[str, int] = field(default_factory=dict)
    lora_alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_use_dora: bool = False
    lora_bias: bool = False
    lora_dropout: float = 0.0
    lora_init: str = "default"
    lora_freeze_a: bool = False
    lora_initializer: Any = None
    lora_regularizer: Any = None
    lora_targets: Targets = None
    lora_exclude: Targets = None
    lora_layers: int | Sequence[int] | None = None
    lora_layers_pattern: str | Sequence[str] | None = None
    lora_qkv: str | None = None
    lora_train_modules: Sequence[str] = ()
    lora_train_bias: str = "none"
    lora_train_classifier: bool | None = None

    #: What the names of presets mean. Here, for models of any class, by the words that
    #: people use in the names of layers; architectures have tables of their own.
    lora_presets: ClassVar[Presets] = {
        "default": None,
        "attention": r"(.*/)?[^/]*(attn|attention)[^/]*/.*",
        "mlp": r"(.*/)?[^/]*(mlp|ffn|feed_?forward)[^/]*/.*",
    }

    def __post_init__(self) -> None:
        check_rank(self.lora_rank)
        check_alpha(self.lora_alpha)
        check_pattern(self.lora_rank_pattern, "lora_rank_pattern", check_rank)
        check_pattern(self.lora_alpha_pattern, "lora_alpha_pattern", check_alpha)
        check_dropout(self.lora_dropout)
        check_train_bias(self.lora_train_bias)
        if not isinstance(self.lora_targets, (str, Sequence, type(None))):
            self.lora_targets = tuple(listed(self.lora_targets, "lora_targets"))
        check_targets(self.lora_targets)
        if not isinstance(self.lora_exclude, (str, type(None))):
            self.lora_exclude = tuple(listed(self.lora_exclude, "lora_exclude")) or None
        check_targets(self.lora_exclude, "lora_exclude")
        self.lora_layers = indices_of(self.lora_layers)
        self.lora_layers_pattern = patterns_of(self.lora_layers_pattern, self.lora_layers)
        check_qkv(self.lora_qkv)
        check_names(self.lora_train_modules, "lora_train_modules")
        self.lora_train_modules = tuple(self.lora_train_modules)
        check_bool(self.lora_use_rslora, "lora_use_rslora")
        check_bool(self.lora_freeze_a, "lora_freeze_a")
        check_bool(self.lora_use_dora, "lora_use_dora")
        check_bool(self.lora_bias, "lora_bias")
        check_variant(self.lora_use_dora, self.lora_bias)
        check_start(self.lora_init, self.lora_initializer)
        if self.lora_train_classifier not in (None, True, False):
            raise TypeError(
                f"Received lora_train_classifier={self.lora_train_classifier!r}; expected "
                "True, False, or None to train the classifier only where it is new."
            )

    @property
    def lora_scale(self) -> float:
        """The factor in front of the update: alpha / rank, or alpha / sqrt(rank)."""
        return scale(self.lora_rank, self.lora_alpha, self.lora_use_rslora)

    def layer_arguments(self) -> dict[str, Any]:
        """The arguments that a LoRA layer takes."""
        return {
            "lora_rank": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "lora_use_rslora": self.lora_use_rslora,
            "lora_use_dora": self.lora_use_dora,
            "lora_bias": self.lora_bias,
            "lora_init": self.lora_init,
            "lora_dropout": self.lora_dropout,
            "lora_freeze_a": self.lora_freeze_a,
            "lora_initializer": self.lora_initializer,
            "lora_regularizer": self.lora_regularizer,
        }

    def arguments(self) -> dict[str, Any]:
        """The lora_* fields as keyword arguments: ``inject_lora(model, **x.arguments())``."""
        return {name: getattr(self, name) for name in lora_field_names()}

    @classmethod
    def from_peft(cls, source: Any, **fields: Any) -> LoRAConfig:
        """A config that means what one of PEFT means.

        Modules are layers of the same name: "blocks.0.attn.qkv" is ``blocks/0/attn/qkv``.
        For models whose layers timm calls otherwise there is ``lora_arguments_from_peft``.
        "all-linear" means every supported layer but the classifier here, not only linear
        ones. A new classifier is trained though no modules_to_save names it, unless
        ``lora_train_classifier=False`` is given.

        Args:
            source: An adapter_config.json or its folder, its fields as a dictionary, or a
                ``peft.LoraConfig``.
            **fields: Other fields of this class, and those to change.

        Returns:
            The config.

        Raises:
            FileNotFoundError: if there is no such file.
            TypeError: for another kind of source, an unknown field, or one of a wrong type.
            ValueError: for a field out of its range, or with a value that has no counterpart
                here (use_dora, megatron_config, ...); all of these are named.

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
        """The fields of PEFT's LoraConfig that mean the same.

        For an adapter that was trained ``save_adapter`` writes a config that names its very
        layers. This is for a config as such; ``from_peft`` is its reverse.

        Returns:
            A dictionary for ``peft.LoraConfig(**fields)`` or a JSON file.

        Raises:
            ValueError: for what PEFT cannot express: targets that depend on the model
                (pass ``explain_targets(model, ...).adapted``), parts of a fused projection,
                a regularizer, ...; all of these are named.

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
        """The targets that have a name: "default", "all" and those of the architecture."""
        table = dict(cls.lora_presets)
        if "default" not in table:
            together = [name for names in table.values() for name in names or ()]
            table["default"] = tuple(dict.fromkeys(together))
        return {**table, "all": None}


def check_start(init: Any, initializer: Any) -> None:
    """Raise unless a way to start is known, and the only one given."""
    check_init(init)
    if init != "default" and initializer is not None:
        raise ValueError(
            f"Received lora_init={init!r} and lora_initializer={initializer!r}, which both say "
            "how A starts; expected one of them."
        )


def scale(rank: int, alpha: float | None, use_rslora: bool = False) -> float:
    """The factor in front of the update: alpha over the rank, or with rsLoRA over its
    root; 1 where alpha is None."""
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if use_rslora else rank)


def lora_field_names() -> list[str]:
    """The names of all fields of ``LoRAConfig``."""
    return [field.name for field in dataclasses.fields(LoRAConfig)]


def check_keywords(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise a TypeError that names the nearest known keyword for each unknown one."""
    known = list(known)
    problems = []
    for name in given:
        if name not in known:
            problems.append(f"{name}{did_you_mean(name, known)}")
    if problems:
        listed = ", ".join(problems)
        raise TypeError(
            f"Received unknown keywords for {what}: {listed}{'' if listed[-1] == '?' else '.'} "
            f"Known keywords: {', '.join(known)}."
        )
