"""Check that generated pages match the data and the code they are generated from.

Run by ``make quality``, with legacy Keras and tfimm installed. Nothing is measured again:

* the tables of performance.md and variants.md are those of their JSON files;
* the best learning rate of each method in variants.json lies inside the range that was tried;
* architectures.md has the text and the names that the package reports, and the sizes of
  ``tfimm_lora/zoo/models.json``;
* names.md has the tables of ``tfimm_lora/families``.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]


def text_of(name):
    """The text of the one page of this file name."""
    (path,) = DOCS.rglob(name)
    return path.read_text("utf-8")


def performance():
    """Return the rows of performance.json that performance.md lacks."""
    import performance_page

    shown = set(text_of("performance.md").splitlines())
    made = performance_page.whole(json.loads((DOCS / "performance.json").read_text()))
    return [
        f"performance.md lacks the row of performance.json: {line}"
        for line in made.splitlines()
        if line.startswith("|") and line not in shown
    ]


def variants():
    """Return what is wrong with variants.md and with the rates in variants.json."""
    import variants_page

    results = json.loads((DOCS / "variants.json").read_text())
    found = []
    if variants_page.table(results) not in text_of("variants.md"):
        found.append("variants.md does not contain the table of variants.json")
    for name, method in results["methods"].items():
        tried = sorted(float(rate) for rate in method["validation"])
        if not 1.001 * tried[0] < method["rate"] < 0.999 * tried[-1]:
            found.append(
                f"variants.json: the best rate of {name} is the lowest or highest tried"
            )
    return found


def architectures():
    """Return the differences between architectures.md, the package and models.json."""
    import make_architectures

    written = text_of("architectures.md")
    rows = {line.split("`")[1]: line for line in written.splitlines() if line.startswith("| `")}
    names = [name for names in make_architectures.families().values() for name in names]
    if list(rows) != names:
        return ["architectures.md does not list the models of tfimm in order"]
    found = []
    if make_architectures.page(rows) != written:
        found.append("architectures.md differs from the page that make_architectures writes")
    table = json.loads((ROOT / "tfimm_lora" / "zoo" / "models.json").read_text())
    sizes = {name: row[0] for name, row in table["tfimm"]["models"].items()}
    shown = {name: row.split("|")[2].strip() for name, row in rows.items()}
    if shown != {name: f"{count / 1e6:.1f} M" for name, count in sizes.items()}:
        found.append("architectures.md and tfimm_lora/zoo/models.json differ")
    return found


def names():
    """Return whether names.md differs from the tables of names."""
    import make_names

    same = make_names.page() == text_of("names.md")
    return [] if same else ["names.md differs from the page that make_names.py writes"]


def main():
    """Print everything that is wrong and return the exit status."""
    found = performance() + variants() + architectures() + names()
    print("\n".join(found) if found else "The generated pages match their data.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
