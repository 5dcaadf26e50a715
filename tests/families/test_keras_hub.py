"""Every variable of a model of keras_hub has a name in timm, and back."""

import pytest

from tests.helpers.kerases import LEGACY

pytestmark = pytest.mark.skipif(LEGACY, reason="keras_hub runs on Keras 3")

if not LEGACY:
    from tests.families.hub_models import MODELS
else:
    MODELS = {}


@pytest.fixture(params=sorted(MODELS))
def hub(request):
    from tfimm_lora.zoo.weights.module_names import ModuleNames

    return request.param, ModuleNames(MODELS[request.param]())


def test_variables_have_timm_names(hub):
    _, names = hub
    found = {w.key: names.naming.to_timm(w.key, is_weight=True) for w in names.weights}
    assert [key for key, name in found.items() if name is None] == []
    assert len(set(found.values())) == len(found)
    back = {key: names.naming.from_timm(name, is_weight=True) for key, name in found.items()}
    assert back == {key: key for key in found}
