"""Which tests `make test` runs, and which are left to `make test-nightly`."""

from pathlib import Path

import pytest

from tests.helpers.kerases import BACKEND, LEGACY

_TESTS = Path(__file__).parents[1]


def slow_tests():
    """The ids of the tests that are slow here, although they are of an ordinary kind.

    They took longest on this Keras, while others of their kind are quick.
    `tools/find_slow_tests.py` writes the lists.
    """
    names = {"tensorflow": "legacy" if LEGACY else "keras3"}
    file = _TESTS / f"slow_on_{names.get(BACKEND, BACKEND)}.txt"
    return frozenset(file.read_text().splitlines()) if file.exists() else frozenset()


def mark_slow_tests(items, whole_files):
    """Mark the slow tests as nightly.

    Args:
        items: The collected tests.
        whole_files: Whether all tests of their files were collected.

    Raises:
        pytest.UsageError: If the list has a test that is not in its file any more.
    """
    slow = slow_tests()
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.nightly)
    found = {item.nodeid for item in items}
    files = {nodeid.partition("::")[0] for nodeid in found}
    gone = sorted(x for x in slow - found if x.partition("::")[0] in files)
    if whole_files and gone:
        raise pytest.UsageError(
            f"These slow tests do not exist; update tests/slow_on_*.txt: {', '.join(gone)}"
        )


def nightly_except(values, quick, name=lambda value: getattr(value, "name", value)):
    """Parameters of which only those named in ``quick`` run in `make test`.

    The others differ in what they contain, but take the same path through the package.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            id=str(name(value)),
            marks=[] if name(value) in quick else pytest.mark.nightly,
        )
        for value in values
    ]


#: For modules whose code is the same on both Kerases: `make test` runs them on Keras 3 only,
#: `make test-nightly` on legacy Keras, too.
NIGHTLY_ON_LEGACY = [pytest.mark.nightly] if LEGACY else []


def nightly_on_legacy(test):
    """Mark one test as NIGHTLY_ON_LEGACY marks a module."""
    return pytest.mark.nightly(test) if LEGACY else test
