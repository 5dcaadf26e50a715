"""All results of a folder as a table in Markdown, beside the published values."""

import statistics
from collections import defaultdict

from .tasks import CLASSES, GROUPS

#: Accuracy in percent, the mean over the 19 tasks: V-PETL Bench, ViT-B/16 on VTAB-1k.
PUBLISHED = {"full": 65.6, "linear": 52.9, "bitfit": 62.1, "lora": 72.3}
PUBLISHED_OTHERS = {"FacT": 73.2, "RepAdapter": 73.8, "GPS": 75.2}

#: Settings that may differ between the tasks and seeds of a column.
_OF_EACH = ("task", "seed", "lists")

MISSING, UNFINISHED = "missing", "unfinished"


def table(results):
    """The table of the results by file name ("NAME-TASK-SEED.json").

    A column is a method. Means are shown only of all 19 tasks with the same seeds.

    Raises:
        ValueError: If the results of a column have different settings.
    """
    columns = _columns(results)
    rows = [["Task", *columns], ["---", *("---:" for _ in columns)]]
    for group, tasks in GROUPS.items():
        rows.append([f"*{group}*", *("" for _ in columns)])
        rows += [
            [task, *(_cell(column, task) for column in columns.values())] for task in tasks
        ]
    rows.append(["**Mean over tasks**", *(_mean(x, _over_tasks) for x in columns.values())])
    rows.append(["**Mean over groups**", *(_mean(x, _over_groups) for x in columns.values())])
    rows.append(["V-PETL Bench, over tasks", *(str(PUBLISHED.get(x, "")) for x in columns)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    others = ", ".join(f"{name} {value}" for name, value in PUBLISHED_OTHERS.items())
    described = [_description(name, column) for name, column in columns.items()]
    return "\n".join([*lines, "", *described, "", f"V-PETL Bench also has: {others}."])


def _columns(results):
    """Name -> task -> seed -> result."""
    columns = defaultdict(lambda: defaultdict(dict))
    for file, result in results.items():
        settings = result["settings"]
        name = file.removesuffix(f"-{settings['task']}-{settings['seed']}.json")
        columns[name][settings["task"]][settings["seed"]] = result
    for name, column in columns.items():
        _check(name, column)
    return columns


def _check(name, column):
    seen = {}
    for result in _all(column):
        for key, value in result["settings"].items():
            if key not in _OF_EACH and seen.setdefault(key, value) != value:
                raise ValueError(
                    f"Received results of {name!r} with {key}={seen[key]} and {value}; "
                    "expected the same settings in a column. Put them into different folders."
                )


def _all(column):
    return [result for seeds in column.values() for result in seeds.values()]


def _description(name, column):
    """One line about the settings and the machines of a column."""
    settings = _all(column)[0]["settings"]
    machines = {
        f"{x['device']} (Keras {x['keras']}, {x['framework']})"
        for x in (result["environment"] for result in _all(column))
    }
    return (
        f"- {name}: {settings['model']}, weights {settings['weights'] or 'random'}, "
        f"{settings['size']} pixels, {settings['epochs']} epochs; {', '.join(sorted(machines))}"
    )


def _cell(column, task):
    """Accuracy in percent: of one seed, or mean and standard deviation."""
    seeds = column.get(task, {})
    if not seeds:
        return MISSING
    if any("test" not in result for result in seeds.values()):
        return UNFINISHED
    return _shown([100 * result["test"]["accuracy"] for result in seeds.values()])


def _shown(values):
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def _mean(column, over):
    """The mean over the tasks for each seed; "incomplete" unless all results are there."""
    seeds = {frozenset(column.get(task, {})) for task in CLASSES}
    if len(seeds) != 1 or not all("test" in result for result in _all(column)):
        return "incomplete"
    (seeds,) = seeds
    return _shown([over(column, seed) for seed in sorted(seeds)])


def _over_tasks(column, seed):
    return statistics.mean(_accuracy(column, task, seed) for task in CLASSES)


def _over_groups(column, seed):
    return statistics.mean(
        statistics.mean(_accuracy(column, task, seed) for task in tasks)
        for tasks in GROUPS.values()
    )


def _accuracy(column, task, seed):
    return 100 * column[task][seed]["test"]["accuracy"]
