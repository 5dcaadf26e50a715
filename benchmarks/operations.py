"""Conversion, merging, switching, saving, loading of adapters: time and extra memory.

    TF_USE_LEGACY_KERAS=1 python benchmarks/operations.py [--quick] [--rank 8] [--rounds 7]

Prints one JSON object: for each operation its seconds in each round and the extra memory
in MB, beside that of one copy of the adapted kernels, which is memory speed.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import memory

import tfimm_lora as lora

import tfimm  # isort: skip - after tfimm_lora, which chooses legacy Keras


def operations(name, rank, folder, **arguments):
    """The operations, each of which starts where the one before it ended."""
    net = tfimm.create_model(name, **arguments)
    lora.inject_lora(net, lora_rank=rank)
    adapter = lora.adapter_of(net)
    kernels = [x.kernel for x in net._flatten_layers() if isinstance(x, lora.LoRALayer)]
    lora.remove_lora(net)
    return {
        "copy of the kernels": lambda: [k.numpy().copy() for k in kernels],
        "new LoRA model": lambda: lora.convert_to_lora_model(net, lora_rank=rank),
        "inject": lambda: lora.inject_lora(net, lora_rank=rank),
        "switch": lambda: lora.load_adapter(net, adapter),
        "merge": lambda: lora.merge_lora_weights(net),
        "unmerge": lambda: lora.unmerge_lora_weights(net),
        "save": lambda: lora.save_adapter(net, folder),
        "load": lambda: lora.load_adapter(net, folder),
        "remove": lambda: lora.remove_lora(net),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    name, small = "vit_base_patch16_224", {}
    if args.quick:
        name, small = "vit_tiny_patch16_224", {"input_size": (32, 32), "nb_blocks": 1}
    with tempfile.TemporaryDirectory() as folder:
        table = operations(name, args.rank, str(Path(folder) / "adapter"), **small)
        # One round that is not counted: what is imported and traced at a first use.
        for function in table.values():
            function()
        seconds = {n: [] for n in table}
        for _ in range(args.rounds):
            for operation, function in table.items():
                start = time.perf_counter()
                function()
                seconds[operation].append(time.perf_counter() - start)
        used = {n: memory.extra(function)[0] for n, function in table.items()}
    results = {n: {"seconds": seconds[n], "memory": used[n]} for n in table}
    print(json.dumps({"model": name, "rank": args.rank, "operations": results}))


if __name__ == "__main__":
    main()
