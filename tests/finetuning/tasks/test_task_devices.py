"""Every task on several devices: the same result as on one."""

import json

import pytest

from tests.finetuning.test_distributed import DEVICES, assert_close, ended, start
from tests.helpers.kerases import BACKEND
from tests.helpers.mask_pictures import mask_recipe, write_masks
from tests.helpers.task_pictures import save_model, task_recipe, write_colours, write_numbers

pytestmark = pytest.mark.long

TASKS = ("multilabel", "regression", "segmentation")


def train(folder, task, strategy, **environ):
    """On 27 pictures, in batches of 8 and 10, whose last ones have 3 and 7."""
    # At this rate, the rounding of the sums over devices is not amplified in 12 steps.
    settings = {"lora": {"lora_rank": 2}, "learning_rate": 1e-3}
    if task == "segmentation":
        write_masks(folder / "data", n=45)
        # Some weights of its decoder have gradients near zero, whose rounding Adam enlarges to
        # steps of the size of the rate. With SGD the losses agree to 1e-7.
        settings["learning_rate"] = 3e-5
        recipe = mask_recipe(folder, **settings, validation=0.4, balanced=True)
    else:
        save_model(folder / "model.keras")
        for name, write in (("colours", write_colours), ("numbers", write_numbers)):
            write(folder / name, n=45)
        recipe = task_recipe(folder, task, **settings, balanced=task == "multilabel")
    given = json.dumps(recipe.to_dict())
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
