"""Pictures to predict: files, folders, patterns, URLs and standard input."""

from __future__ import annotations

import glob
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tfimm_lora.cli.app import note
from tfimm_lora.finetuning.data.findings import some
from tfimm_lora.finetuning.data.picture_files import (
    EXTENSIONS,
    is_hidden,
    is_picture,
    natural_order,
)
from tfimm_lora.finetuning.report.formatting import byte_text, readable
from tfimm_lora.utils.suggestions import close_names
from tfimm_lora.version import __version__

#: The name of standard input among the pictures.
STDIN = "-"

#: The most bytes of a picture from a URL or from standard input.
MOST_BYTES = 100_000_000

#: The most seconds without an answer, and of the whole download of a picture.
TIMEOUT, MOST_SECONDS = 20.0, 120.0

_BLOCK = 1 << 16


class Problem(NamedTuple):
    """A path, pattern or URL that is not predicted, with the reason."""

    path: str
    reason: str


@dataclass
class Found:
    """The pictures that were given.

    Attributes:
        names: Files, URLs and "-", each once, in the order in which they were given.
        missing: What was given but does not exist or contains no pictures.
        left_out: Files in folders that are not predicted, and pictures given more than once.
    """

    names: list[str] = field(default_factory=list)
    missing: list[Problem] = field(default_factory=list)
    left_out: list[Problem] = field(default_factory=list)


def find_pictures(given: Iterable[str]) -> Found:
    """Find the pictures in files, folders, patterns such as "holiday/**/*.jpg", and URLs.

    A file that is named is a picture whatever its suffix. In folders and for patterns, the
    suffix decides or, for a file without one, its first bytes.
    """
    found, seen = Found(), set[str]()
    for text in given:
        before = len(found.missing)
        names = list(_names_of(text, found))
        if not names and len(found.missing) == before:
            what = "contains" if os.path.isdir(text) else "matches"
            reason = f"it {what} no pictures; expected files with the suffix "
            found.missing.append(Problem(text, reason + ", ".join(EXTENSIONS)))
        for name in names:
            identity = name if _is_url(name) or name == STDIN else os.path.realpath(name)
            if identity in seen:
                found.left_out.append(Problem(name, "given more than once"))
            else:
                found.names.append(name)
            seen.add(identity)
    return found


def _is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _names_of(text: str, found: Found) -> Iterator[str]:
    """The names that one argument stands for. Problems are added to ``found``."""
    if text == STDIN or _is_url(text):
        yield text
    elif os.path.isdir(text):
        yield from _below(text, found)
    elif os.path.exists(text):
        yield text
    elif re.match(r"[a-zA-Z]\w+://", text):
        found.missing.append(Problem(text, "expected an address with http:// or https://"))
    elif glob.has_magic(text):
        yield from _matching(text, found)
    else:
        found.missing.append(Problem(text, _missing(text)))


def _missing(path: str) -> str:
    folder, name = os.path.split(path)
    if os.path.islink(path):
        return f"it is a link to {os.readlink(path)}, which does not exist"
    if folder and not os.path.isdir(folder):
        return f"there is no folder {folder}"
    try:
        near = close_names(name, os.listdir(folder or "."))
    except OSError:  # a folder that may not be listed
        near = []
    return "it does not exist" + (f"; most similar: {', '.join(near[:3])}" if near else "")


def _below(folder: str, found: Found) -> list[str]:
    """The pictures in a folder and its subfolders. Cyclic links are skipped."""
    names: list[str] = []
    visited = {os.path.realpath(folder)}

    def unreadable(error: OSError) -> None:
        reason = f"the folder cannot be read: {error.strerror or error}"
        found.missing.append(Problem(str(error.filename), reason))

    for above, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        kept = []
        for name in sorted(folders, key=natural_order):
            path = os.path.join(above, name)
            real = os.path.realpath(path)
            if is_hidden(name):
                found.left_out.append(Problem(path, "hidden"))
            elif real in visited:
                found.left_out.append(Problem(path, "a link to a folder listed already"))
            else:
                visited.add(real)
                kept.append(name)
        folders[:] = kept
        for name in sorted(files, key=natural_order):
            path = os.path.join(above, name)
            if _is_left_out(path, name, found):
                continue
            names.append(path)
    return sorted(names, key=natural_order)


