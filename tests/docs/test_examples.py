"""The examples in README, docs and docstrings, and the notebooks, run."""

import doctest
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tfimm_lora
from tests.helpers.kerases import BACKEND, LEGACY

ROOT = Path(__file__).parents[2]
if BACKEND != "tensorflow":
    pytest.skip("the examples use TensorFlow", allow_module_level=True)

#: Examples that need tfimm, and so legacy Keras.
NEEDS_TFIMM = ("create_model(", "list_models(")


def python_blocks():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for number, code in enumerate(blocks(path, "python")):
            # Examples that run on both Kerases: on legacy Keras by `make test-nightly`.
            marks = [pytest.mark.nightly] if LEGACY and not needs_tfimm(code) else []
            yield pytest.param(code, id=f"{path.relative_to(ROOT)}-{number}", marks=marks)


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.S)


def needs_tfimm(text):
    return any(name in text for name in NEEDS_TFIMM)


def run_program(code, folder):
    # Figures are not shown but drawn.
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": "Agg"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("code", list(python_blocks()))
def test_example_in_documents(code, tmp_path, monkeypatch):
    """In this process: a new one would spend most of its time importing TensorFlow."""
    if not LEGACY and any(name in code for name in NEEDS_TFIMM):
        pytest.skip("needs tfimm")
    if LEGACY and "keras_hub" in code:
        pytest.skip("needs Keras 3")
    if "keras.distribution" in code:
        pytest.skip(
            "needs JAX and several devices; tests/finetuning and tests/layers have the same"
        )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})


@pytest.mark.nightly
@pytest.mark.skipif(LEGACY, reason="once is enough")
def test_tutorial_with_the_command_line(tmp_path):
    tutorial = ROOT / "docs" / "tutorials" / "pictures-to-report.md"
    (code,) = blocks(tutorial, "python")
    run_program(code, tmp_path)
    commands = "\n".join(blocks(tutorial, "bash"))
    program = f"{sys.executable} -m tfimm_lora"
    done = subprocess.run(
        ["bash", "-ec", commands.replace("tfimm-lora", program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "model.onnx").exists()


def modules():
    for module in pkgutil.walk_packages(tfimm_lora.__path__, "tfimm_lora."):
        skipped = ("legacy", "keras3") if not LEGACY else ("keras3",)
        if not LEGACY and "architectures" in module.name:
            continue
        if module.name.rpartition(".")[2] not in (*skipped, "__main__"):
            marks = (
                [pytest.mark.nightly] if LEGACY and not needs_tfimm(source_of(module)) else []
            )
            yield pytest.param(module.name, id=module.name, marks=marks)


def source_of(module):
    return Path(module.module_finder.find_spec(module.name, None).origin).read_text()


@pytest.mark.parametrize("name", list(modules()))
def test_examples_in_docstrings(name):
    if name.rpartition(".")[2].startswith("torch_"):
        pytest.importorskip("torch")  # which `make test` does not install
    module = importlib.import_module(name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(verbose=False)
    for test in finder.find(module, name):
        if not LEGACY and any(n in e.source for e in test.examples for n in NEEDS_TFIMM):
            continue
        output = []
        runner.run(test, out=output.append)
        assert runner.failures == 0, "".join(output)


def notebook_code(path):
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


#: With torch and PEFT; run by tests/interop.
NEEDS_TORCH = "adapters_between_keras_and_pytorch"
#: With weights, and pictures, of other packages; run by test_demo.py.
NEEDS_PHOTOGRAPHS = "photographs_to_int8_tflite"
NEEDS_WEIGHTS = "microscope_picture_to_masks"


def notebooks():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if path.stem not in (NEEDS_TORCH, NEEDS_PHOTOGRAPHS, NEEDS_WEIGHTS):
            yield pytest.param(path, id=path.stem, marks=pytest.mark.nightly)


@pytest.mark.parametrize("path", list(notebooks()))
def test_notebook(path, tmp_path):
    if not LEGACY and "legacy Keras" in path.read_text():
        pytest.skip("needs tfimm")
    run_program(notebook_code(path), tmp_path)


@pytest.mark.skipif(not LEGACY, reason="independent of Keras")
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs_jupyter")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    pages = {
        name: (tmp_path / "reference" / "api" / name / "index.html").read_text()
        for name in ("models", "layers", "adapters", "training", "tfimm")
    }
    assert "lora_rank" in pages["models"] and "https://fonts" not in pages["models"]
    shown = re.findall(r'id="tfimm_lora\.(\w+)"', "".join(pages.values()))
    assert set(lora_names()) <= set(shown)
    assert "Rank r of the update" in pages["layers"]
    home = (tmp_path / "index.html").read_text()
    assert "notebooks/quickstart/" in home


def lora_names():
    return [name for name in tfimm_lora.__all__ if not name.startswith("__")]


def test_every_public_name_is_on_an_api_page():
    pages = sorted((ROOT / "docs" / "reference" / "api").glob("*.md"))
    text = "".join(page.read_text() for page in pages)
    named = re.findall(r"^::: tfimm_lora\.(\w+)$", text, flags=re.M)
    assert len(named) == len(set(named))
    if LEGACY:
        assert set(named) == set(lora_names())
    else:
        assert set(named) >= set(lora_names())


def test_notebooks_have_outputs():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
        assert outputs and not any(o["output_type"] == "error" for o in outputs), path.name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_files_named_in_the_documents_exist():
    """Paths in backticks, as layers/dense.py, are files of the package or of the repository."""
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tfimm_lora").rglob("*.py")}
    for name in ("explanation/design.md", "explanation/code-paths.md", "../CONTRIBUTING.md"):
        for named in re.findall(r"`([\w/.]+\.py)`", (ROOT / "docs" / name).read_text()):
            found = any(file.endswith(f"/{named}") for file in files) or (ROOT / named).exists()
            assert found, (name, named)


def test_links_in_the_documents_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if not target.startswith(("http:", "https:")):
                # The notebooks lie beside docs/ and are part of the site.
                beside = ROOT / target.lstrip("./") if "notebooks/" in target else None
                found = (path.parent / target).exists() or (beside and beside.exists())
                assert found, (path.name, target)


@pytest.mark.nightly
@pytest.mark.skipif(not LEGACY, reason="of tfimm models")
def test_benchmark_runs(tmp_path):
    out, picture = tmp_path / "table.json", tmp_path / "images" / "table.svg"
    program = [sys.executable, "benchmarks/performance.py", "--quick"]
    program += ["--json", str(out), "--picture", str(picture)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(out.read_text())
    contenders = results["models"]["vit_tiny"]["contenders"]
    assert contenders["tfimm"] == {"absent": "has LoRA for ConvNeXt alone"}
    measured = {name: e for name, e in contenders.items() if "absent" not in e}
    # That of torch may be absent.
    assert {*measured, "peft"} == {*contenders} - {"tfimm"}
    assert "seconds" in results["models"]["convnext_tiny"]["contenders"]["tfimm"]
    for entry in [*measured.values(), *results["growth"]["rank (vit_tiny, batch 2)"].values()]:
        assert len(entry["seconds"]["step"]) == len(entry["seconds"]["forward"]) == 2
        assert entry["memory"]["peak"] >= 0
    # All adapt the same layers.
    others = set(measured) - {"floor", "full"}
    assert len({measured[name]["trained"] for name in others}) == 1
    assert set(results["operations"]["operations"]) > {"inject", "merge", "switch", "load"}
    assert "| ours |" in done.stdout and picture.read_text().startswith("<?xml")
