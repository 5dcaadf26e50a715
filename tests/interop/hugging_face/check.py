"""Load an adapter with real transformers and PEFT, and write the outputs.

    python -m tests.interop.hugging_face.check MODEL ADAPTER BATCH OUT

MODEL is a folder of `save_pretrained`; ADAPTER the folder of an adapter, or "-" for the model
alone; BATCH an npz file with `pixel_values`. OUT becomes an npz file with `outputs`: logits,
or the last hidden state where the task type of the adapter is FEATURE_EXTRACTION. It is an
error if PEFT misses a key, finds an unexpected one, or warns. Several groups of four
arguments make one process do several checks.
"""

import sys

import numpy as np

from tests.interop.hugging_face.loading import load_adapted, load_model, run


def check(model, adapter, batch, out):
    loaded = load_model(model) if adapter == "-" else load_adapted(model, adapter)
    np.savez(out, outputs=run(loaded, np.load(batch)["pixel_values"]))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or len(arguments) % 4:
        sys.exit(__doc__)
    for i in range(0, len(arguments), 4):
        check(*arguments[i : i + 4])
