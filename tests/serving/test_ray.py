"""Ray Serve: several replicas follow one folder, and a killed one is replaced."""

import shutil
import socket
import time

import httpx2
import pytest

pytest.importorskip("fastapi", reason='needs the extra "serve"')

from tests.helpers.finished_run import finished_run
from tests.helpers.served import TOKEN, authorization, form_of, picture
from tfimm_lora.backend import installed
from tfimm_lora.serving.ray_serve import ray_application
from tfimm_lora.serving.settings import ServingSettings

# Ray is imported in the tests: it takes seconds, also where they do not run.
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.once,
    pytest.mark.skipif(not installed("ray"), reason='needs the extra "ray"'),
]

REPLICAS = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def client(run):
    """An application of two replicas, with a folder of one adapter."""
    import ray
    from ray import serve

    folder = run.path.parent / "adapters"
    shutil.copytree(run.path, folder / "digits")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ServingSettings(str(run.path), str(folder), token=TOKEN)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(ray_application(settings, num_replicas=REPLICAS))
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(client, name):
    files = {"file": ("x.png", picture(size=(8, 8))[0])}
    return client.post("/predict", files=files, data={"adapter": name})


def answers(client, name):
    """The statuses of so many requests that all replicas answer some of them."""
    return {ask(client, name).status_code for _ in range(30)}


def replicas():
    """The names of the actors that are replicas."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return {x["name"] for x in actors if "tfimm_lora" in x["name"]}


def test_adapters_are_added_and_removed_in_all_replicas(client, run):
    assert answers(client, "digits") == {200}
    assert answers(client, "new") == {404}
    answer = client.put("/adapters/new", files=form_of(run.adapter), headers=authorization())
    assert answer.status_code == 201, answer.text
    assert answers(client, "new") == {200}
    assert (
        ask(client, "new").json()["top"][0]["index"]
        == (ask(client, "digits").json()["top"][0]["index"])
    )
    assert client.delete("/adapters/new", headers=authorization()).status_code == 200
    assert answers(client, "new") == {404}


def test_a_killed_replica_is_replaced(client):
    import ray
    from ray import serve

    before = replicas()
    assert len(before) == REPLICAS
    killed = min(before)
    ray.kill(ray.get_actor(killed, namespace="serve"))  # its process ends at once
    for _ in range(600):
        application = serve.status().applications["default"]
        if len(replicas() - {killed}) == REPLICAS and application.status == "RUNNING":
            break
        time.sleep(0.2)
    assert len(replicas()) == REPLICAS and killed not in replicas()
    assert answers(client, "digits") == {200}
