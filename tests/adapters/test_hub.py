"""Downloading checkpoints from a server on loopback that speaks the hub's protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import golden
from tests.helpers.hub_server import COMMIT, TOKEN, Fault, HubServer
from tests.helpers.kerases import LEGACY

if not LEGACY:
    pytest.skip("once is enough", allow_module_level=True)

WHOLE = (Path(golden.__file__).parent / "timm_convnext.safetensors").read_bytes()
CONFIG = json.dumps({"architecture": "convnext_tiny", "pretrained_cfg": {"crop_pct": 0.95}})

#: Loads every source into one model and prints what came of it. huggingface_hub reads its
#: environment when it is imported, hence a process of its own.
PROGRAM = """
import json, sys
import numpy as np
import tfimm_lora as lora
from tests.zoo.test_weights import make, assert_logits, state, assert_same

outcomes = {}
for source, options in json.loads(sys.argv[1]):
    model = make("convnext")
    before = state(model)
    try:
        lora.load_timm_weights(model, source, **options)
    except Exception as error:
        assert_same(model, before)
        outcomes[source] = [type(error).__name__, str(error)]
    else:
        assert_logits(model, "convnext")
        outcomes[source] = ["loaded", model.cfg.crop_pct]
print("OUTCOMES" + json.dumps(outcomes))
"""


def load(sources, home, endpoint, **environ):
    """What came of loading each source, and what the process showed on its way."""
    sources = [s if isinstance(s, tuple) else (s, {}) for s in sources]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(sys.path),
        **environ,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(sources)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("OUTCOMES"))
    return json.loads(line.removeprefix("OUTCOMES")), done.stderr


def repository(**files):
    return {"model.safetensors": WHOLE, "config.json": CONFIG.encode(), **files}


def sharded():
    from safetensors.numpy import load, save

    tensors = load(WHOLE)
    keys = sorted(tensors)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    files = {name: save({k: tensors[k] for k in part}) for name, part in shards.items()}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """One process that loads from healthy and faulty repositories, then one offline."""
    home = tmp_path_factory.mktemp("hub")
    repositories = {
        name: repository()
        for name in (
            "timm/good",
            "timm/cut",
            "timm/cut_once",
            "timm/wrong",
            "timm/wrong_config",
        )
    }
    repositories["timm/no_weights"] = {"pytorch_model.bin": b"", "config.json": b"{}"}
    repositories["timm/sharded"] = sharded()
    repositories["timm/broken"] = repository(**{"model.safetensors": WHOLE[:1000]})
    with HubServer(repositories) as server:
        server.faults["timm/cut", "model.safetensors"] = Fault.CUT
        server.faults["timm/cut_once", "model.safetensors"] = Fault.CUT_ONCE
        server.faults["timm/wrong", "model.safetensors"] = Fault.WRONG_CONTENT
        server.faults["timm/wrong_config", "config.json"] = Fault.WRONG_CONTENT
        sources = [*repositories, "timm/nothing", ("hf-hub:timm/good", {"revision": COMMIT})]
        sources.append("timm/./good")
        outcomes, shown = load(sources, home, server.endpoint)
        first = list(server.requests)
        # The server has recovered.
        server.faults.clear()
        again, _ = load(
            ["timm/wrong", "timm/cut", ("timm/good", {"revision": "no"})], home, server.endpoint
        )
        endpoint = server.endpoint
    offline, _ = load(
        ["timm/good", "timm/sharded", "timm/nothing"], home, endpoint, HF_HUB_OFFLINE="1"
    )
    unreachable, _ = load(["timm/good", "timm/new"], home, endpoint)
    return dict(
        home=home,
        outcomes=outcomes,
        shown=shown,
        first=first,
        again=again,
        offline=offline,
        unreachable=unreachable,
    )


@pytest.mark.long
def test_a_checkpoint_is_downloaded_and_its_config_used(hub):
    assert hub["outcomes"]["timm/good"] == ["loaded", 0.95]
    assert hub["outcomes"]["hf-hub:timm/good"] == ["loaded", 0.95]
    assert hub["outcomes"]["timm/sharded"] == ["loaded", 0.875]
    assert "model.safetensors" in hub["shown"], "no progress was shown"


@pytest.mark.long
def test_what_is_cached_is_not_downloaded_again(hub):
    served = [r for r in hub["first"] if r[0] == "GET" and "/timm/good/" in r[1]]
    assert len([r for r in served if r[1].endswith("model.safetensors")]) == 1


@pytest.mark.long
def test_a_connection_that_is_cut_once_is_made_again(hub):
    assert hub["outcomes"]["timm/cut_once"] == ["loaded", 0.95]
    served = [r for r in hub["first"] if r[0] == "GET" and "/timm/cut_once/" in r[1]]
    assert len([r for r in served if r[1].endswith("model.safetensors")]) == 2


@pytest.mark.long
def test_a_connection_that_stays_cut_says_so_and_leaves_no_file(hub):
    kind, message = hub["outcomes"]["timm/cut"]
    assert kind == "ConnectionError"
    assert "'timm/cut': model.safetensors could not be downloaded completely" in message
    assert "try again" in message
    assert hub["again"]["timm/cut"] == ["loaded", 0.95]


@pytest.mark.long
def test_wrong_content_is_refused_and_removed(hub):
    kind, message = hub["outcomes"]["timm/wrong"]
    assert kind == "ValueError"
    assert "model.safetensors is not the file that the hub announced" in message
    assert "removed from the cache" in message
    kind, message = hub["outcomes"]["timm/wrong_config"]
    assert (
        kind == "ValueError" and "config.json is not the file that the hub announced" in message
    )
    assert hub["again"]["timm/wrong"] == ["loaded", 0.95]


@pytest.mark.long
def test_no_damaged_file_is_left_in_the_cache(hub):
    for blob in (hub["home"] / "hub").rglob("blobs/*"):
        assert not blob.name.endswith(".incomplete"), blob
        content = blob.read_bytes()
        assert not content.endswith(b"\0!"), blob


@pytest.mark.long
def test_missing_files_are_explained(hub):
    kind, message = hub["outcomes"]["timm/nothing"]
    assert kind == "FileNotFoundError"
    assert "'timm/nothing' does not exist" in message and "HF_TOKEN" in message
    kind, message = hub["outcomes"]["timm/no_weights"]
    assert kind == "FileNotFoundError"
    assert "neither model.safetensors nor model.safetensors.index.json" in message
    kind, message = hub["again"]["timm/good"]
    assert kind == "FileNotFoundError" and "at revision 'no' has no such revision" in message
    kind, message = hub["outcomes"]["timm/./good"]
    assert kind == "FileNotFoundError" and "expected a safetensors or torch file" in message


@pytest.mark.long
def test_a_file_that_was_uploaded_damaged_is_refused(hub):
    kind, message = hub["outcomes"]["timm/broken"]
    assert kind == "ValueError" and "not a complete safetensors file" in message


@pytest.mark.long
def test_offline_uses_the_cache_and_says_what_is_not_in_it(hub):
    assert hub["offline"]["timm/good"] == ["loaded", 0.95]
    assert hub["offline"]["timm/sharded"] == ["loaded", 0.875]
    kind, message = hub["offline"]["timm/nothing"]
    assert kind == "FileNotFoundError"
    assert "not in the cache" in message and "HF_HUB_OFFLINE is set" in message


@pytest.mark.long
def test_an_unreachable_hub_says_so_unless_the_cache_has_the_file(hub):
    assert hub["unreachable"]["timm/good"] == ["loaded", 0.95]
    kind, message = hub["unreachable"]["timm/new"]
    assert kind == "ConnectionError"
    assert "could not be reached" in message and "HF_ENDPOINT" in message


#: Pushes an adapter, loads it again, and tries what goes wrong.
ADAPTERS = """
import json, os, sys
import numpy as np
import tfimm_lora as lora

