"""Adapters exchanged with real PEFT around real timm, in both directions."""

import copy
import dataclasses
import functools

import numpy as np
import peft
import pytest
import tensorflow as tf
import tfimm
import torch

import tfimm_lora as lora
from tests.helpers.kerases import keras, randomise, run
from tests.helpers.selection import nightly_except
from tests.interop import timm_models
from tfimm_lora.model.merge import has_lora, lora_layers
from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS

#: tfimm's name, the size of the images, what PEFT adapts and what tfimm_lora adapts.
MODELS = {
    "vit_tiny_patch16_224": (64, ["qkv", "proj", "fc1", "fc2"], None),
    "convnext_tiny": (64, ["mlp.fc1", "mlp.fc2", "downsample.1"], ["fc1", "downsample/1"]),
    "resnet18": (64, r".*\.conv[12]|layer\d\.0\.downsample\.0", None),
    "swin_tiny_patch4_window7_224": (224, ["qkv", "fc1", "reduction"], ["qkv", "reduction"]),
    "mixer_b16_224": (64, ["mlp_tokens.fc1", "mlp_channels.fc2"], None),
    "efficientnet_b0": (96, ["conv_pw", "conv_pwl", "conv_head"], None),
    "pvt_v2_b0": (64, ["attn.q", "attn.kv", "attn.sr", "fc1"], None),
    "poolformer_s12": (64, ["fc1", "fc2"], None),
    "deit_tiny_distilled_patch16_224": (64, ["qkv"], None),
}
names = pytest.mark.parametrize(
    "name", nightly_except(MODELS, ["vit_tiny_patch16_224", "convnext_tiny", "resnet18"])
)


#: Architectures that are made for one size of images.
SIZED = ("vit", "deit", "mixer")


@functools.cache
def _timm(name):
    size = MODELS[name][0]
    sized = {"img_size": size} if name.startswith(SIZED) else {}
    return timm_models.make(CHECKPOINTS[name], size, **sized)


@pytest.fixture
def theirs():
    """Gives a copy of a timm model by its tfimm name."""
    return lambda name: copy.deepcopy(_timm(name))


@pytest.fixture
def ours(tmp_path_factory):
    """Gives the tfimm model with the weights of the timm model."""

    def make(name, **changes):
        folder = timm_models.save(_timm(name), tmp_path_factory.mktemp(name))
        sized = {"input_size": (MODELS[name][0],) * 2} if name.startswith(SIZED) else {}
        return lora.load_timm_weights(tfimm.create_model(name, **sized, **changes), folder)

    return make


def adapted(model, **config):
    """The timm model with a PEFT adapter whose factors are not zero."""
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "lora_" in name and parameter.ndim == 1:
                parameter.copy_(0.2 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2 / parameter.shape[1] ** 0.5)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrapped.eval()


def logits_of(wrapped, name, x):
    if name == "poolformer_s12":  # timm pools before the norm; see test_models.py
        body = wrapped.base_model.model
        with torch.no_grad():
            features = body.forward_features(timm_models.to_torch(x))
            norm = body.head.norm
            features = torch.nn.functional.group_norm(
                features, 1, norm.weight, norm.bias, norm.eps
            )
            return body.head.fc(features.mean((-2, -1))).numpy()
    if "distilled" in name:
        wrapped.base_model.model.set_distilled_training(True)
        with torch.no_grad():
            both = wrapped.train()(timm_models.to_torch(x))
        return torch.stack(both, dim=1).numpy()
    with torch.no_grad():
        return wrapped(timm_models.to_torch(x)).numpy()


@names
def test_adapters_of_peft_give_the_same_logits_here(name, theirs, ours, tmp_path):
    size, targets, _ = MODELS[name]
    x, model = timm_models.images(size), ours(name)
    plain = run(model, x)
    wrapped = adapted(theirs(name), r=3, lora_alpha=7, target_modules=targets)
    wrapped.save_pretrained(str(tmp_path))
    assert lora.load_adapter(model, tmp_path) is model
    timm_models.assert_agree(run(model, x), logits_of(wrapped, name, x))
    assert np.abs(run(model, x) - plain).max() > 1e-2 * np.abs(plain).max()
    with lora.disable_adapter(model):
        np.testing.assert_array_equal(run(model, x), plain)


