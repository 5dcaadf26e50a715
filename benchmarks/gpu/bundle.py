"""Collect what ``measure.py`` needs on a machine without a network, in a folder of a few MB.

    python benchmarks/gpu/bundle.py FOLDER [--python 3.12]

The folder gets the scripts, and wheels of this package and of what a machine with torch, jax,
timm and peft may lack. There:

    pip install --no-index --no-deps FOLDER/wheels/*.whl
    python FOLDER/measure.py --out results
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

PACKAGES = (
    "keras",
    "keras-hub",
    "absl-py",
    "h5py",
    "lazy_loader",
    "namex",
    "optree",
    "rich",
    "wrapt",
)
#: The oldest ones for which all of the packages have wheels.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the version on the other machine")
    args = parser.parse_args()
    wheels = args.folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    download = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels)]
    download += ["--python-version", args.python, *platforms, *PACKAGES]
    subprocess.run([*pip, *download], check=True)
    build = ["wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    # The contenders of PEFT use the module above this folder.
    for script in (*HERE.glob("*.py"), HERE.parent / "torchvision_schemas.py"):
        shutil.copy(script, args.folder)
    size = sum(file.stat().st_size for file in args.folder.rglob("*") if file.is_file())
    print(f"{args.folder}: {len(list(wheels.iterdir()))} wheels, {size / 2**20:.0f} MB in all")


if __name__ == "__main__":
    main()
