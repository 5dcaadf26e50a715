"""The same with PEFT on timm's models: LoRA of rank 8 with the pictures and rates of the study.

    python benchmarks/study/with_peft.py [--minutes 60]

Needs torch, timm and peft (``make test-interop`` installs them), and the results of the study
for the rate. Weights, pictures, their order, the schedule, the seeds and the distribution from
which the classifier's weights are drawn are those of the study.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan import Plan, Run
from results import RESULTS, ROOT, read_results, write_result
from safetensors.torch import load_file
from tasks import Data, data, order_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torchvision_schemas  # isort: skip - of benchmarks/

torchvision_schemas.define()
from peft import LoraConfig, get_peft_model  # noqa: E402 # isort: skip
from timm import create_model  # noqa: E402 # isort: skip

#: The names of timm, mean and standard deviation, and the dropout that tfimm's models have.
MODELS = {
    "efficientnet_lite0": (
        *("tf_efficientnet_lite0", 127 / 255, 128 / 255),
        {"drop_rate": 0.2, "drop_path_rate": 0.2},
    ),
    "mobilenet_v2_100": (
        *("mobilenetv2_100", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        {},
    ),
}
TARGETS = ["conv_pw", "conv_pwl", "conv_head"]


def open_model(name: str, classes: int, work: Path) -> Any:
    """A LoRA model with the pretrained weights and a new classifier."""
    timm_name, _, _, dropout = MODELS[name]
    model = create_model(timm_name, num_classes=classes, **dropout)
    tensors = load_file(work / "checkpoints" / name / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not k.startswith("classifier")}
    missing, unexpected = model.load_state_dict(kept, strict=False)
    counters = [k for k in missing if k.endswith("num_batches_tracked")]
    assert set(missing) - set(counters) == {"classifier.weight", "classifier.bias"}, missing
    assert not unexpected, unexpected
    # As Keras does. timm draws weights that are so large for ten classes that the first losses
    # are above 10, and LoRA with the study's rate ends with one class.
    torch.nn.init.xavier_uniform_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    config = LoraConfig(
        r=8, lora_alpha=8, target_modules=TARGETS, modules_to_save=["classifier"]
    )
    return get_peft_model(model, config)


def train(run: Run, parts: Data, work: Path) -> dict[str, Any]:
    job = run.job
    torch.manual_seed(run.seed)
    model = open_model(job.model, parts.classes, work)
    _, mean, std, _ = MODELS[job.model]
    mean, std = (torch.tensor(np.broadcast_to(v, 3).astype("float32")) for v in (mean, std))

    def preprocess(pictures: np.ndarray) -> torch.Tensor:
        scaled = (torch.from_numpy(pictures).float() / 255 - mean) / std
        return scaled.permute(0, 3, 1, 2).contiguous()

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    bias = [p for n, p in trained.items() if n.endswith("bias")]
    others = [p for n, p in trained.items() if not n.endswith("bias")]
    groups = [
        {"params": others, "weight_decay": job.weight_decay},
        {"params": bias, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.rate, eps=1e-7)
    (x, y), order = parts.train, order_of(len(parts.train[0]), job, run.seed)
    batches = order.reshape(-1, job.batch)
    warmup = round(job.warmup * len(batches))

    def share(step: int) -> float:
        done = (step - warmup) / (len(batches) - warmup)
        return min((step + 1) / (warmup + 1), 0.5 * (1 + np.cos(np.pi * done)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    losses = []
    for indices in batches:
        logits = model(preprocess(x[indices]))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y[indices]).long())
        optimizer.zero_grad()
        loss.backward()
        if job.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), job.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    result = {"rate": run.rate, "seed": run.seed, "loss": float(np.mean(losses))}
    for name, (pictures, labels) in (("val", parts.val), ("test", parts.test)):
        with torch.no_grad():
            chunks = [preprocess(pictures[i : i + 100]) for i in range(0, len(pictures), 100)]
            logits = torch.cat([model(chunk) for chunk in chunks])
        target = torch.from_numpy(labels).long()
        result[f"{name}_accuracy"] = float((logits.argmax(1) == target).float().mean())
        result[f"{name}_loss"] = float(torch.nn.functional.cross_entropy(logits, target))
    result["trained"] = sum(p.numel() for p in trained.values())
    result["parameters"] = sum(p.numel() for p in model.parameters())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="stop after so long")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=ROOT / ".experiment")
    args = parser.parse_args()
    torch.set_num_threads(1)
    deadline = time.time() + 60 * args.minutes
    for run in Plan().peft_runs(read_results(args.results)):
        if time.time() > deadline:
            break
        if run in read_results(args.results):
            continue
        parts = data(run.job.task, run.seed, run.job.size, args.work / "downloads")
        started = time.process_time()
        result = train(run, parts, args.work)
        result["seconds"] = round(time.process_time() - started, 2)
        write_result(args.results, run, result)
        print(
            run.job.model, run.job.task, run.seed, f"{result['test_accuracy']:.1%}", flush=True
        )


if __name__ == "__main__":
    main()
