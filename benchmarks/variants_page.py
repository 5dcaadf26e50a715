"""Write docs/variants.json, the table of docs/explanation/variants.md, and its figure."""

import json

START, END = "<!-- table -->", "<!-- end of the table -->"


def write(results, folder):
    """Write all three; the text of the page around the table does not change."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "variants.json").write_text(json.dumps(results, indent=1) + "\n")
    page = folder / "explanation" / "variants.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text() if page.exists() else f"{START}\n{END}\n"
    before, rest = text.split(START)
    page.write_text(f"{before}{START}\n{table(results)}\n{END}{rest.split(END)[1]}")
    (folder / "images").mkdir(exist_ok=True)
    draw(results, folder / "images" / "variants.svg")


def table(results):
    """The methods in Markdown, in points of a hundred."""
    lines = [
        "| | accuracy | against LoRA, rank 8 | trained | share | rate | step |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, method in results["methods"].items():
        mean, error = method["difference"]["mean"], method["difference"]["error"]
        against = "" if name == results["reference"] else f"{signed(mean)} ± {100 * error:.1f}"
        cells = [
            name,
            f"{100 * method['mean']:.1f} ± {100 * method['std']:.1f}",
            f"**{against}**" if against and abs(mean) > 2 * error else against,
            f"{method['trained']:,}",
            f"{100 * method['share']:.1f} %",
            f"{method['rate']:.2g}",
            f"{method['step']['median']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    second = results["methods"][results["reference"]].get("second")
    if second:
        mean, error = second["difference"]["mean"], second["difference"]["error"]
        lines += [
            "",
            f"{results['reference']}, at its second best rate in validation, "
            f"{second['rate']:.2g}: {100 * second['mean']:.1f} ± {100 * second['std']:.1f}, "
            f"that is {signed(mean)} ± {100 * error:.1f} against the first.",
        ]
    return "\n".join(lines)


def signed(difference):
    return f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")


#: In the left panel, with the place of the name from the point; the others have rank 8,
#: on average.
BESIDE = {
    "every weight": (-6, 3),
    "classifier only": (6, 3),
    "BitFit": (-6, 3),
    "LoRA-FA": (5, -34),
}
INK, LORA, OTHER = "#222222", "#2f7d5b", "#3b6ea8"


def draw(results, path):
    """Accuracy against trained parameters; beside it the variants of rank 8."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = results["methods"]
    ranks = [name for name in methods if name.startswith("LoRA, rank")]
    variants = [n for n in methods if n not in (*ranks, *BESIDE)]
    settings = {"font.size": 10, "svg.hashsalt": "variants", "svg.fonttype": "path"}
    with plt.rc_context(settings):
        figure, (left, right) = plt.subplots(
            1, 2, sharey=True, figsize=(10, 4.6), width_ratios=(1.5, 1), layout="constrained"
        )
        figure.patch.set_facecolor("white")
        points(left, methods, ranks, [methods[n]["trained"] for n in ranks], LORA, "-o")
        for name in ranks:
            note(left, name.rpartition(" ")[2], methods[name], LORA, (5, 7))
        beside = [name for name in BESIDE if name in methods]
        points(left, methods, beside, [methods[n]["trained"] for n in beside], OTHER, "s")
        for name in beside:
            note(left, name, methods[name], OTHER, BESIDE[name])
        left.set_xscale("log")
        left.margins(x=0.06)
        left.set_xlabel("trained parameters (LoRA: the numbers are ranks)")
        left.set_ylabel("accuracy on test pictures (%)")
        names = [results["reference"], *variants]
        points(right, methods, names[:1], [0], LORA, "o")
        points(right, methods, variants, range(1, len(names)), OTHER, "s")
        right.axhline(100 * methods[names[0]]["mean"], color=LORA, linewidth=0.8, alpha=0.6)
        right.set_xticks(range(len(names)), names, rotation=40, ha="right")
        right.set_xlabel("at rank 8 (RankAllocator: in the end)")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)


def points(axes, methods, names, places, colour, style):
    axes.errorbar(
        list(places),
        [100 * methods[n]["mean"] for n in names],
        [100 * methods[n]["std"] for n in names],
        fmt=style,
        color=colour,
        markersize=5,
        linewidth=1.2,
        capsize=3,
    )


def note(axes, text, method, colour, place):
    axes.annotate(
        text,
        (method["trained"], 100 * method["mean"]),
        xytext=place,
        ha="left" if place[0] > 0 else "right",
        textcoords="offset points",
        color=colour,
        fontsize=9,
    )
