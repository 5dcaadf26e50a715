"""Load test of ``tfimm-lora serve`` on this machine: every answer is compared.

    python benchmarks/serving/load.py
    python benchmarks/serving/load.py --adapters 100 --seconds 10 --ray 2

Writes a small model and synthetic adapters with different numbers of classes, computes what
each of them alone predicts, starts a server, and asks it from several clients for a while.
Meanwhile other adapters are uploaded, replaced and removed. An answer is a failure if it is not
that of its adapter alone, or an error that nobody caused. Prints the numbers of requests and
failures, and the times of answers.
"""

import argparse
import contextlib
import io
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import httpx2
import numpy as np
from PIL import Image

import tfimm_lora as lora
from tfimm_lora.backend import default_backend

SIDE, RANKS, CLASSES = 32, (2, 4, 8), (3, 5, 10)
#: The largest difference of a probability. Batches of other sizes round otherwise.
TOLERANCE = 1e-4
#: Adapters that come and go, each with two variants.
VISITORS = 8


def main():
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder), options.adapters, options.pictures)
        print(f"{options.adapters} adapters, {options.pictures} pictures", flush=True)
        with served(case, options) as url:
            result = Load(case, url).run(options.clients, options.seconds)
    print(json.dumps(result, indent=2))
    return 1 if result["failures"] else 0


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--capacity", type=int, default=64)
    parser.add_argument("--ray", type=int, default=0, help="replicas of Ray Serve; 0 without")
    return parser.parse_args()


# -- models, adapters, and what they predict -------------------------------------------------


def make_model():
    keras = default_backend().keras
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((SIDE, SIDE, 3)),
            layers.Conv2D(16, 3, strides=2, activation="relu", name="conv1"),
            layers.Conv2D(32, 3, strides=2, activation="relu", name="conv2"),
            layers.GlobalAveragePooling2D(name="pool"),
            layers.Dense(32, activation="relu", name="fc"),
            layers.Dense(4, name="head"),
        ]
    )


def make_adapters(model, count):
    """Yield random adapters of the shapes of one that is injected."""
    lora.inject_lora(model, lora_rank=2, lora_targets="all", lora_train_classifier=True)
    template = lora.adapter_of(model)
    lora.remove_lora(model)
    for seed in range(count):
        rng = np.random.default_rng(seed)
        rank, classes = RANKS[seed % len(RANKS)], CLASSES[seed % len(CLASSES)]
        layers = {
            path: lora.LayerUpdate(
                random(rng, (rank, *update.a.shape[1:]), 0.3),
                random(rng, (update.b.shape[0], rank, *update.b.shape[2:]), 0.3),
                scale=0.5,
                kind=update.kind,
            )
            for path, update in template.layers.items()
        }
        weights = {
            key: random(rng, (classes, *value.shape[1:]), 0.5)
            for key, value in template.weights.items()
        }
        yield lora.Adapter(layers, weights, template.modules)


def random(rng, shape, size):
    return rng.normal(scale=size, size=shape).astype("float32")


class Case:
    """Files of a model, adapters and pictures, and the probabilities of each adapter alone."""

    def __init__(self, folder, adapters, pictures):
        self.folder, self.token = folder, secrets.token_urlsafe(24)
        (folder / "adapters").mkdir()
        (folder / "visitors").mkdir()
        (folder / "token").write_text(self.token)
        model = make_model()
        model.save(folder / "model.keras")
        pixels = np.random.default_rng(0).integers(0, 256, (pictures, SIDE, SIDE, 3), np.uint8)
        self.pictures = [png(x) for x in pixels]
        inputs = pixels.astype("float32") / 255
        self.expected = {None: softmax(outputs(model, inputs))}
        alone = {}  # one model for each number of classes, as load_adapter needs
        made = make_adapters(make_model(), adapters + 2 * VISITORS)
        for number, adapter in enumerate(made):
            place, name = "adapters", f"adapter-{number}"
            if number >= adapters:
                place, name = "visitors", f"visitor-{number - adapters}"
            adapter.save(folder / place / name)
            classes = len(next(iter(adapter.weights.values())))
            loaded = alone.setdefault(classes, with_classes(classes))
            lora.load_adapter(loaded, adapter)
            self.expected[name] = softmax(outputs(loaded, inputs))
        self.names = [None, *(f"adapter-{i}" for i in range(adapters))]

    def form(self, number, variant):
        """The upload of a visitor."""
        folder = self.folder / "visitors" / f"visitor-{2 * number + variant}"
        return {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }


def with_classes(classes):
    """The model of the file with another classifier, whose values the adapters have."""
    keras = default_backend().keras
    model = make_model()
    head = keras.layers.Dense(classes, name="head")
    return keras.Sequential([keras.layers.Input((SIDE, SIDE, 3)), *model.layers[:-1], head])


def outputs(model, inputs):
    return default_backend().to_numpy(model(inputs, training=False)).astype("float64")


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


# -- servers ---------------------------------------------------------------------------------


