"""Recognize the family and the library of names, and the prefix before them."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch, fnmatchcase

from tfimm_lora.families import FAMILIES
from tfimm_lora.families.family import (
    APPLICATIONS,
    KERAS_HUB,
    LIBRARIES,
    TIMM,
    V4,
    V5,
    Family,
    Names,
)
from tfimm_lora.families.templates import Name, Positions, Template

#: The name of the decoder of a segmentation, the same on every Keras. No library has a module
#: of this name: SegFormer has a decode_head.
DECODER = "pixel_head"

#: torch's names of weights.
_LEAVES = ("weight", "bias", "running_mean", "running_var", "variable")

#: The number of names in which prefixes are looked for.
_SAMPLE = 32
#: More names than any model has: of longer lists only every n-th name is counted.
_MAX_COUNTED = 5000
#: The length of a name that is not looked at.
_MAX_LENGTH = 500

#: A number of a block in timm's names: "blocks.0.fc", "layer1.0", "features.3".
_NUMBER = re.compile(r"\d\.|\.\d+$")

#: The names of backbones in transformers' image models, some of which have no table here.
_BACKBONES = frozenset(
    (
        *("beit", "bit", "clip", "convnext", "convnextv2", "cvt", "data2vec_vision", "deit"),
        *("dinov2", "dinov2_with_registers", "dinov3_vit", "efficientnet", "focalnet"),
        *("hiera", "ijepa", "levit", "mobilenet_v1", "mobilenet_v2", "mobilevit"),
        *("mobilevitv2", "poolformer", "pvt", "pvt_v2", "regnet", "resnet", "segformer"),
        *("siglip", "siglip2", "swiftformer", "swin", "swinv2", "van", "vit", "vision_model"),
        *("vit_mae", "vit_msn", "vit_hybrid"),
    )
)

#: What users read.
TITLES = {
    TIMM: "timm",
    "transformers": "transformers",
    KERAS_HUB: "keras_hub",
    APPLICATIONS: "keras.applications",
}


@dataclass(frozen=True)
class Naming:
    """The names of a family in a library, behind a prefix.

    Attributes:
        family: The family.
        library: One of ``LIBRARIES``.
        prefix: What comes before the names of the backbone, with its dot: "vit.".
        head: The name of a classifier that the table does not have.
        depths: The number of blocks of each stage, if known; see ``Family.depths``.
        renamed: Names of modules -> their names in the table; see ``Family.numbered``.
    """

    family: Family
    library: str
    prefix: str = ""
    head: str | None = None
    depths: tuple[int, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def names(self) -> Names:
        """The table of names."""
        return self.family.names(self.library, self.depths)

    def with_depths(self, names: Iterable[str]) -> Naming:
        """Return this naming with the number of blocks of each stage in a model.

        Args:
            names: The names of the modules or weights of the model, in this naming.
        """
        if not self.family.depths or self.depths:
            return self
        inside = [self._inside(x) for x in names if x.startswith(self.prefix)]
        modules = dict.fromkeys([*inside, *(x.rpartition(".")[0] for x in inside)])
        numbers = [found for x in modules for found in self.names.numbers(Name(x))]
        blocks = {(x["s"], x["b"]) for x in numbers if {"s", "b"} <= x.keys()}
        stages = Counter(stage for stage, _ in blocks)
        end = max((x["z"] for x in numbers if "z" in x), default=len(stages))
        depths = tuple(stages[stage] for stage in range(min(end, len(stages))))
        for count in () if depths else "nfd":  # where blocks are counted over all stages
            given = {x[count] for x in numbers if count in x}
            for known in self.family.depths:
                last = Positions(known).last(count)
                # A row with {d+1} reads the odd numbers of {d}, too.
                if last in given and max(given) <= last + 1:
                    depths = known
        return replace(self, depths=depths)

    @property
    def _repeated(self) -> str:
        """What the names of nested layers of keras.applications begin with, too."""
        return self.prefix.rpartition(".")[2] if self.library == APPLICATIONS else ""

    def _inside(self, name: str) -> str:
        """Return a name without the prefix."""
        inside = name[len(self.prefix) :]
        return inside.replace(f".{self._repeated}", ".") if self._repeated else inside

    def _with_prefix(self, name: str) -> str:
        *outer, last = name.split(".")
        nested = [self._repeated + part for part in outer[1:]]
        # The last part of a weight's name is that of torch.
        if outer and last not in _LEAVES:
            last = self._repeated + last
        return self.prefix + ".".join([*outer[:1], *nested, last])

    @property
    def outside(self) -> str:
        """The prefix of what is outside of the backbone: "model." for "model.vit."."""
        # A prefix may end within a name: "encoder.encoder_" before "encoder.encoder_norm".
        inner = self.prefix if self.prefix.endswith(".") else self.prefix.rpartition(".")[0]
        outer = inner.rstrip(".").rpartition(".")[0]
        return f"{outer}." if outer else ""

    def to_timm(self, name: str, is_weight: bool = False) -> Name | None:
        """Return timm's name of a module or weight of this naming, or None."""
        if _is_in_decoder(name):
            return Name(name)
        head, found = self.family.head, None
        name = _renamed(name, self.renamed)
        if self.head and head and (name == self.head or name.startswith(f"{self.head}.")):
            return Name(head + name[len(self.head) :])
        if name.startswith(self.prefix):
            found = self.names.to_timm(Name(self._inside(name)), is_weight)
        if found is None and name.startswith(self.outside):
            found = self.names.to_timm(Name("/" + name[len(self.outside) :]), is_weight)
        return found

    def from_timm(self, name: Name, is_weight: bool = False) -> str | None:
        """Return the name of timm's module or weight in this naming, or None."""
        if _is_in_decoder(name.name):
            return name.name
        head = self.family.head
        if self.head and head and (name.name == head or name.name.startswith(f"{head}.")):
            return self.head + name.name[len(head) :]
        found = self.names.from_timm(name, is_weight)
        if found is None:
            return None
        inside = not found.name.startswith("/")
        own = self._with_prefix(found.name) if inside else self.outside + found.name[1:]
        return _renamed(own, {table: name for name, table in self.renamed.items()})

    @property
    def libraries_name(self) -> str:
        """The library as users name it: "transformers" for both of its versions."""
        return self.library.partition("-")[0]

    @property
    def dialect(self) -> str | None:
        """For transformers "v4" or "v5"; None if both have the same names of this family."""
        same = all(row.column(V4) == row.column(V5) for row in self.family.rows)
        return None if same else {V4: "v4", V5: "v5"}.get(self.library)

    def __str__(self) -> str:
        behind = f" behind the prefix {self.prefix!r}" if self.prefix else ""
        library = TITLES[self.libraries_name]
        if self.dialect is not None:
            library += f" {self.dialect[1:]}"
        possessive = "'" if library.endswith("s") else "'s"
        return f"{library}{possessive} names of {self.family.name}{behind}"


