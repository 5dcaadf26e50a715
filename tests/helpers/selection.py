"""Which tests `make test` runs, and which are left to `make test-long`."""

import pytest

from tests.helpers.kerases import LEGACY


def long_except(values, quick, name=lambda value: getattr(value, "name", value)):
    """Parameters of which only those named in ``quick`` run in `make test`.

    The others differ in what they contain, but take the same path through the package.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            id=str(name(value)),
            marks=[] if name(value) in quick else pytest.mark.long,
        )
        for value in values
    ]


#: For modules whose code is the same on both Kerases: `make test` runs them on Keras 3 only,
#: `make test-long` on legacy Keras, too.
LONG_ON_LEGACY = [pytest.mark.long] if LEGACY else []


def long_on_legacy(test):
    """Mark one test as LONG_ON_LEGACY marks a module."""
    return pytest.mark.long(test) if LEGACY else test
