"""The results of ``performance`` as tables in Markdown and as a picture."""

import statistics

#: Ratios that are aimed at: what, for which models, one contender's time over another's, and
#: at most what.
FIGURES = [
    ("step / floor", m, ("ours", "step"), ("floor", "step"), most)
    for m, most in [
        *[(m, 1.05) for m in ("vit_tiny", "vit_base", "convnext_tiny", "swin_tiny")],
        *[(m, 1.10) for m in ("resnet50", "efficientnet_b0")],
    ]
]
FIGURES += [
    (what, m, ("ours", action), ("floor", "forward"), most)
    for what, action, most in [
        ("forward / plain", "forward", 1.03),
        ("merged forward / plain", "merged", 1.00),
    ]
    for m in ("vit_tiny", "vit_base", "convnext_tiny", "swin_tiny", "resnet50")
    + ("efficientnet_b0",)
]
FIGURES += [
    ("step / PEFT", "vit_tiny", ("ours", "step"), ("peft", "step"), 0.75),
    ("step / PEFT", "convnext_tiny", ("ours", "step"), ("peft", "step"), 0.60),
]
FIGURES += [
    ("step / enable_lora", m, ("ours on Keras 3", "step"), ("enable_lora", "step"), 0.75)
    for m in ("vit_tiny", "vit_base", "convnext_tiny", "resnet50", "efficientnet_b0")
]
FIGURES += [
    (
        "step / enable_lora, XLA",
        m,
        ("ours on Keras 3, XLA", "step"),
        ("enable_lora, XLA", "step"),
        0.75,
    )
    for m in ("vit_tiny", "vit_base", "resnet50")
]