def _matching(pattern: str, found: Found) -> Iterator[str]:
    """The pictures that a pattern matches, and those in folders that it matches.

    With "**" the pattern matches the files in subfolders itself.
    """
    is_recursive = "**" in pattern
    for path in sorted(glob.glob(pattern, recursive=True), key=natural_order):
        if os.path.isdir(path):
            yield from () if is_recursive else _below(path, found)
        elif not _is_left_out(path, os.path.basename(path), found):
            yield path


def _is_left_out(path: str, name: str, found: Found) -> bool:
    """Whether a file in a folder or of a pattern is not a picture; if so, record it."""
    if is_hidden(name):
        reason = "hidden"
    elif is_picture(path):
        return False
    else:
        has_suffix = os.path.splitext(name)[1]
        reason = "without the suffix of a picture" if has_suffix else "not a picture"
    found.left_out.append(Problem(path, reason))
    return True


def note_left_out(found: Found) -> None:
    """Print what was left out on stderr, one line for each reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for problem in found.left_out:
        by_reason[problem.reason].append(readable(problem.path))
    for reason, paths in by_reason.items():
        count = f"{len(paths)} file{'' if len(paths) == 1 else 's'}"
        note(f"left out {count} ({reason}): {some(paths, 3)}")


def listed(file: Path) -> list[str]:
    """The names in a text file, one on a line, or separated by NUL (``find -print0``).

    Args:
        file: The file, or "-" for standard input.

    Raises:
        ValueError: if there are none.
    """
    content = _stdin() if str(file) == STDIN else file.read_bytes()
    content = content.removeprefix(b"\xef\xbb\xbf")
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    names = [os.fsdecode(line) for line in lines if line.strip()]
    if not names:
        raise ValueError(
            f"Received --files-from {file}, which is empty; expected a path on each line."
        )
    return names


def _stdin() -> bytes:
    if sys.stdin.isatty():
        raise ValueError(
            "Received - (standard input), which is the terminal; expected a pipe or file: "
            "tfimm-lora predict RUN - < picture.jpg"
        )
    return sys.stdin.buffer.read(MOST_BYTES + 1)


def fetched(names: list[str], folder: Path) -> dict[str, str | Problem]:
    """The file of each picture: itself, or a copy in ``folder`` of a URL or standard input.

    Returns:
        The files by name, in the order of the names. A ``Problem`` instead of a file for what
        cannot be read.
    """

    def fetch(number: int, name: str) -> str | Problem:
        if name != STDIN and not _is_url(name):
            return name
        path = folder / str(number)
        try:
            with open(path, "wb") as file:
                _download(name, file) if name != STDIN else _copy_stdin(file)
        except (OSError, ValueError) as error:
            return Problem(name, _reason(error))
        return str(path)

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(fetch, range(len(names)), names)))


def _copy_stdin(file: BinaryIO) -> None:
    content = _stdin()
    if not content:
        raise ValueError("standard input is empty; expected the bytes of a picture")
    if len(content) > MOST_BYTES:
        raise ValueError(_too_large(len(content)))
    file.write(content)


def _download(url: str, file: BinaryIO) -> None:
    """Write the content of a URL to a file.

    Raises:
        OSError: if the server cannot be reached, or answers with an error.
        ValueError: if the content is too large, too slow or a web page.
    """
    quoted = urllib.parse.quote(url, safe=":/?&=%#+,;@!$'()*[]~")
    request = urllib.request.Request(
        quoted, headers={"User-Agent": f"tfimm-lora/{__version__}", "Accept": "image/*,*/*"}
    )
    end = time.monotonic() + MOST_SECONDS
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise ValueError("it is a web page; expected the address of the picture itself")
        size = int(answer.headers.get("Content-Length") or 0)
        while size <= MOST_BYTES and (block := answer.read1(_BLOCK)):
            file.write(block)
            size = max(size, file.tell())
            if time.monotonic() > end:
                raise ValueError(f"the download takes more than {MOST_SECONDS:.0f} s")
        if size > MOST_BYTES:
            raise ValueError(_too_large(size))
        if file.tell() < size:
            raise ValueError(f"the connection ended after {file.tell()} of {size} bytes")


def _too_large(size: int) -> str:
    return f"it has at least {byte_text(size)}; expected at most {byte_text(MOST_BYTES)}"


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}".rstrip()
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    if isinstance(error, urllib.error.URLError):
        reason = error.reason
        if isinstance(reason, TimeoutError):
            return f"no answer within {TIMEOUT:g} s"
        text = reason.strerror if isinstance(reason, OSError) else None
        return f"the server cannot be reached: {text or reason}"
    return str(error) or type(error).__name__