def _is_in_decoder(name: str) -> bool:
    return name == DECODER or name.startswith(f"{DECODER}.")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Return the other name of a module, or of a weight by its module."""
    if name in names:
        return names[name]
    module, dot, leaf = name.rpartition(".")
    return f"{names[module]}{dot}{leaf}" if module in names else name


def recognize(
    names: Collection[str],
    *,
    family: Family | None = None,
    libraries: Collection[str] = LIBRARIES,
    hint: str = "",
    is_weight: bool = False,
    depths: tuple[int, ...] = (),
) -> Naming | None:
    """Return the naming of the names of modules or weights, or None if no table has them.

    If several tables have all of them, as those of ViT and DeiT, the names mean the same in
    all. Then the family whose backbone has this prefix in transformers is preferred.

    Args:
        names: The names of modules, or with ``is_weight`` of weights.
        family: The family, if it is known.
        libraries: The libraries to choose from.
        hint: The name of the base model, which may name the family.
        is_weight: Whether they are the names of weights.
        depths: The number of blocks of each stage, if known.
    """
    best: tuple[tuple[int, ...], Naming] | None = None
    named = _family_in(hint)
    # A hostile file may have very many names, or very long ones.
    names = [name for name in names if len(name) <= _MAX_LENGTH]
    names = names[:: max(1, len(names) // _MAX_COUNTED)]
    sample = names[:: max(1, len(names) // _SAMPLE)]
    # The general families last in FAMILIES are the better guess among equals.
    for each in reversed(FAMILIES) if family is None else (family,):
        for library in (x for x in libraries if x in each.libraries):
            for prefix in _prefixes(each, library, sample, is_weight):
                naming = Naming(each, library, prefix, depths=depths).with_depths(names)
                found = sum(naming.to_timm(name, is_weight) is not None for name in names)
                backbone = prefix.rstrip(".").rpartition(".")[2]
                own = library in (V4, V5) and backbone in each.transformers.values()
                score = (found, int(own), int(each is named))
                if found and (best is None or score > best[0]):
                    best = score, naming
    return None if best is None else best[1]


def untranslated(naming: Naming, names: Iterable[str], is_weight: bool = False) -> list[str]:
    """Return the names that a naming lacks."""
    return [name for name in names if naming.to_timm(name, is_weight) is None]


def is_plain_timm(naming: Naming) -> bool:
    """Whether a naming is timm's without a prefix, with which many models agree in part."""
    return naming.library == TIMM and not naming.prefix


def recognize_surely(
    names: Collection[str], *, hint: str = "", is_weight: bool = False
) -> Naming | None:
    """Return the naming of names, or None unless it is sure.

    It must have half of the names, of timm's all, and one with a number.

    Args:
        names, hint, is_weight: As in ``recognize``.
    """
    found = recognize(names, hint=hint, is_weight=is_weight)
    if found is None:
        return None
    unknown = len(untranslated(found, names, is_weight))
    is_sure = not unknown if is_plain_timm(found) else 2 * unknown <= len(names)
    return found if is_sure and _has_numbers(found, names, is_weight) else None


