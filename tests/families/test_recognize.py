"""Recognizing whose names a file has, and what messages say of them."""

import pytest

from tfimm_lora.families import FAMILIES
from tfimm_lora.families.family import LIBRARIES, TIMM
from tfimm_lora.families.recognize import (
    Naming,
    explanation,
    recognize,
    recognize_other,
    recognize_surely,
)
from tfimm_lora.families.templates import Name, Template
from tfimm_lora.families.vit import VIT

pytestmark = pytest.mark.once

V4 = [
    f"vit.encoder.layer.{i}.attention.attention.{n}" for i in (0, 1) for n in ("query", "key")
]
V5 = [f"vit.layers.{i}.attention.{n}_proj" for i in (0, 1) for n in "qv"]
SWIN = [f"swin.encoder.layers.0.blocks.{i}.attention.self.query" for i in (0, 1)]
OURS = ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (V4, "transformers 4's names of ViT behind the prefix 'vit.'"),
        (V5, "transformers 5's names of ViT behind the prefix 'vit.'"),
        ([f"deit.{x[4:]}" for x in V4], "transformers 4's names of DeiT behind .*'deit.'"),
        ([x[4:] for x in V4], "transformers 4's names of ViT$"),
        (OURS, "timm's names of ViT$"),
        ([f"timm_model.{x}" for x in OURS], "timm's names of ViT behind .*'timm_model.'"),
        (SWIN, r"transformers('| 4's) names of Swin behind the prefix 'swin.'"),
    ],
)
def test_names_are_recognized(names, text):
    import re

    assert re.match(text, str(recognize_surely(names)))


def test_a_few_known_names_among_others_are_not_recognized():
    assert recognize_surely([*OURS, "blocks.0.gate", "blocks.1.gate", "blocks.2.gate"]) is None
    assert recognize_surely(["head"]) is recognize_surely(["norm", "head"]) is None
    others = [f"thing.{i}" for i in range(5)]
    assert recognize_surely([*V4, *others]) is None
    assert recognize_surely([*V4, others[0]]) is not None


def test_the_base_model_decides_between_families_with_equal_names():
    assert recognize(OURS).family is VIT
    found = recognize(OURS, hint="timm/deit_tiny_distilled_patch16_224.fb_in1k")
    assert found.family.transformers == {"deit": "deit"}


@pytest.mark.parametrize(
    ("names", "own", "words"),
    [
        (V4, None, "It has transformers 4's names of ViT .* family of the model is not known"),
        (SWIN, Naming(VIT, TIMM), "Its family is Swin .* the model's ViT"),
        (OURS, None, "^$"),
        (OURS, Naming(VIT, TIMM), "^$"),
        (V4, Naming(VIT, TIMM), "It has transformers 4's names .*, the model timm's names"),
        (["focalnet.0.x"], Naming(VIT, TIMM), "begin with 'focalnet.', as in transformers"),
        (["a.fc", "b.fc"], Naming(VIT, TIMM), "^$"),
    ],
)
def test_messages_explain_names_of_others(names, own, words):
    import re

    assert re.search(words, explanation(names, own))


def test_a_family_with_the_same_names_is_not_another_one():
    found = recognize_other([f"deit.{x[4:]}" for x in V4], Naming(VIT, TIMM))
    assert found is None or found.family is VIT


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_row_is_translated_into_timm_and_back(family):
    if getattr(family, "depths", ()):
        pytest.skip("the numbers of its blocks depend on the model")
    for library in LIBRARIES:
        names = family.names(library)
        for row in family.rows:
            own = row.column(library)
            if own is None or library == TIMM:
                continue
            template, timm = Template(own), Template(row.timm)
            numbers = {name: 3 for name in "abcdefghijklmnopqrstuvwxyz"}
            written, expected = template.write(numbers), timm.write(numbers)
            if written is None or expected is None:
                continue  # not every number is one of this row
            there = names.to_timm(written)
            assert there == expected, (library, own)
            # Several names of a library may be one in timm: the way back is one of them.
            back = names.from_timm(there)
            assert back is not None and names.to_timm(back) == there
            assert isinstance(back, Name)
