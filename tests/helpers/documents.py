"""The commands in the bash blocks of README and docs."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]


def documents() -> list[str]:
    """README and the pages of the docs, relative to the repository."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return ["README.md", *(page.relative_to(ROOT).as_posix() for page in pages)]


def commands_in(document: str) -> list[str]:
    """The commands in the bash blocks of a document, each in one line, without comments."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found, started = [], ""
    for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, flags=re.S):
        for line in block.splitlines():
            started += " " + line.strip().removesuffix("\\").strip()
            if line.endswith("\\") or not _is_complete(started):
                continue
            command = shlex.join(shlex.split(started, comments=True))
            if command:
                # shlex quotes what joins commands, too.
                found.append(command.replace("'&&'", "&&"))
            started = ""
    return found


def _is_complete(line: str) -> bool:
    """Whether all quotes are closed."""
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return False
    return True
