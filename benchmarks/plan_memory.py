"""What ``tfimm-lora plan --batch-size`` predicts, and the memory that ``finetune`` takes.

    TF_USE_LEGACY_KERAS=1 python benchmarks/plan_memory.py

Each training is a process of its own, with random pictures and random weights. Its memory is
the highest resident size that the system has seen. Linux and macOS.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

CHECKPOINTED = "--gradient-checkpointing"
#: Models, batch sizes, and other options.
CASES = (
    ("vit_tiny_patch16_224", 8),
    ("vit_tiny_patch16_224", 32),
    ("vit_tiny_patch16_224", 32, CHECKPOINTED),
    ("convnext_tiny", 16),
    ("convnext_tiny", 16, CHECKPOINTED),
    ("swin_tiny_patch4_window7_224", 8),
    ("resnet50", 32),
    ("vit_base_patch16_224", 8),
    ("vit_base_patch16_224", 8, CHECKPOINTED),
)
_UNIT = 1 if sys.platform == "darwin" else 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", help="only these, separated by commas")
    chosen = parser.parse_args().models
    print(f"{'model':40}{'batch':>6}  {'predicted':>9}  {'taken':>9}  ratio")
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder, "pictures"))
        for model, batch, *more in CASES:
            if chosen and model not in chosen.split(","):
                continue
            options = [model, "--batch-size", str(batch), *more]
            found = json.loads(run("plan", *options, "--classes", "2", "--json")[0])
            expected = found["memory"]["lora"]["together"] / 1e6
            data = ["--data", f"{folder}/pictures", "--validation", "0.3", "--epochs", "1"]
            name = f"{folder}/{model}-{batch}-{len(more)}"
            _, taken = run(
                *(
                    "finetune",
                    "--model",
                    *options,
                    "--from-scratch",
                    "--lr",
                    "1e-5",
                    *data,
                    "--out",
                    name,
                )
            )
            what = model + (", checkpointed" if more else "")
            print(
                f"{what:42}{batch:>4}  {expected:6.0f} MB  {taken:6.0f} MB  "
                f"{expected / taken:5.2f}",
                flush=True,
            )


def write_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("one", "other"):
        (folder / name).mkdir(parents=True)
        for number in range(60):
            picture = rng.integers(0, 255, (240, 240, 3), dtype="uint8")
            Image.fromarray(picture).save(folder / name / f"{number}.jpg")


def run(*command: str) -> tuple[str, float]:
    """The output of a command of tfimm-lora, and the highest size of its process in MB."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    # In a process between: the system keeps the highest of all children.
    code = (
        "import json, resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "size = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "print(json.dumps([done.returncode, done.stdout, done.stderr, size]))\n"
    )
    program = [sys.executable, "-c", code, sys.executable, "-m", "tfimm_lora", *command]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=True)
    status, output, errors, size = json.loads(done.stdout)
    if status:
        raise SystemExit(errors)
    return output, size * _UNIT / 1e6


if __name__ == "__main__":
    main()
