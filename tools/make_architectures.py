"""Write docs/architectures.md: what is adapted in every tfimm model, and how large it is.

Run it as ``TF_USE_LEGACY_KERAS=1 python docs/make_architectures.py``. It creates each of the
285 models, which takes some forty minutes on one core. tests/test_architectures.py
holds the page against the code. The sizes go into the package too, for
``tfimm-lora models``, with those of keras.applications; tests/test_cli.py counts some again.
"""

import gc
import inspect
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

import tfimm_lora as lora

PAGE = Path(__file__).parent / "architectures.md"
SIZES = Path(lora.__file__).parent / "cli" / "sizes.json"

INTRODUCTION = """# Architectures

Every model of tfimm has a LoRA version. `lora_targets=None` adapts the default targets below:
the projections of attention and the MLPs of transformers, the 1x1 and 3x3 convolutions of
convolutional networks; not the stem and not the classifier. Presets by name are
`lora_targets="attention"` and `"mlp"` where the family has them, and `"all"`: every supported
layer but the classifier, depthwise and squeeze-and-excite convolutions too. Lists of names and
regular expressions reach anything else.

`lora_qkv="qv"` adapts only queries and values: in a fused projection (`qkv`, `kv`) each of
these parts with factors of its own, of separate ones (`q`, `k`, `v`) only these.
`lora_train_modules=["..."]` trains layers whole.

The numbers are those of `lora.create_model(name, lora_rank=4)`: parameters of the model without
LoRA, parameters that are trained (in thousands), and their share.

This page is made by `docs/make_architectures.py`.
"""


def numbers(name):
    """The parameters of a model without LoRA, and those that LoRA of rank 4 trains."""
    import tfimm

    model = tfimm.create_model(name)
    total = _size(model.weights)
    lora.inject_lora(model, lora_rank=4)
    return total, _size(model.trainable_weights)


def row(name, total, trained):
    """One line of a table."""
    share = 100 * trained / total
    return f"| `{name}` | {total / 1e6:.1f} M | {trained / 1e3:,.1f} k | {share:.2f} % |"


def application(keras, name):
    """The parameters of a model of keras.applications, and the size of its pictures."""
    model = getattr(keras.applications, name)(weights=None)
    return [model.count_params(), *model.input_shape[1:3]]


def applications(keras):
    """The names of the models of keras.applications."""
    return [name for name, made in vars(keras.applications).items() if inspect.isfunction(made)]


def families():
    """The names of the models by model class, in the order of the classes' names."""
    import tfimm

    found = defaultdict(list)
    for name in lora.list_models():
        found[tfimm.models.model_class(name)].append(name)
    return dict(sorted(found.items(), key=lambda item: item[0].__name__))


def heading(cls):
    """What a family is, and its targets by name."""
    made = lora.lora_architecture(cls)
    documentation = sys.modules[made.__module__].__doc__ or ""
    presets = made.cfg_class.presets()
    names = [name for name in ("default", *presets) if presets[name] is not None]
    lines = [f"* {name}: {_targets(presets[name])}" for name in dict.fromkeys(names)]
    return "\n".join([f"## {cls.__name__}", "", inspect.cleandoc(documentation), "", *lines])


def page(rows):
    """The whole page, from the rows of the tables by name."""
    parts = [INTRODUCTION]
    for cls, names in families().items():
        table = ["| name | parameters | trained | share |", "|---|---|---|---|"]
        parts.append(
            "\n".join([heading(cls), "", *table, *(rows[name] for name in names)]) + "\n"
        )
    return "\n".join(parts)


def _targets(targets):
    if isinstance(targets, str):
        return f"`{targets}` (regular expression)"
    return ", ".join(f"`{name}`" for name in targets)


def _size(variables):
    return sum(int(np.prod(v.shape)) for v in variables)


def main():
    """Create every model in turn and write the page and the sizes."""
    from tensorflow import keras

    def cleared(value):
        print(value, flush=True)
        keras.backend.clear_session()
        gc.collect()
        return value

    rows, sizes = {}, {}
    for name in lora.list_models():
        sizes[name], trained = numbers(name)
        rows[name] = cleared(row(name, sizes[name], trained))
    others = {n: cleared(application(keras, n)) for n in applications(keras)}
    PAGE.write_text(page(rows))
    SIZES.write_text(json.dumps({"tfimm": sizes, "applications": others}, indent=1) + "\n")


if __name__ == "__main__":
    main()
