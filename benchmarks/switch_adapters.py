"""Switching among 100 adapters on a compiled ViT-Ti: time, traces, memory, file size.

Run it with ``make benchmark``. The time of a switch is told against that of one forward pass
of a batch of 8 in the same run.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import tfimm_lora as lora

ADAPTERS = 100
ROUNDS = 3


def adapters(model):
    """Adapters of one model that differ in all factors."""
    base = lora.adapter_of(model)
    rng = np.random.default_rng(0)
    for _ in range(ADAPTERS):
        layers = {
            module: lora.LayerUpdate(
                rng.normal(size=x.a.shape).astype("float32"),
                rng.normal(size=x.b.shape).astype("float32") * 0.01,
                x.scale,
                x.kind,
            )
            for module, x in base.layers.items()
        }
        yield lora.Adapter(layers)


def memory():
    """The memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main():
    """Measure and print."""
    model = lora.create_model("vit_tiny_patch16_224", lora_rank=4)
    x = np.random.default_rng(0).normal(size=(8, 224, 224, 3)).astype("float32")
    traces = []
    call = type(model).call

    def counted(self, *args, **kwargs):
        traces.append(1)
        return call(self, *args, **kwargs)

    type(model).call = counted
    model.predict(x, verbose=0)
    start_traces = len(traces)
    known = list(adapters(model))
    for adapter in known[:5]:
        lora.load_adapter(model, adapter)
        model.predict(x, verbose=0)
    switches, passes, outputs = [], [], set()
    for adapter in known:
        start = time.perf_counter()
        lora.load_adapter(model, adapter)
        middle = time.perf_counter()
        outputs.add(float(model.predict(x, verbose=0)[0, 0]))
        switches.append(middle - start)
        passes.append(time.perf_counter() - middle)
    # Of switching alone: each predict of Keras takes some memory of its own.
    before = memory()
    for _ in range(ROUNDS):
        for adapter in known:
            lora.load_adapter(model, adapter)
    switch, forward = statistics.median(switches), statistics.median(passes)
    print(
        f"{len(switches)} switches among {ADAPTERS} adapters of {len(known[0].layers)} layers"
    )
    print(
        f"median switch {1e3 * switch:.1f} ms, {switch / forward:.3f} of a predict of 8 images"
    )
    print(f"new traces: {len(traces) - start_traces}; different outputs: {len(outputs)}")
    count = ROUNDS * ADAPTERS
    print(f"memory: {before:.0f} MB, {memory():.0f} MB after {count} more switches")
    with tempfile.TemporaryDirectory() as folder:
        for targets in (["attn/qkv"], None):
            small = lora.create_model("vit_tiny_patch16_224", lora_rank=4, lora_targets=targets)
            lora.save_adapter(small, folder)
            size = os.path.getsize(Path(folder) / "adapter_model.safetensors")
            held = lora.Adapter.load(folder)
            print(
                f"file: {size - held.size} bytes more than the arrays' {held.size} "
                f"({2 * len(held.layers)} tensors)"
            )


if __name__ == "__main__":
    main()
