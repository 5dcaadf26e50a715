"""Every variable of a model of tfimm is in the table of its family."""

import pytest

from tests.helpers.kerases import LEGACY

pytestmark = pytest.mark.skipif(not LEGACY, reason="tfimm runs on legacy Keras")

if LEGACY:
    from tests.helpers.tiny_architectures import ARCHITECTURES
else:
    ARCHITECTURES = {}


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "swin", "pvt_v2"])
def test_variables_are_in_the_table(name):
    from tfimm_lora.families.templates import Name
    from tfimm_lora.zoo.weights.module_names import ModuleNames

    names = ModuleNames(ARCHITECTURES[name].make())
    keys = [weight.key for weight in names.weights]
    assert [key for key in keys if names.naming.to_timm(key, is_weight=True) != Name(key)] == []
    for library in names.naming.family.libraries:
        table = names.naming.family.names(library)
        found = {}
        for key in keys:
            blocks = [Name(key), *(Name(key, block) for block in "qkv")]
            found[key] = [x for x in blocks if table.from_timm(x, is_weight=True) is not None]
        missing = [key for key, blocks in found.items() if not blocks]
        assert missing == [], library


def test_family_of_models_with_other_names():
    from tfimm_lora.families.vit import DEIT_DISTILLED, VIT
    from tfimm_lora.zoo.weights.module_names import ModuleNames

    for kind, family in (("vit", VIT), ("deit_distilled", DEIT_DISTILLED)):
        model = ARCHITECTURES[kind].make(name="my_model")
        assert ModuleNames(model).naming.family is family