def _has_numbers(naming: Naming, names: Iterable[str], is_weight: bool) -> bool:
    """Whether any name is of a block: models of many kinds have a layer "fc" or "norm"."""
    found = (naming.to_timm(name, is_weight) for name in names)
    return any(name is not None and _NUMBER.search(name.name) for name in found)


def recognize_other(
    names: Collection[str], own: Naming | None, *, hint: str = "", is_weight: bool = False
) -> Naming | None:
    """Return the naming of names if a model with other names lacks them, for its message.

    Args:
        names, hint, is_weight: As in ``recognize``.
        own: The naming of the model, or None if its family is not known.
    """
    found = recognize_surely(names, hint=hint, is_weight=is_weight)
    if found is None or found == own or (own is None and is_plain_timm(found)):
        return None
    if own is not None:
        same = recognize(names, family=own.family, hint=hint, is_weight=is_weight)
        unknown = len(untranslated(found, names, is_weight))
        if same is not None and len(untranslated(same, names, is_weight)) <= unknown:
            found = same
        if (found.family, found.library, found.prefix) == (own.family, own.library, own.prefix):
            return None
    return found


def explanation(
    names: Collection[str], own: Naming | None, *, hint: str = "", is_weight: bool = False
) -> str:
    """Return a sentence about whose names a file has that does not fit a model, or "".

    Args:
        names, own, hint, is_weight: As in ``recognize_other``.
    """
    found = recognize_other(names, own, hint=hint, is_weight=is_weight)
    if found is None:
        backbone = _backbone_without_table(names)
        return (
            f"Its names begin with '{backbone}.', as in transformers; this family has no table "
            "of names here (docs/reference/names.md)."
            if backbone
            else ""
        )
    if own is None:
        return (
            f"It has {found}, and the family of the model is not known, so that its names "
            "cannot be translated (docs/reference/names.md)."
        )
    if found.family is not own.family:
        theirs = own.family.name
        return f"Its family is {found.family.name} (it has {found}), the model's {theirs}."
    return f"It has {found}, the model {own}."


def _backbone_without_table(names: Collection[str]) -> str | None:
    """Return the level with which all names begin, if transformers has such a backbone."""
    first = {name.partition(".")[0] for name in names}
    tables = {backbone for family in FAMILIES for backbone in family.transformers.values()}
    return first.pop() if len(first) == 1 and first <= _BACKBONES - tables else None


def lacked_by_timm(naming: Naming, name: str) -> bool:
    """Whether timm has the family of a weight, but no such weight; see ``Row.in_timm``."""
    timm = naming.to_timm(name, is_weight=True)
    if timm is None or TIMM not in naming.family.libraries:
        return False
    forms = (timm, timm._replace(name=timm.name.rpartition(".")[0]))
    rows = [Template(row.timm) for row in naming.family.rows if not row.in_timm]
    return any(row.read(form) is not None for row in rows for form in forms)


def family_of_timm(model_name: str) -> Family | None:
    """Return the family of a timm model: the first whose patterns match its name.

    Example:
        >>> family_of_timm("deit_tiny_patch16_224").name
        'ViT'
    """
    plain = model_name.removeprefix("timm/").partition(".")[0]
    for family in FAMILIES:
        if any(fnmatch(plain, pattern) for pattern in family.timm_models):
            return family
    return None


def family_of_application(name: str) -> Family | None:
    """Return the family of a model of ``keras.applications``, or None if it has no table.

    Example:
        >>> family_of_application("DenseNet121").name
        'DenseNet'
    """
    for family in FAMILIES:
        if any(fnmatchcase(name, pattern) for pattern in family.applications):
            return family
    return None


def _family_in(base_model: str) -> Family | None:
    """Return the family that the name of a base model contains: "user/swin-tiny-flowers"."""
    plain = base_model.rpartition("/")[2].lower().replace("-", "_")
    found = family_of_timm(plain)
    if found is None:
        patterns = ((family, pattern) for family in FAMILIES for pattern in family.timm_models)
        found = next((x for x, pattern in patterns if fnmatch(plain, f"*_{pattern}")), None)
    return found


def _prefixes(family: Family, library: str, names: Iterable[str], is_weight: bool) -> list[str]:
    """Return the possible prefixes of the backbone, the most frequent first."""
    counts: Counter[str] = Counter()
    expression = _expression(family, library, is_weight)
    for name in names:
        found = expression.fullmatch(name)
        if found:
            counts[found["before"] or ""] += 1
    return [prefix for prefix, _ in counts.most_common(3)]


@functools.cache
def _expression(family: Family, library: str, is_weight: bool) -> re.Pattern[str]:
    templates = family.names(library).templates
    inside = [t.pattern() for t in templates if not t.text.startswith("/")]
    plain = list(dict.fromkeys(inside))
    leaf = r"(?:\.[^.]+)?" if is_weight else ""
    # The layers of keras.applications begin with the name of their model.
    before = ".*?" if library == APPLICATIONS else r"(?:[^.]+\.)*?"
    return re.compile(rf"(?P<before>{before})(?:{'|'.join(plain)}){leaf}")
