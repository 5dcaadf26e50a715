"""What people who come from the LoRA module inside tfimm must know."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, array, normal

pytestmark = pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")


def test_the_default_scale_of_tfimm_is_that_of_alpha_one():
    from tfimm.architectures.lora.layers import LoRADense

    theirs, x = LoRADense(5, lora_rank=4), normal(3, 6)
    theirs(x)
    theirs.kernel_lora_b.assign(normal(4, 5, seed=1))
    outputs = {}
    for alpha in (1, None):
        ours = lora.LoRADense(5, lora_rank=4, lora_alpha=alpha)
        ours(x)
        for name in ("kernel", "bias", "kernel_lora_a", "kernel_lora_b"):
            getattr(ours, name).assign(getattr(theirs, name))
        outputs[alpha] = array(ours(x))
    np.testing.assert_allclose(outputs[1], array(theirs(x)), rtol=1e-5, atol=1e-6)
    base = x @ array(theirs.kernel) + array(theirs.bias)
    np.testing.assert_allclose(
        outputs[None] - base, 4 * (outputs[1] - base), rtol=1e-4, atol=1e-5
    )