update = lora.LayerUpdate(np.ones((2, 8), "float32"), np.ones((4, 2), "float32"), 0.5)
adapter = lora.Adapter({"fc": update}, base_model="me/base")
outcomes = {}

def attempt(what, step):
    try:
        outcomes[what] = ["done", str(step())]
    except Exception as error:
        outcomes[what] = [type(error).__name__, str(error)]

attempt("push", lambda: lora.push_to_hub(adapter, "me/adapter"))
attempt("again", lambda: lora.push_to_hub(adapter, "me/adapter"))
attempt("load", lambda: lora.Adapter.load("hf://me/adapter") == adapter)
attempt("revision", lambda: lora.Adapter.load("hf://me/adapter@main") == adapter)
attempt("nothing", lambda: lora.Adapter.load("hf://me/nothing"))
attempt("address", lambda: lora.Adapter.load("hf://adapter"))
attempt("repository", lambda: lora.push_to_hub(adapter, "adapter"))
attempt("wrong", lambda: lora.Adapter.load("hf://me/wrong"))
attempt("cut", lambda: lora.Adapter.load("hf://me/cut"))
os.environ["HF_TOKEN"] = "hf_other"
attempt("token", lambda: lora.push_to_hub(adapter, "me/other"))
print("OUTCOMES" + json.dumps(outcomes))
"""


def test_adapters_round_trip_through_the_hub(tmp_path):
    import numpy as np

    import tfimm_lora as lora

    update = lora.LayerUpdate(np.ones((2, 8), "float32"), np.ones((4, 2), "float32"), 0.5)
    lora.Adapter({"fc": update}).save(tmp_path / "files")
    files = {p.name: p.read_bytes() for p in (tmp_path / "files").iterdir()}
    weights = "adapter_model.safetensors"
    with HubServer({"me/wrong": dict(files), "me/cut": dict(files)}) as server:
        server.faults["me/wrong", weights] = Fault.WRONG_CONTENT
        server.faults["me/cut", weights] = Fault.CUT
        done = subprocess.run(
            [sys.executable, "-c", ADAPTERS],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
                "HF_ENDPOINT": server.endpoint,
                "HF_HOME": str(tmp_path / "home"),
                "HF_TOKEN": TOKEN,
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
        )
        uploaded = server.repositories["me/adapter"]
        assert "me/other" not in server.repositories
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("OUTCOMES"))
    outcomes = json.loads(line.removeprefix("OUTCOMES"))
    assert outcomes["push"] == outcomes["again"] == ["done", "hf://me/adapter"]
    assert sorted(uploaded) == ["README.md", "adapter_config.json", weights]
    assert outcomes["load"] == outcomes["revision"] == ["done", "True"]
    assert outcomes["nothing"][0] == "FileNotFoundError"
    assert "'me/nothing' does not exist" in outcomes["nothing"][1]
    assert outcomes["address"][0] == outcomes["repository"][0] == "ValueError"
    assert outcomes["wrong"][0] == "ValueError"
    assert "is not the file that the hub announced" in outcomes["wrong"][1]
    assert outcomes["cut"][0] == "ConnectionError"
    assert outcomes["token"][0] == "PermissionError" and "HF_TOKEN" in outcomes["token"][1]