@names
def test_adapters_from_here_give_the_same_logits_in_peft(name, theirs, ours, tmp_path):
    size, _, targets = MODELS[name]
    x, model = timm_models.images(size), ours(name)
    lora.inject_lora(model, lora_rank=3, lora_alpha=5, lora_targets=targets)
    randomise(model, size=0.1)
    lora.save_adapter(model, tmp_path, format="peft")
    wrapped = peft.PeftModel.from_pretrained(theirs(name), str(tmp_path)).eval()
    timm_models.assert_agree(run(model, x), logits_of(wrapped, name, x))
    count = sum("lora_A" in key for key in wrapped.state_dict())
    assert count == len(lora_layers(model))


VIT = "vit_tiny_patch16_224"
CONFIGS = {
    "rank_and_alpha_patterns": dict(
        r=4,
        lora_alpha=6,
        target_modules=["qkv", "fc1"],
        rank_pattern={"blocks.3.attn.qkv": 2, r"blocks.[56].mlp.fc1": 6},
        alpha_pattern={"qkv": 3, r".*\.7\.mlp\.fc1": 11},
    ),
    "rslora": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=r".*\.qkv"),
    "rslora_patterns": dict(
        r=4,
        lora_alpha=2,
        use_rslora=True,
        target_modules=["qkv"],
        rank_pattern={"blocks.0.attn.qkv": 9},
    ),
    "bias_all": dict(r=2, target_modules=["qkv", "proj"], bias="all"),
    "bias_lora_only": dict(r=2, target_modules=["fc1"], bias="lora_only"),
    "classifier": dict(r=2, target_modules=["fc1"], modules_to_save=["head"]),
    "modules": dict(r=2, target_modules=["fc1"], modules_to_save=["head", "blocks.11.norm2"]),
    "layers_to_transform": dict(
        r=2, target_modules=["fc1"], layers_to_transform=[2, 5], layers_pattern="blocks"
    ),
    "dora": dict(r=4, lora_alpha=6, use_dora=True, target_modules=["qkv", "fc1"]),
    "dora_rslora": dict(r=4, use_dora=True, use_rslora=True, target_modules=["fc2"]),
    "lora_bias": dict(r=4, lora_alpha=6, lora_bias=True, target_modules=["qkv", "fc1"]),
    "exclude": dict(r=2, target_modules=["fc1"], exclude_modules=r"blocks\.[0-5]\..*"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_can_configure_is_read(kind, theirs, ours, tmp_path):
    x, model = timm_models.images(64), ours(VIT)
    wrapped = adapted(theirs(VIT), **CONFIGS[kind])
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    lora.load_adapter(model, tmp_path / "theirs")
    timm_models.assert_agree(run(model, x), logits_of(wrapped, VIT, x))
    # And back: what was read is written so that PEFT computes the same.
    lora.save_adapter(model, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(theirs(VIT), str(tmp_path / "ours")).eval()
    timm_models.assert_agree(run(model, x), logits_of(again, VIT, x))


@pytest.mark.parametrize("name", nightly_except(["resnet18", "convnext_tiny"], ["resnet18"]))
def test_dora_of_convolutions_converts_both_ways(name, theirs, ours, tmp_path):
    size, targets, _ = MODELS[name]
    x, model = timm_models.images(size), ours(name)
    wrapped = adapted(theirs(name), r=3, lora_alpha=5, use_dora=True, target_modules=targets)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    lora.load_adapter(model, tmp_path / "theirs")
    timm_models.assert_agree(run(model, x), logits_of(wrapped, name, x))
    lora.save_adapter(model, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(theirs(name), str(tmp_path / "ours")).eval()
    timm_models.assert_agree(run(model, x), logits_of(again, name, x))
    merged = again.merge_and_unload()
    with torch.no_grad():
        lora.merge_lora_weights(model)
        timm_models.assert_agree(run(model, x), merged(timm_models.to_torch(x)).numpy())


class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.fc = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 4)

    def forward(self, ids):
        return self.fc(self.emb(ids))


def test_dora_of_an_embedding_converts_both_ways(tmp_path):
    torch.manual_seed(0)
    plain = Tokens()
    base = {key: value.detach().numpy() for key, value in plain.state_dict().items()}
    targets = dict(r=2, lora_alpha=3, target_modules=["emb", "fc"])
    wrapped = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(use_dora=True, **targets)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.eval().save_pretrained(str(tmp_path / "theirs"))
    ids = np.random.default_rng(0).integers(0, 11, (3, 5))
    expected = wrapped(torch.from_numpy(ids)).detach().numpy()
    entry = keras.Input((5,), dtype="int32")
    inside = keras.layers.Embedding(11, 6, name="emb")(entry)
    model = keras.Model(entry, keras.layers.Dense(4, name="fc")(inside))
    model.get_layer("emb").embeddings.assign(base["emb.weight"])
    model.get_layer("fc").kernel.assign(base["fc.weight"].T)
    model.get_layer("fc").bias.assign(base["fc.bias"])
    lora.load_adapter(model, tmp_path / "theirs")
    np.testing.assert_allclose(run(model, ids.astype("int32")), expected, atol=1e-5)
    lora.save_adapter(model, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(plain, str(tmp_path / "ours")).eval()
    given = again(torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_allclose(given, expected, atol=1e-5)


@pytest.mark.parametrize(
    "start", nightly_except(["pissa", "pissa_niter_4", "olora"], ["pissa"])
)
def test_starts_from_the_kernel_go_both_ways(start, theirs, ours, tmp_path):
    """Files relative to the base as it was, of twice the rank, exact."""
    x, model = timm_models.images(64), ours(VIT)
    plain = run(model, x)
    wrapped = peft.get_peft_model(
        theirs(VIT), peft.LoraConfig(r=3, target_modules=["qkv"], init_lora_weights=start)
    )
    wrapped.save_pretrained(str(tmp_path / "start"))
    with torch.no_grad():
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_" in parameter_name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.eval()
    expected = logits_of(wrapped, VIT, x)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(
        str(tmp_path / "theirs"),
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    lora.load_adapter(model, tmp_path / "theirs")
    timm_models.assert_agree(run(model, x), expected)

    mine = ours(VIT)
    lora.inject_lora(mine, lora_rank=3, lora_targets=["qkv"], lora_init=start)
    np.testing.assert_allclose(run(mine, x), plain, rtol=1e-3, atol=1e-3)
    for layer in lora_layers(mine).values():
        for seed, name in enumerate(lora.LORA_WEIGHT_NAMES):
            variable = getattr(layer, name)
            noise = np.random.default_rng(seed).normal(size=tuple(variable.shape))
            variable.assign_add(0.05 * noise.astype("float32"))
    lora.save_adapter(mine, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(theirs(VIT), str(tmp_path / "ours")).eval()
    assert again.peft_config["default"].r == 6
    timm_models.assert_agree(run(mine, x), logits_of(again, VIT, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read(dtype, theirs, ours, tmp_path):
    x, model = timm_models.images(64), ours(VIT)
    wrapped = adapted(theirs(VIT), r=4, target_modules=["qkv"])
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.to(dtype)
    wrapped.save_pretrained(str(tmp_path))
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.float()
    lora.load_adapter(model, tmp_path)
    timm_models.assert_agree(run(model, x), logits_of(wrapped, VIT, x))


def adapter_of(model):
    """The adapter of a model without the name of its base, here of a temporary file."""
    return dataclasses.replace(lora.adapter_of(model), base_model="")


@pytest.mark.parametrize("parts", ["qv", "v", "qkv"])
def test_parts_of_projections_are_exact_in_peft_at_a_wider_rank(parts, theirs, ours, tmp_path):
    x, model = timm_models.images(64), ours(VIT)
    lora.inject_lora(model, lora_rank=2, lora_alpha=3, lora_qkv=parts)
    randomise(model, size=0.1)
    lora.save_adapter(model, tmp_path, format="peft")
    wrapped = peft.PeftModel.from_pretrained(theirs(VIT), str(tmp_path)).eval()
    timm_models.assert_agree(run(model, x), logits_of(wrapped, VIT, x))
    wide = wrapped.state_dict()["base_model.model.blocks.0.attn.qkv.lora_A.default.weight"]
    assert wide.shape == (2 * len(parts), 192)
    again = lora.load_adapter(ours(VIT), tmp_path)
    assert adapter_of(again) == adapter_of(model)


def test_new_classifier_and_biases_convert_both_ways(theirs, ours, tmp_path):
    """A head for 13 classes, trained here, in a timm model for 13 classes."""
    x = timm_models.images(64)
    model = lora.convert_to_lora_model(
        ours(VIT), lora_rank=2, nb_classes=13, lora_train_bias="all"
    )
    rng = np.random.default_rng(0)
    for variable in model.trainable_weights:
        noise = rng.normal(size=tuple(variable.shape)).astype("float32")
        variable.assign_add(0.1 * noise)
    lora.save_adapter(model, tmp_path)
    other = theirs(VIT)
    other.reset_classifier(13)
    wrapped = peft.PeftModel.from_pretrained(other, str(tmp_path)).eval()
    timm_models.assert_agree(run(model, x), logits_of(wrapped, VIT, x))
    fresh = lora.create_model(VIT, adapter=tmp_path, input_size=(64, 64))
    assert fresh.cfg.nb_classes == 13 and type(fresh) is lora.LoRAViT
    assert adapter_of(fresh) == adapter_of(model)


@pytest.mark.parametrize(
    "config, words",
    [
        (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'.*changed base"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, words, theirs, ours, tmp_path):
    wrapped = peft.get_peft_model(
        theirs(VIT), peft.LoraConfig(r=2, target_modules=["qkv"], **config)
    )
    wrapped.save_pretrained(str(tmp_path))
    model = ours(VIT)
    with pytest.raises(ValueError, match=words):
        lora.load_adapter(model, tmp_path)
    assert not has_lora(model)


def test_peft_refuses_the_extension_by_name(theirs, tmp_path):
    model = lora.inject_lora(
        tfimm.create_model("resnext50_32x4d"), lora_rank=2, lora_targets=["conv2"]
    )
    with pytest.raises(ValueError, match="layer1.0.conv2: PEFT's A is not grouped"):
        lora.save_adapter(model, tmp_path / "strict", format="peft")
    assert not (tmp_path / "strict").exists()
    lora.save_adapter(model, tmp_path / "own")
    with pytest.raises((ValueError, KeyError), match="TFIMM_LORA"):
        peft.PeftModel.from_pretrained(theirs("resnet18"), str(tmp_path / "own"))


@pytest.mark.parametrize(
    "name, variant",
    [
        (VIT, {}),
        pytest.param("convnext_tiny", {}, marks=pytest.mark.nightly),
        (VIT, {"use_dora": True}),
        pytest.param(VIT, {"lora_bias": True}, marks=pytest.mark.nightly),
    ],
)
def test_training_is_that_of_peft(name, variant, theirs, ours, tmp_path):
    """Twenty steps of SGD from the same weights, adapter and data: the same A and B."""
    size, targets, _ = MODELS[name]
    wrapped = adapted(theirs(name), r=4, lora_alpha=8, target_modules=targets, **variant)
    wrapped.save_pretrained(str(tmp_path / "start"))
    model = lora.load_adapter(ours(name, drop_path_rate=0.0), tmp_path / "start")
    start = lora.adapter_of(model)
    batches = [timm_models.images(size, n=4, seed=seed) for seed in range(4)]
    labels = np.random.default_rng(0).integers(0, 1000, size=(4, 4))
    rate = 0.01

    torch_optimizer = torch.optim.SGD(
        [p for p in wrapped.parameters() if p.requires_grad], rate
    )
    optimizer = keras.optimizers.SGD(rate)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_weights)
        optimizer.apply_gradients(zip(gradients, model.trainable_weights))
        return loss

    for i in range(20):
        x, y = batches[i % 4], labels[i % 4]
        torch_optimizer.zero_grad()
        logits = wrapped(timm_models.to_torch(x))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))
        loss.backward()
        torch_optimizer.step()
        mine = float(step(tf.constant(x), tf.constant(y)))
        assert abs(mine - float(loss)) < 1e-3 * abs(float(loss)), (i, mine, float(loss))
    wrapped.save_pretrained(str(tmp_path / "end"))
    expected, given = lora.Adapter.load(tmp_path / "end"), lora.adapter_of(model)
    worst = 0.0
    for module, update in expected.layers.items():
        for part in update.arrays():
            before, theirs_now = getattr(start.layers[module], part), getattr(update, part)
            ours_now = getattr(given.layers[module], part)
            assert np.abs(theirs_now - before).max() > 0
            error = np.abs(ours_now - theirs_now).max() / np.abs(theirs_now).max()
            worst = max(worst, error)
    print(f"largest relative difference of a factor {worst:.1e}")
    assert worst < 1e-3
