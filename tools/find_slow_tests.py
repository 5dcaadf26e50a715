"""Write tests/slow_on_legacy.txt, slow_on_keras3.txt or slow_on_jax.txt.

Measure without the old list, on an idle machine:

    rm tests/slow_on_legacy.txt
    TF_USE_LEGACY_KERAS=1 python -m pytest -n 2 --durations=0 \\
        -m "not long and not nightly and not once" > durations.txt
    python tools/find_slow_tests.py legacy durations.txt

For JAX, use KERAS_BACKEND=jax and -m "backends and not long and not nightly". `make test` and
`make test-jax` leave the slowest tests to `make test-nightly`, until the others take SECONDS
altogether. Tests in ALWAYS stay: each is the only one that follows a job from end to end.
"""

import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: How long the tests of one Keras or backend may take, in seconds of one process.
SECONDS = {"legacy": 520, "keras3": 670, "jax": 300}

ALWAYS = (
    "test_create.py::test_saved_lora_model_loads_and_trains_on[none-False-keras]",
    "test_create.py::test_trained_model_converts_to_the_same_regular_one[convnext-LoRAConvNeXt]",
    "test_create.py::test_convnext_tiny_has_the_parameters_of_the_paper",
    "test_adapters_tfimm.py::test_create_model_with_an_adapter",
    "test_families.py::test_adapts_trains_merges_saves_and_reloads[convnext]",
    "test_examples.py::test_example_in_documents[README.md",
    "test_examples.py::test_example_in_documents[docs/tutorials",
    "test_examples.py::test_examples_in_docstrings[tfimm_lora.create]",
    "test_origin.py::test_a_named_model_starts_with_its_pretrained_weights",
    "test_runs.py::test_the_command_line_does_it_all",
    "test_recipe.py::test_a_run_can_be_opened",
    "test_report.py::test_the_report_is_complete_escaped",
    "test_finetune.py::test_training_learns_and_changes",
    "test_finetune.py::test_a_resumed_training_is_the_same_to_the_last_bit[1]",
    "test_package.py::test_readme_line_just_works",
    "test_traps.py::test_merging_within_fit_evaluate_and_predict",
    "test_export.py::test_a_run_becomes_an_onnx_file",
    "test_keras3_models.py::test_weights_move_to_other_classes",
    "test_keras3_models.py::test_a_model_by_name_has_lora",
    "test_keras3_models.py::test_a_preset_folder_of_keras_hub",
    "test_keras_hub_models.py::test_model[ViTImageClassifier]",
    "test_adalora.py::test_the_budget_goes_where",
    "test_evaluate.py::test_evaluate_is_of_the_validation",
    "test_cli.py::test_plan_of_a_model_with_a_name",
    "test_cli.py::test_help_and_usage_errors",
    "test_models.py::test_model[functional-",
    "test_models.py::test_model[convnext-fit",
)


def slowest(times, seconds):
    """The slowest tests, without which the others take at most some seconds."""
    rest, found = sum(times.values()), []
    for test, time in times.most_common():
        if rest <= seconds:
            break
        if not any(name in test for name in ALWAYS):
            found.append(test)
            rest -= time
    return sorted(found)


def main(kind, file):
    """Write the list of one Keras from the output of pytest."""
    times = Counter()
    for line in Path(file).read_text().splitlines():
        if found := re.match(r"([\d.]+)s (?:call|setup|teardown) +(tests/.+)", line):
            times[found[2].rstrip()] += float(found[1])
    if not times:
        sys.exit(f"{file} has no times; run pytest with --durations=0")
    tests = slowest(times, SECONDS[kind])
    (ROOT / "tests" / f"slow_on_{kind}.txt").write_text("".join(f"{x}\n" for x in tests))
    print(f"{len(tests)} of {len(times)} tests are slow")


if __name__ == "__main__":
    main(*sys.argv[1:])
