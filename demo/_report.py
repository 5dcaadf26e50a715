"""How the demo shows its results: a table on the console and a page that compares the ways."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tfimm_lora.finetuning.data.dataset import Split
from tfimm_lora.finetuning.report.html import Html, tag, thumbnail

console = Console(highlight=False)

#: The number of test pictures of each class that are shown.
SHOWN = 2

STYLE = """
.ways td:first-child, .ways th { white-space: nowrap; }
.ways .best > * { font-weight: 650; }
.ways .random .bar i { background: var(--muted); }
.mistakes .wrong { color: var(--orange); }
"""


@dataclass(frozen=True)
class Way:
    """How one way of adapting the model came out.

    Attributes:
        name: What was trained.
        pretrained: Whether training began with the ImageNet weights, or with random ones.
        accuracy: Per cent of the test pictures.
        trained: The number of trained parameters.
        share: Their share of all parameters.
        seconds: The processor time of the training.
        predicted: The predicted classes of the test pictures.
    """

    name: str
    pretrained: bool
    accuracy: float
    trained: int
    share: float
    seconds: float
    predicted: list[str]

    @property
    def weights(self) -> str:
        """The weights that training began with."""
        return "ImageNet" if self.pretrained else "random"

    def cells(self) -> tuple[str, str, str, str]:
        """Accuracy, parameters, share and seconds as text."""
        time = f"{self.seconds:.0f}" if self.trained else ""
        return f"{self.accuracy:.1f} %", f"{self.trained:,}", f"{self.share:.1%}", time


COLUMNS = ("accuracy", "parameters", "share", "CPU seconds")


def print_table(ways: list[Way], pictures: int) -> None:
    """The results, a row for each way."""
    table = Table(title=f"Accuracy on {pictures:,} test pictures")
    table.add_column("weights")
    table.add_column("trained")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for way in ways:
        style = "bold" if way.name == "LoRA" and way.pretrained else None
        table.add_row(way.weights, way.name, *way.cells(), style=style)
    console.print(table)


def write_report(ways: list[Way], split: Split, path: Path) -> Path:
    """Write the page that compares the ways: a table, and the first test pictures."""
    style = resources.files("tfimm_lora.finetuning.report").joinpath("report.css")
    title = "EfficientNet-Lite0 on Fashion-MNIST"
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", title),
            tag("style", Html(style.read_text(encoding="utf-8") + STYLE)),
        ),
        tag(
            "body",
            tag("header", tag("h1", title), _subtitle(split)),
            tag(
                "main",
                tag("section", tag("h2", "Four ways to adapt the model"), _table(ways, split)),
                tag("section", tag("h2", "What the models see"), _pictures(ways, split)),
                tag("section", tag("h2", "Files"), _files()),
            ),
        ),
        lang="en",
    )
    path.write_text(f"<!DOCTYPE html>\n{page}\n", encoding="utf-8")
    return path


def _subtitle(split: Split) -> Html:
    return tag(
        "p",
        f"{len(split.labels)} classes, {len(split.train)} pictures for training, "
        f"{len(split.val)} for validation and {len(split.test):,} for testing",
    )


def _table(ways: list[Way], split: Split) -> Html:
    names = ("Weights", "Trained", "Accuracy", "", "Parameters", "Share", "CPU seconds")
    kinds = (None, None, "number", "bar", "number", "number", "number")
    head = tag("tr", *(tag("th", name, class_=kind) for name, kind in zip(names, kinds)))
    rows = []
    for way in ways:
        accuracy, trained, share, seconds = way.cells()
        length = tag("span", tag("i", style=f"width: {way.accuracy:.1f}%"))
        best = way.name == "LoRA" and way.pretrained
        rows.append(
            tag(
                "tr",
                tag("td", way.weights),
                tag("th", way.name),
                tag("td", accuracy, class_="number"),
                tag("td", length, class_="bar"),
                *(tag("td", text, class_="number") for text in (trained, share, seconds)),
                class_="best" if best else None if way.pretrained else "random",
            )
        )
    note = (
        f"Accuracy on the {len(split.test):,} test pictures, which no training saw. “Not at "
        "all” uses the classes of ImageNet that name the garments (there is none for a shirt). "
        "The classifier alone is trained on features that are computed once."
    )
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="ways")
    return tag("div", tag("p", note, class_="quiet"), tag("div", table, class_="long"))


def _pictures(ways: list[Way], split: Split) -> Html:
    """The first test pictures of each class (not chosen), with what some models predict."""
    shown = {
        "not at all": next(w for w in ways if w.name == "not at all"),
        "LoRA": next(w for w in ways if w.name == "LoRA" and w.pretrained),
    }
    items = []
    for number, label in enumerate(split.labels):
        of_class = [i for i, p in enumerate(split.test.pictures) if p.label == number]
        for i in of_class[:SHOWN]:
            lines = [
                tag(
                    "span",
                    f"{name}: {way.predicted[i]}",
                    class_="wrong" if way.predicted[i] != label else None,
                )
                for name, way in shown.items()
            ]
            picture = thumbnail(split.test.pictures[i].path)
            caption = tag("figcaption", tag("span", label, class_="true"), *lines)
            frame = tag("div", picture, class_="frame")
            items.append(tag("li", tag("figure", frame, caption)))
    note = (
        f"The first {SHOWN} test pictures of each class, not chosen, with the predictions "
        "before training (“not at all”) and after LoRA. Wrong ones are orange."
    )
    return tag("div", tag("p", note, class_="quiet"), tag("ul", *items, class_="mistakes"))


def _files() -> Html:
    files = {
        "run/report.html": "the report of the LoRA run: curves, confusions, worst mistakes",
        "run/adapter/": "the adapter, which PEFT reads too",
        "merged/": "the merged model as a SavedModel, for TensorFlow alone",
        "fashion-mnist/": "the pictures in class folders",
        "imagenet-weights/": "the ImageNet weights as a timm checkpoint",
    }
    rows = [
        tag("tr", tag("th", tag("a", name, href=name)), tag("td", text))
        for name, text in files.items()
    ]
    return tag("table", tag("tbody", *rows), class_="facts")