def spread(values):
    """Median and quartiles."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def ratio(entries, one, other):
    """The spread of a contender's time over another's of the same round, or None."""
    lists = []
    for contender, action in (one, other):
        times = entries.get(contender, {}).get("seconds", {}).get(action)
        if not times:
            return None
        lists.append(times)
    return spread([a / b for a, b in zip(*lists)])


def written(values, digits=2):
    """ "1.03 (1.01 to 1.06)", or a dash."""
    if values is None:
        return "-"
    median, low, high = (f"{v:.{digits}f}" for v in values)
    return f"{median} ({low} to {high})"


def table(head, rows):
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_model(model, result):
    """The table of one model."""
    entries = result["contenders"]
    rows = []
    for name, entry in entries.items():
        if "seconds" not in entry:
            reason = entry.get("absent") or f"fails: {entry['failed']}"
            rows.append([name, reason, *[""] * 5])
            continue
        step, forward = (spread(entry["seconds"][a])[0] for a in ("step", "forward"))
        used = entry["memory"]
        rows.append(
            [
                name,
                written(ratio(entries, (name, "step"), ("floor", "step"))),
                f"{step:.3g}",
                written(ratio(entries, (name, "forward"), ("floor", "forward"))),
                f"{forward:.3g}",
                f"{used['peak']:.0f}",
                f"{entry['trained'] / 1e6:.2f}",
            ]
        )
        if name == "ours":
            merged = written(ratio(entries, (name, "merged"), ("floor", "forward")))
            time = f"{spread(entry['seconds']['merged'])[0]:.3g}"
            rows.append(["ours, merged", "", "", merged, time, "", ""])
    head = ["", "step / floor", "s", "forward / plain", "s", "peak MB", "trained M"]
    rounds = max(
        (len(e["seconds"]["step"]) for e in entries.values() if "seconds" in e), default=0
    )
    return f"{model}, batch {result['batch']}, {rounds} rounds\n\n{table(head, rows)}"


def of_growth(name, entries):
    """The table of what grows with something, over its first row."""
    there = {label: e for label, e in entries.items() if "seconds" in e}
    first = next(iter(there), None)
    rows = []
    for label, entry in there.items():
        rows.append(
            [
                label,
                written(ratio(there, (label, "step"), (first, "step"))),
                f"{spread(entry['seconds']['step'])[0]:.3g}",
                f"{spread(entry['seconds']['forward'])[0]:.3g}",
                f"{entry['memory']['peak']:.0f}",
                f"{entry['trained'] / 1e6:.2f}",
            ]
        )
    rows += [
        [x, f"fails: {e['failed']}", *[""] * 5] for x, e in entries.items() if x not in there
    ]
    what = name.split(" ")[0]
    head = [what, "step / first", "step s", "forward s", "peak MB", "trained M"]
    return f"Growth with {name}\n\n{table(head, rows)}"


def of_operations(result):
    """The table of operations on adapters."""
    rows = []
    for name, entry in result["operations"].items():
        times = spread([1e3 * s for s in entry["seconds"]])
        rows.append([name, written(times, 1), f"{entry['memory']:.0f}"])
    head = ["", "ms", "extra MB"]
    return f"{result['model']}, rank {result['rank']}\n\n{table(head, rows)}"


def of_figures(results):
    """What is aimed at beside what is reached."""
    rows = []

    def row(what, model, found, most):
        median, low, high = found
        reached = "yes" if median <= most else "within the spread" if low <= most else "no"
        measured = written(found) if low < high else f"{median:.2f}"
        rows.append([what, model, f"{most:.2f}", measured, reached])

    for what, model, one, other, most in FIGURES:
        entries = results["models"].get(model, {}).get("contenders", {})
        found = ratio(entries, one, other)
        if found:
            row(what, model, found, most)
    for model, result in results["models"].items():
        peaks = {
            name: entry["memory"]["peak"]
            for name, entry in result["contenders"].items()
            if "memory" in entry
        }
        if "ours" not in peaks:
            continue
        if "peft" in peaks:
            row("peak memory / PEFT", model, [peaks["ours"] / peaks["peft"]] * 3, 1)
        if "floor" in peaks:
            # A, B, their gradients, and two numbers of Adam's for each of theirs.
            factors = 4 * 4 * result["contenders"]["ours"]["trained"] / 1e6
            value = peaks["ours"] / (peaks["floor"] + factors)
            row("peak memory / (floor + factors)", model, [value] * 3, 1.05)
    for name, entries in results["growth"].items():
        found = ratio(entries, ("64", "step"), ("4", "step")) if "rank" in name[:4] else None
        if found:
            row("step, rank 64 / rank 4", name.split("(")[1].split(",")[0], found, 1.15)
    return table(["", "model", "at most", "measured", "reached"], rows)


def whole(results):
    """All tables of a run."""
    parts = [of_model(m, r) for m, r in results["models"].items()]
    parts += [of_growth(n, e) for n, e in results["growth"].items()]
    if "operations" in results:
        parts.append(of_operations(results["operations"]))
    return "\n\n".join([*parts, of_figures(results)])


def rounded(value):
    """Results with four digits for each number, for a file that people read."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def draw(results, path):
    """One panel a model: the time of a step over the floor's, with quartiles."""
    from tfimm_lora.finetuning.report.figures import canvas

    models = {
        model: {
            name: ratio(result["contenders"], (name, "step"), ("floor", "step"))
            for name in result["contenders"]
        }
        for model, result in results["models"].items()
    }
    columns = min(3, len(models))
    lines = -(-len(models) // columns)
    with canvas(path, 3.4 * columns, 2.1 * lines + 0.3, False) as (figure, theme):
        for place, (model, ratios) in enumerate(models.items(), start=1):
            axes = figure.add_subplot(lines, columns, place)
            shown = {n: r for n, r in ratios.items() if r and n != "floor"}
            for y, (name, (median, low, high)) in enumerate(shown.items()):
                color = theme.blue if name.startswith("ours") else theme.orange
                axes.barh(y, median, color=color, height=0.65)
                axes.plot([low, high], [y, y], color=theme.ink, linewidth=1)
                axes.text(high, y, f" {median:.2f}", va="center", color=theme.ink, fontsize=8)
            axes.axvline(1, color=theme.muted, linewidth=1, linestyle="--")
            axes.set_yticks(range(len(shown)), shown)
            axes.set_ylim(max(5, len(shown)) - 0.5, -0.5)
            axes.set_xlim(0, 1.2 * max([r[2] for r in shown.values()], default=1))
            axes.set_title(f"{model}, batch {results['models'][model]['batch']}")
        figure.supxlabel("time of a training step over the floor's", color=theme.muted)