@contextlib.contextmanager
def served(case, options):
    """Start a server and wait until it is ready; its address."""
    if options.ray:
        yield from with_ray(case, options)
        return
    command = [sys.executable, "-m", "tfimm_lora", "serve", "model.keras", "--normalisation"]
    command += ["unit", "--adapters", "adapters", "--token-file", "token", "--port", "0"]
    command += ["--capacity", str(options.capacity), "--max-classes", str(max(CLASSES))]
    started = time.monotonic()
    server = subprocess.Popen(command, cwd=case.folder, stderr=subprocess.PIPE, text=True)
    try:
        url = address_of(server)
        threading.Thread(
            target=lambda: sys.stderr.writelines(server.stderr), daemon=True
        ).start()
        wait_until_ready(url)
        print(f"ready after {time.monotonic() - started:.1f} s", flush=True)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def address_of(server):
    """The address that a server prints when it has loaded all adapters."""
    for line in server.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if line.startswith("serving on"):
            return line.split()[2].strip(",")
    raise RuntimeError("the server ended")


def with_ray(case, options):
    import ray
    from ray import serve

    from tfimm_lora.serving.ray_serve import ray_application
    from tfimm_lora.serving.settings import ServingSettings

    settings = ServingSettings(
        str(case.folder / "model.keras"),
        str(case.folder / "adapters"),
        normalisation="unit",
        capacity=options.capacity,
        max_classes=max(CLASSES),
        token=case.token,
    )
    ray.init(num_cpus=options.ray + 2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": 8265})
        serve.run(ray_application(settings, num_replicas=options.ray))
        yield "http://127.0.0.1:8265"
    finally:
        serve.shutdown()
        ray.shutdown()


def wait_until_ready(url):
    for _ in range(1200):
        if httpx2.get(f"{url}/health").status_code == 200:
            return
        time.sleep(0.1)
    raise RuntimeError(httpx2.get(f"{url}/health").text)


# -- clients ---------------------------------------------------------------------------------


class Load:
    """Requests of several clients, and what became of them."""

    def __init__(self, case, url):
        self.case, self.url = case, url
        self.end = 0.0
        self.seconds, self.failures, self.statuses = [], Counter(), Counter()
        self.changes = Counter()
        self.lock = threading.Lock()

    def run(self, clients, seconds):
        self.end = time.monotonic() + seconds
        threads = [threading.Thread(target=self.ask, args=(i,)) for i in range(clients)]
        threads.append(threading.Thread(target=self.change))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        times = 1000 * np.array(self.seconds)
        return {
            "requests": len(times),
            "failures": sum(self.failures.values()),
            "reasons": dict(self.failures),
            "statuses": dict(self.statuses),
            "changes": dict(self.changes),
            "per_second": round(len(times) / seconds, 1),
            "p50_ms": round(float(np.percentile(times, 50)), 1),
            "p99_ms": round(float(np.percentile(times, 99)), 1),
        }

    def ask(self, client):
        """Ask for pictures with random adapters, until the time is over."""
        rng = np.random.default_rng(client)
        with httpx2.Client(base_url=self.url, timeout=60) as http:
            while time.monotonic() < self.end:
                visitor = int(rng.integers(VISITORS)) if rng.random() < 0.1 else None
                name = self.case.names[rng.integers(len(self.case.names))]
                if visitor is not None:
                    name = f"visitor-{visitor}"
                picture = int(rng.integers(len(self.case.pictures)))
                data = {"top": 100} if name is None else {"adapter": name, "top": 100}
                started = time.perf_counter()
                try:
                    answer = http.post(
                        "/predict", data=data, files={"file": self.case.pictures[picture]}
                    )
                except httpx2.HTTPError as error:
                    self.count(time.perf_counter() - started, 0, repr(error))
                    continue
                took = time.perf_counter() - started
                self.count(
                    took, answer.status_code, self.problem(answer, visitor, name, picture)
                )

    def problem(self, answer, visitor, name, picture):
        """What is wrong with an answer, or None."""
        if visitor is not None and answer.status_code == 404:
            return None  # it is not there at the moment
        if answer.status_code != 200:
            return answer.text[:200]
        body = answer.json()
        if body["adapter"] != name:
            return "the answer of another adapter"
        ranked = sorted(body["top"], key=lambda x: x["index"])
        p = np.array([x["probability"] for x in ranked])
        own = [name] if visitor is None else [f"visitor-{2 * visitor + i}" for i in range(2)]
        for known in own:
            wanted = self.case.expected[known][picture]
            if p.shape == wanted.shape and np.abs(p - wanted).max() < TOLERANCE:
                return None
        return f"other probabilities than those of {name} alone"

    def count(self, seconds, status, problem):
        with self.lock:
            self.seconds.append(seconds)
            self.statuses[status] += 1
            if problem:
                self.failures[problem] += 1

    def change(self):
        """Upload, replace and remove visitors, until the time is over."""
        rng = np.random.default_rng(0)
        present = set()
        headers = {"Authorization": f"Bearer {self.case.token}"}
        with httpx2.Client(base_url=self.url, timeout=60, headers=headers) as http:
            while time.monotonic() < self.end:
                number = int(rng.integers(VISITORS))
                path = f"/adapters/visitor-{number}"
                if number in present and rng.random() < 0.4:
                    answer, wanted = http.delete(path), 200
                    present.discard(number)
                else:
                    form = self.case.form(number, int(rng.integers(2)))
                    answer = http.put(path, files=form)
                    wanted = 200 if number in present else 201
                    present.add(number)
                with self.lock:
                    if answer.status_code == wanted:
                        self.changes[answer.json()["done"]] += 1
                    else:
                        self.failures[f"change: {answer.status_code} {answer.text[:200]}"] += 1
                time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
