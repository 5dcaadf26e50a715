"""Check that no tracked file contains an absolute path of a developer's machine.

Run by ``make quality``.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: The first folder of a home or a workspace, not preceded by the rest of a longer path.
PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w")
BINARY = {".npz", ".pth", ".safetensors", ".svg", ".png"}


def main():
    """Print each offending line and return the exit status."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = [
        f"{name}:{number}: names a folder of one machine: {line.strip()}"
        for name in listed.stdout.split("\0")
        if (ROOT / name).is_file() and Path(name).suffix not in BINARY
        for number, line in enumerate((ROOT / name).read_text("utf-8").splitlines(), 1)
        if PATH.search(line)
    ]
    print("\n".join(found) if found else "No file names a folder of one machine.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
