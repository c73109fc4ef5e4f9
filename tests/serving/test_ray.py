"""Real replicas under Ray Serve: two replicas, one killed, a damaged artefact, another artefact."""

import asyncio
import concurrent.futures
import dataclasses
import os
import shutil
import signal
import socket
import threading
from pathlib import Path

import pytest
import served

pytest.importorskip("ray", reason="the extra [ray] is not installed")

import pydantic
import ray
import services
from ray import serve
from starlette.exceptions import HTTPException

from tarq_jax.serving import Scorer
from tarq_jax.serving.client import Client, Wrong
from tarq_jax.serving.http.options import Options
from tarq_jax.serving.ray import Arguments, Replica, application

GOOD = served.world().requests[0]


def test_arguments():
    assert Arguments(artefact="1").max_replicas == 1
    for wrong, words in (({"artefact": "1", "replicas": 2}, "replicas"), ({}, "artefact"),
                         ({"artefact": "1", "min_replicas": 2}, "min_replicas is 2, expected at most"),
                         ({"artefact": "1", "ongoing": 0}, "ongoing")):
        with pytest.raises(pydantic.ValidationError, match=words):
            Arguments(**wrong)


@pytest.fixture(scope="module")
def url():
    """Starts Ray Serve on this machine, yields its URL, and shuts it down after the module."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def run(artefact, **arguments):
    serve.run(application(Arguments(artefact=str(artefact), budget_ms=30_000, **arguments)))


def replicas():
    """Process ids of replicas on this machine, found by the process names that Ray sets."""
    def name(folder):
        try:
            return (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            return ""

    return [int(folder.name) for folder in Path("/proc").iterdir()
            if folder.name.isdecimal() and name(folder).startswith("ray::ServeReplica:default:tarq")]


def test_a_replica_whose_device_hangs_is_not_healthy(artefact, monkeypatch):
    with services.running(artefact()) as running:
        replica, batcher = Replica(), running.service.versions.current.batcher
        replica.app = running.server.app
        asyncio.run(replica.check_health())
        with running.busy():
            asking = threading.Thread(target=running.ask, args=("POST", "/score", GOOD))
            asking.start()
            services.wait_for(lambda: batcher.running > 0.1)
            limits = dataclasses.replace(services.PATIENT.limits, seconds=0.05)
            monkeypatch.setattr(running.service, "_options", Options(limits=limits))
            with pytest.raises(HTTPException, match="a batch has run for"):
                asyncio.run(replica.check_health())
        asking.join(60)
        asyncio.run(replica.check_health())


@pytest.mark.slow
def test_replicas(url, artefact, tmp_path):
    scorer = Scorer.load(artefact(), batch_sizes=(1,), candidate_sizes=(512,), top_k=20)
    expected = scorer.score(GOOD, top_k=5).ids.tolist()
    (tmp_path / "token").write_text("secret\n")
    run(artefact(), min_replicas=2, max_replicas=2, token_file=str(tmp_path / "token"))

    def ask(_):
        with Client(url, token="secret", timeout=120.0, retries=8) as client:
            return client.score(GOOD, top_k=5).ids

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(40))) == [expected] * 40
        assert len(replicas()) == 2
        with Client(url, token="secret") as client, pytest.raises(Wrong, match="does not swap"):
            client.swap("2")
        with Client(url) as client, pytest.raises(Wrong, match="authorization"):
            client.score(GOOD)
        first, _ = replicas()
        os.kill(first, signal.SIGKILL)
        services.wait_for(lambda: first not in replicas())
        assert ask(0) == expected
        services.wait_for(lambda: len(replicas()) == 2)

    shutil.copytree(artefact(), tmp_path / "damaged")
    with (tmp_path / "damaged" / "index" / "ids.npy").open("ab") as file:
        file.write(b"more")
    with pytest.raises(RuntimeError):
        run(tmp_path / "damaged")

    run(artefact("two_tower"))
    with Client(url, timeout=120.0, retries=8) as client:
        assert client.version()["method"] == "two_tower"
