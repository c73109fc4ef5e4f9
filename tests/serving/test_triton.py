"""Artefacts as models of Triton: what is written, what its model answers, and a real server."""

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import served

pytest.importorskip("orjson", reason="the extra [serve] is not installed")

import services

from tarq_jax.serving import triton
from tarq_jax.serving.artefact import version_name
from tarq_jax.serving.triton_model import answers

TRITON = ("-m", "tarq_jax.serving.triton")
REQUESTS = served.world().requests
NUMPY_2 = (2, 54)  # the first Triton that is sure to pass arrays of it
SERVER = os.environ.get("TRITONSERVER") or shutil.which("tritonserver")


def body(**more):
    return json.dumps(REQUESTS[0] | {"top_k": 3} | more).encode()


def test_answers(scorer):
    """Each as if it were alone, whatever comes with it."""
    loaded = scorer()
    wrong = body(top_k=0)
    found = answers(loaded, "v", [body(), b"{", wrong, body(candidates=[4, 5, 999])])
    best = loaded.score(REQUESTS[0], top_k=3)
    assert json.loads(found[0]) == {
        "version": "v", "ids": best.ids.tolist(), "scores": pytest.approx(best.scores), "unknown": [],
        "skipped": 0}
    assert "expected a JSON object" in str(found[1]) and "'top_k' is 0" in str(found[2])
    last = json.loads(found[3])
    assert set(last["ids"]) == {4, 5} and last["unknown"] == [999]
    assert all(isinstance(one, ValueError) for one in answers(loaded, "v", [b"{", wrong]))


def test_the_command(command, wrong_call, artefact, tmp_path):
    out = tmp_path / "models" / "tarq"
    flags = f"--artefact={artefact()}", f"--out={out}", "--max_batch_size=4", "--delay_ms=0.5"
    done = command(*TRITON, *flags)
    assert (done.returncode, done.stdout) == (0, f"{out}: written\n"), done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["1", "config.pbtxt"]
    config = (out / "config.pbtxt").read_text()
    assert 'name: "tarq"' in config and "max_batch_size: 4\n" in config
    assert "max_queue_delay_microseconds: 500 " in config
    written = out / "1" / "artefact"
    assert version_name(written, written / "index").split("-")[1] == version_name(
        artefact(), artefact() / "index").split("-")[-1]
    compile((out / "1" / "model.py").read_text(), "model.py", "exec")
    assert "max_batch_size" in wrong_call(*TRITON, "--artefact=x", "--out=y", "--max_batch_size=0")


def test_what_cannot_be_written(artefact, tmp_path):
    with pytest.raises(ValueError, match="exists"):
        triton.write(artefact(), tmp_path, batch=1, delay=0.0)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        triton.write(tmp_path, out, batch=1, delay=0.0)
    shutil.copytree(artefact(), tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "index")
    shutil.copytree(artefact("two_tower") / "index", tmp_path / "mixed" / "index")
    with pytest.raises(ValueError, match="made by another model"):
        triton.write(tmp_path / "mixed", out, batch=1, delay=0.0)
    assert not out.exists()


@pytest.fixture
def server(artefact, tmp_path):
    """The URL of a Triton server on loopback that serves the model `tarq`."""
    if not SERVER:
        pytest.skip("no tritonserver on the path, and no TRITONSERVER in the environment")
    triton.write(artefact(), tmp_path / "models" / "tarq", batch=4, delay=0.002)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    further = os.environ.get("TRITONSERVER_FLAGS", "").split()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [SERVER, f"--model-repository={tmp_path / 'models'}", "--http-address=127.0.0.1",
             f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false", *further],
            stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(Path(triton.__file__).parents[2])})
    url = f"http://127.0.0.1:{port}/v2"
    try:
        services.wait_for(lambda: process.poll() is not None or ready(url))
        assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        with urllib.request.urlopen(url, timeout=60) as answer:
            version = json.load(answer)["version"]
        if tuple(map(int, version.split("."))) < NUMPY_2:
            pytest.skip(f"Triton {version} loads the model, but its Python backend is older than NumPy 2")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def ready(url):
    try:
        with urllib.request.urlopen(f"{url}/models/tarq/ready", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def infer(url, *bodies):
    asked = {"inputs": [{"name": "request", "datatype": "BYTES", "shape": [len(bodies), 1],
                         "data": [one.decode() for one in bodies]}]}
    try:
        with urllib.request.urlopen(f"{url}/models/tarq/infer", json.dumps(asked).encode(), 60) as answer:
            output, = json.load(answer)["outputs"]
    except urllib.error.HTTPError as error:
        return json.load(error)["error"]
    assert output["name"] == "answer" and output["shape"] == [len(bodies), 1]
    return [json.loads(text) for text in output["data"]]


@pytest.mark.slow
def test_a_real_server(server, scorer):
    found = infer(server, body(), body(candidates=[4, 5]))
    for answer, candidates in zip(found, (None, [4, 5]), strict=True):
        expected = scorer().score(REQUESTS[0], candidates, top_k=3)
        assert answer["ids"] == expected.ids.tolist()
        assert answer["scores"] == pytest.approx(expected.scores.tolist(), abs=1e-5)
    assert "'top_k' is 0, expected an integer in [1, " in infer(server, body(top_k=0))
    assert infer(server, body()) == found[:1]
