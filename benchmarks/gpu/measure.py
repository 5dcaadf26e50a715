"""LoRA on one GPU: training steps, memory, the largest batch and mixed batches of adapters.

    python benchmarks/gpu/measure.py --out FOLDER [--seconds 460] [--small]

Measures ours on Keras 3 (JAX and torch), PEFT on timm with and without torch.compile, full
fine-tuning, and the floor, in which nothing but the lowest bias is trained. Each contender has
a process of its own; the most important ones come first. FOLDER/gpu.json is rewritten after
each, so that a run that is ended keeps what it has; contenders for which there was no time say
so.

Needs torch, jax, timm, peft, keras, keras_hub and tfimm_lora, but neither TensorFlow nor a
network; ``bundle.py`` collects what to bring along. ``--small`` tries all of it on a CPU.

Weights are random, pictures have 224 x 224 pixels, the optimizer is Adam, and the batch is on
the device, so nothing but the device works in the timed loop. In float32 both frameworks may
use TF32. The adapted layers are the default targets of tfimm_lora and the same layers of timm;
the classifier is trained. Models of Keras have q, k and v apart, each with factors of its own,
where timm's have one layer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent

#: A contender is not started with less time left, in seconds.
LEAST = 25
#: No contender may take longer.
MOST = 150


class Entry(NamedTuple):
    """What one process measures.

    Attributes:
        contender: "ours-jax", "ours-torch", "peft", "peft-compile", "full-jax", "full-torch" or
            "floor-jax".
        measurement: "step", "largest batch" or "mixed batch".
    """

    contender: str
    model: str
    batch: int
    dtype: str
    measurement: str = "step"


BOTH = ("ours-jax", "peft-compile", "peft", "floor-jax")
ENTRIES = (
    *(Entry(c, "vit_base", 64, "bfloat16") for c in (*BOTH, "full-jax", "ours-torch")),
    *(Entry(c, "resnet50", 64, "bfloat16") for c in BOTH),
    *(Entry(c, "convnext_base", 64, "bfloat16") for c in BOTH),
    *(Entry(c, "vit_base", 64, "float32") for c in BOTH),
    *(Entry(c, "vit_large", 32, "bfloat16") for c in ("ours-jax", "peft-compile")),
    *(Entry(c, "vit_base", 32, "bfloat16", "mixed batch") for c in ("ours-jax", "peft")),
    *(Entry(c, "vit_base", 128, "bfloat16", "largest batch") for c in ("ours-jax", "peft")),
    *(Entry(c, "vit_large", 32, "bfloat16") for c in ("peft", "full-jax", "full-torch")),
)


def environment(entry: Entry) -> dict[str, str]:
    return {
        **os.environ,
        "KERAS_BACKEND": "torch" if entry.contender.endswith("-torch") else "jax",
        "TF_USE_LEGACY_KERAS": "0",
        # Otherwise JAX takes three quarters of the memory, whatever it needs.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def measured(entry: Entry, seconds: float, small: bool) -> dict[str, Any]:
    """The result of one process, or why there is none."""
    command = [sys.executable, str(HERE / "contender.py"), json.dumps(entry._asdict())]
    command += ["--small"] if small else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment(entry)
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {seconds:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=460, help="for all contenders")
    parser.add_argument("--small", action="store_true", help="tiny, to try it on a CPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    rows = []
    for entry in ENTRIES:
        left = end - time.monotonic()
        if left < LEAST:
            result: dict[str, Any] = {"error": "no time left"}
        else:
            result = measured(entry, min(left, MOST), args.small)
        rows.append({**entry._asdict(), **result})
        print(json.dumps(rows[-1]), flush=True)
        temporary = args.out / "gpu.json.tmp"
        temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        temporary.replace(args.out / "gpu.json")


if __name__ == "__main__":
    main()
