"""Make ``torch_*.pth`` beside this file with real torch: the same tensors in both formats.

    python -m tests.golden.make_torch       # after make test-interop, which installs torch

The values are in ``torch_tensors.npz``, with bfloat16 as float32.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn

FOLDER = Path(__file__).parent


def state_dict():
    """All types, and tensors that are transposed, share their values, or are parameters."""
    random = torch.Generator().manual_seed(0)
    kernel = torch.randn((4, 3, 2, 2), generator=random)
    values = OrderedDict(
        kernel=kernel,
        channels_last=kernel.to(memory_format=torch.channels_last),
        transposed=torch.randn((3, 5), generator=random).T,
        row=kernel.flatten()[7:11],
        tied=kernel,
        parameter=nn.Parameter(torch.randn(3, generator=random)),
        double=torch.randn(2, generator=random, dtype=torch.float64),
        half=torch.randn(3, generator=random).half(),
        bfloat=torch.randn(5, generator=random).bfloat16(),
        counter=torch.tensor(7),
        short=torch.tensor([1, -2], dtype=torch.int16),
        byte=torch.tensor([[1], [255]], dtype=torch.uint8),
        flags=torch.tensor([True, False]),
        empty=torch.zeros((0, 3)),
    )
    values._metadata = {"": {"version": 1}}  # as module.state_dict() has it
    return values


def main():
    """Write the files."""
    values = state_dict()
    torch.save(values, FOLDER / "torch_zip.pth")
    torch.save(values, FOLDER / "torch_old.pth", _use_new_zipfile_serialization=False)
    arrays = {k: (v.float() if k == "bfloat" else v).detach() for k, v in values.items()}
    np.savez(FOLDER / "torch_tensors.npz", **{k: v.numpy() for k, v in arrays.items()})


if __name__ == "__main__":
    main()
