"""Real timm models with random weights of which none is trivial, and their files."""

import numpy as np
import timm
import torch
from timm.layers import DropPath
from torch import nn


def make(architecture, size=224, channels=3, seed=0, **kwargs):
    """A timm model in inference mode with random weights and calibrated BatchNorm."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, pretrained=False, **kwargs)
    prepare(model, lambda: torch.randn(2, channels, size, size))
    return model


@torch.no_grad()
def prepare(model, batch):
    """Give every parameter values that matter, and BatchNorm statistics of its inputs."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        scales = name.endswith((".weight", ".gamma", ".alpha", "_gain")) or "gamma" in name
        if parameter.squeeze().ndim <= 1:
            parameter.copy_(0.2 * noise + (1.0 if scales or "scale" in name else 0.0))
        elif parameter.std() < 0.03:
            # Tokens, embeddings, tables and heads that start near zero.
            parameter.copy_(
                noise * (0.1 if parameter.ndim > 2 else parameter.shape[-1] ** -0.5)
            )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over the batches that follow
            module.reset_running_stats()
        elif isinstance(module, (DropPath, nn.Dropout)):
            module.p = module.drop_prob = 0.0
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        model.train()
        for _ in range(3):
            model(batch())
    model.eval()


def images(size, n=2, channels=3, seed=1):
    """Normal numbers as a batch of images, channels last."""
    shape = (n, size, size, channels)
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def to_torch(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


@torch.no_grad()
def run(model, x):
    """Logits of a timm model for channels-last images; of both heads where it has two."""
    if getattr(model, "head_dist", None) is None:
        return model(to_torch(x)).numpy()
    # timm gives the mean of the two outside of training, tfimm always both.
    model.set_distilled_training(True)
    both = model.train()(to_torch(x))
    model.eval()
    return torch.stack(both, dim=1).numpy()


def save(model, folder):
    """The files as timm writes them for the hub: model.safetensors and config.json."""
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


def assert_agree(ours, theirs, tolerance=1e-4):
    """Within a tolerance relative to the largest value; both must depend on the image.

    The two libraries sum in other orders, which gives about 1e-6.
    """
    assert ours.shape == theirs.shape
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-2 * np.abs(theirs).max()
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"relative error {error:.1e}")
    assert error <= tolerance, error
