"""Without torch and timm, or on legacy Keras, these tests are left out."""

from tests.helpers.kerases import LEGACY
from tests.interop import MISSING

collect_ignore_glob = ["test_*.py"] if MISSING or LEGACY else []
