"""Train an adapter for 20 steps of SGD with real transformers and PEFT, and write it.

    python -m tests.interop.hugging_face.train MODEL ADAPTER BATCH OUT

BATCH is an npz file with `pixel_values` and `labels`, and if it wants to, `lr` (0.1) and
`steps` (20). Each step takes the whole batch. The loss is the mean cross entropy of the
logits. The model is in inference mode: no dropout, and BatchNorm keeps its statistics. OUT
becomes the folder of the trained adapter, with the losses in `losses.npz`.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from tests.interop.hugging_face.loading import load_adapted


def train(model, adapter, batch, out):
    adapted = load_adapted(model, adapter, trainable=True)
    batch = np.load(batch)
    pixels, labels = torch.from_numpy(batch["pixel_values"]), torch.from_numpy(batch["labels"])
    rate = float(batch["lr"]) if "lr" in batch else 0.1
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate)
    losses = []
    for _ in range(int(batch["steps"]) if "steps" in batch else 20):
        output = adapted.base_model(pixel_values=pixels)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    adapted.save_pretrained(out)
    np.savez(Path(out) / "losses.npz", losses=losses)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    train(*sys.argv[1:])
