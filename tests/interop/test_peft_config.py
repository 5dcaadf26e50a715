"""Configs exchanged with real PEFT: what it makes of them in timm, and of ours."""

import json

import peft
import pytest

from tests.golden.make_peft_configs import CASES, FILE, of_peft
from tests.peft.test_translation import REPRESENTABLE
from tfimm_lora.config import LoRAConfig

GOLDEN = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_golden_file_is_what_peft_does(name):
    assert json.loads(json.dumps(of_peft(*CASES[name]))) == GOLDEN[name]


@pytest.mark.parametrize("name", CASES)
def test_peft_makes_the_same_of_a_config_that_went_through_ours(name):
    base, fields = CASES[name]
    theirs = peft.LoraConfig(**fields)
    ours = LoRAConfig.from_peft(theirs)
    made = of_peft(base, ours.to_peft())
    for what in ("adapted", "whole"):
        assert made[what] == GOLDEN[name][what]
    assert LoRAConfig.from_peft(peft.LoraConfig(**ours.to_peft())) == _sorted(ours)


@pytest.mark.parametrize("arguments", REPRESENTABLE)
def test_peft_reads_our_files_and_writes_the_same(arguments, tmp_path):
    config = LoRAConfig(**arguments)
    theirs = peft.LoraConfig(**config.to_peft())
    assert LoRAConfig.from_peft(theirs) == _sorted(config)
    theirs.save_pretrained(str(tmp_path))
    written = LoRAConfig.from_peft(tmp_path)
    assert _sorted(written) == _sorted(config)


def _sorted(config):
    """PEFT keeps names in sets."""
    if isinstance(config.lora_targets, list):
        config.lora_targets = sorted(config.lora_targets)
    if isinstance(config.lora_exclude, tuple):
        config.lora_exclude = tuple(sorted(config.lora_exclude))
    return config


def test_the_default_config_has_no_field_that_is_not_known():
    assert LoRAConfig.from_peft(peft.LoraConfig()) == LoRAConfig(lora_rank=8, lora_alpha=8)


STARTS = ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva")


@pytest.mark.parametrize("start", [True, *STARTS, False])
def test_every_initialization_is_accepted_or_refused_by_name(start):
    theirs = peft.LoraConfig(init_lora_weights=start, target_modules=["fc1"])
    if start is False:
        with pytest.raises(ValueError, match=f"init_lora_weights={start!r}"):
            LoRAConfig.from_peft(theirs)
        return
    config = LoRAConfig.from_peft(theirs)
    assert config.lora_init == ("default" if start is True else start)
    assert config.to_peft()["init_lora_weights"] == start
