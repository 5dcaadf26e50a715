"""Torch's files, read without torch, compared with torch.load."""

import numpy as np
import pytest
import torch

from tests.golden.make_torch import state_dict
from tfimm_lora.zoo.weights.torch_files import read_torch_tensors


@pytest.mark.parametrize("zip_format", [True, False])
def test_tensors_are_those_of_torch(zip_format, tmp_path):
    path = tmp_path / "file.pth"
    torch.save(
        {"epoch": 3, "state_dict": state_dict()},
        path,
        _use_new_zipfile_serialization=zip_format,
    )
    expected = torch.load(path, weights_only=True)["state_dict"]
    found = read_torch_tensors(path)
    assert list(found) == list(expected)
    for key, value in expected.items():
        value = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        assert found[key].shape == tuple(value.shape)
        np.testing.assert_array_equal(found[key].astype(value.numpy().dtype), value.numpy())


def test_a_module_is_refused(tmp_path):
    """It needs the code of its class."""
    torch.save(torch.nn.Linear(2, 3), tmp_path / "file.pth")
    with pytest.raises(ValueError, match="without torch"):
        read_torch_tensors(tmp_path / "file.pth")
