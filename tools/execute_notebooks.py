"""Execute the notebooks and store their outputs.

    python tools/execute_notebooks.py [NAME ...]

Needs ``pip install nbclient ipykernel``, and for the notebook with PyTorch what
``make test-interop`` installs. Warnings and logs are not stored.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
#: Makes torchvision, which timm imports, importable beside torch for the CPU.
PRELUDE = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
import tests.interop
"""


def is_log(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a warning or a log; TensorFlow prints its own to stdout."""
    text = output.get("text", "")
    return output.get("name") == "stderr" or text.startswith(("WARNING:", "INFO:"))


def execute(path: Path) -> None:
    """Execute one notebook in a temporary folder and write it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(PRELUDE))
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=1200, resources=resources).execute()
    del notebook.cells[0]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        cell.execution_count = number
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if not is_log(output)]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    notebook.metadata.language_info = {"name": "python"}
    path.write_text(nbformat.writes(notebook, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Execute the named notebooks, or all."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if path.stem in sys.argv[1:] or not sys.argv[1:]:
            print(path.stem, flush=True)
            execute(path)


if __name__ == "__main__":
    main()
