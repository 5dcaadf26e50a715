"""What adapters record about their task."""

import dataclasses
import json

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import keras, randomise
from tfimm_lora.model.state import record_task, recorded_task
from tfimm_lora.model.task_record import TaskRecord

pytestmark = pytest.mark.once

ANGLES = TaskRecord(
    "regression", ("angle", "size"), mean=(1, 2.5), std=(0.1, 3), chosen={"level": 0.9}
)
TAGS = TaskRecord("multilabel", ("a|b", "<i>"), "sigmoid", chosen={"thresholds": (0.2, 0.7)})


def model():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    made = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, name="fc"), layers.Dense(2, name="head")]
    )
    lora.inject_lora(made, lora_rank=2, lora_train_classifier=True)
    randomise(made)
    return made


@pytest.mark.parametrize("record", [ANGLES, TAGS, None])
def test_a_record_goes_through_files_and_models(record, tmp_path):
    source = model()
    record_task(source, record)
    adapter = lora.adapter_of(source)
    adapter.save(tmp_path)
    read = lora.Adapter.load(tmp_path)
    assert read == adapter and read.task == record
    target = model()
    record_task(target, TAGS)
    lora.load_adapter(target, read)
    assert recorded_task(target) == record
    lora.remove_lora(target, merge=False)
    assert recorded_task(target) is None
    card = (tmp_path / "README.md").read_text()
    assert "<i>" not in card and ("Task:" in card) == (record is not None)
    assert "task" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_combinations_keep_the_task_that_all_have():
    one = dataclasses.replace(lora.adapter_of(model()), task=ANGLES)
    other = dataclasses.replace(one, task=dataclasses.replace(ANGLES, chosen={}))
    assert lora.combine_adapters([one, other]).task == other.task
    tags = dataclasses.replace(one, task=TAGS)
    with pytest.warns(UserWarning, match="different tasks or labels"):
        assert lora.combine_adapters([one, tags]).task is None
    chosen = lora.combine_adapters([one, tags], trained_whole=1).task
    assert chosen == dataclasses.replace(TAGS, chosen={})


def test_a_bank_refuses_what_is_no_classification():
    base = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="fc"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    adapter = lora.adapter_of(model())
    bank = lora.AdapterBank(base, {"plain": adapter})
    with pytest.raises(ValueError, match="'angles' was trained for the task 'regression'"):
        bank.load("angles", dataclasses.replace(adapter, task=ANGLES))


@pytest.mark.parametrize(
    "values",
    [
        {"name": "regression", "labels": ["a"], "mean": [1.0]},
        {"name": "regression", "labels": ["a"], "mean": [1.0], "std": [0.0]},
        {"name": "regression", "labels": ["a"], "mean": [1.0, 2.0], "std": [1.0, 1.0]},
        {"name": "multilabel", "labels": ["a"], "activation": "relu"},
        {"name": "multilabel", "labels": ["a"], "chosen": {"thresholds": [np.nan]}},
        {"name": 3, "labels": []},
        {"labels": ["a"]},
        {"name": "multilabel", "labels": 3},
        ["a"],
    ],
)
def test_damaged_records_are_refused(values):
    with pytest.raises(ValueError, match=r"record of (the|a) task|as the record"):
        TaskRecord.from_dict(values)


def test_records_are_plain_values():
    for record in (ANGLES, TAGS):
        text = json.dumps(record.to_dict())
        assert TaskRecord.from_dict(json.loads(text)) == record
