"""Every task on several devices: the same result as on one."""

import json

import pytest

from tests.finetuning.test_distributed import DEVICES, assert_close, ended, start
from tests.finetuning.test_multihost import start_processes
from tests.helpers.kerases import BACKEND
from tests.helpers.mask_pictures import mask_recipe, write_masks
from tests.helpers.task_pictures import save_model, task_recipe, write_colours, write_numbers
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures

pytestmark = pytest.mark.long

TASKS = ("multilabel", "regression", "segmentation")


def recipe_of(folder, task):
    """A recipe for 27 training pictures."""
    # At this rate, the rounding of the sums over devices is not amplified in 12 steps.
    settings = {"lora": {"lora_rank": 2}, "learning_rate": 1e-3}
    if task == "segmentation":
        write_masks(folder / "data", n=45)
        # Some weights of its decoder have gradients near zero, whose rounding Adam enlarges to
        # steps of the size of the rate. With SGD the losses agree to 1e-7.
        settings["learning_rate"] = 3e-5
        return mask_recipe(folder, **settings, validation=0.4, balanced=True)
    save_model(folder / "model.keras")
    for name, write in (("colours", write_colours), ("numbers", write_numbers)):
        write(folder / name, n=45)
    return task_recipe(folder, task, **settings, balanced=task == "multilabel")


def train(folder, task, strategy, **environ):
    """In batches of 8 and 10, whose last ones have 3 and 7 pictures."""
    given = json.dumps(recipe_of(folder, task).to_dict())
    command = ("-c", DEVICES, given, strategy, folder)
    [(code, _, errors)] = ended(start(*command, **environ))
    assert code == 0, errors[-3000:]
    return [[folder / f"{name}-{batch}" for name in ("none", strategy)] for batch in (10, 8)]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
@pytest.mark.parametrize("task", TASKS)
def test_two_mirrored_devices_train_as_one_does(task, tmp_path):
    for runs in train(tmp_path, task, "mirrored"):
        assert_close(*runs, ("val_loss",))


@pytest.mark.backends
@pytest.mark.skipif(BACKEND != "jax", reason="of JAX")
@pytest.mark.parametrize("task", TASKS)
def test_data_parallel_devices_of_jax_train_as_one_does(task, tmp_path):
    flags = "--xla_force_host_platform_device_count=2"
    for runs in train(tmp_path, task, "data-parallel", XLA_FLAGS=flags):
        assert_close(*runs, ("val_loss",))


@pytest.mark.backends
@pytest.mark.skipif(BACKEND != "jax", reason="of JAX")
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_of_jax_train_as_one_does(task, tmp_path):
    settings = {**recipe_of(tmp_path, task).to_dict(), "batch_size": 10}
    finetune_pictures(Recipe.from_dict(settings), tmp_path / "one", verbose="none")
    settings["strategy"] = "multihost"
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    words = ("--config", tmp_path / "recipe.yaml", "--out", tmp_path / "two")
    command = ("-m", "tfimm_lora", "finetune", *words)
    for code, _, errors in ended(*start_processes(command, command)):
        assert code == 0, errors[-3000:]
    assert_close(tmp_path / "one", tmp_path / "two", ("val_loss",))
    assert (tmp_path / "two" / "report.html").is_file()
