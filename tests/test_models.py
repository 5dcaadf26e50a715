"""Every LoRA model keeps every promise of the contract."""

import pytest

from tests import model_contracts as contracts
from tests.kerases import BACKEND, LEGACY
from tests.tiny_models import APPLICATIONS, IDS, MODELS

promises = pytest.mark.parametrize("promise", contracts.PROMISES, ids=lambda f: f.__name__)


@pytest.mark.backends
@promises
@pytest.mark.parametrize("spec", MODELS, ids=IDS)
def test_model(spec, promise, tmp_path):
    promise(spec, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    LEGACY or BACKEND != "tensorflow", reason="of Keras 3, tested on TensorFlow"
)
@pytest.mark.parametrize("spec", APPLICATIONS, ids=[m.name for m in APPLICATIONS])
def test_applications_adapt_train_merge_and_come_back(spec, tmp_path):
    contracts.adapts_trains_merges_and_comes_back(spec, tmp_path)
