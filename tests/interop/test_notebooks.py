"""The notebook that exchanges adapters with torch, run."""

import pytest

from tests.docs.test_examples import NEEDS_TORCH, ROOT, notebook_code, run_program


@pytest.mark.nightly
def test_notebook_with_torch(tmp_path):
    code = notebook_code(ROOT / "notebooks" / f"{NEEDS_TORCH}.ipynb")
    # What makes timm's torchvision importable beside torch for the CPU.
    prelude = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tests.interop"
    run_program(f"{prelude}\n{code}", tmp_path)
