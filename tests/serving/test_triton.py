"""Artefacts as Triton models: the files, the answers of the model, and a real server."""

import concurrent.futures
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import served

pytest.importorskip("orjson", reason="the extra [serve] is not installed")

import services

from tarq_jax.serving import triton
from tarq_jax.serving.artefact import version_name
from tarq_jax.serving.triton_model import TritonPythonModel, answers

TRITON = ("-m", "tarq_jax.serving.triton")
REQUESTS = served.world().requests
SERVER = os.environ.get("TRITONSERVER") or shutil.which("tritonserver")
FLAGS = os.environ.get("TRITONSERVER_FLAGS", "").split()  # such as --backend-directory


def body(**more):
    return json.dumps(REQUESTS[0] | {"top_k": 3} | more).encode()


def test_answers(scorer):
    """Each request gets the answer that it would get alone."""
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


def check(scorer, found, *candidates):
    """Asserts that answers to the first request are those of the scorer, each for its candidates."""
    for answer, chosen in zip(found, candidates, strict=True):
        expected = scorer.score(REQUESTS[0], chosen, top_k=3)
        assert answer["ids"] == expected.ids.tolist()
        assert answer["scores"] == pytest.approx(expected.scores.tolist(), abs=1e-5)


class Tensor(NamedTuple):
    """What the model uses of Triton's class; arrays themselves stand for their DLPack capsules."""

    name: str
    values: np.ndarray

    def as_numpy(self):
        return self.values

    def to_dlpack(self):
        return self.values

    @classmethod
    def from_dlpack(cls, name, capsule):
        return cls(name, np.from_dlpack(capsule))


class TritonError(NamedTuple):
    """As in Triton, where its codes are attributes of the class."""

    message: str
    code: int
    INVALID_ARG = 3


class InferenceResponse(NamedTuple):
    """As in Triton; its tensors and its error can be read."""

    output_tensors: list
    error: Any = None


@pytest.fixture
def backend(monkeypatch):
    """A stand-in for Triton's Python module, which exists only inside a server, so that the model runs.

    Where there is a server, `test_a_real_server` uses the real one. A request is a dictionary of tensors.
    """
    module = types.SimpleNamespace(
        Tensor=Tensor, TritonError=TritonError, InferenceResponse=InferenceResponse,
        get_input_tensor_by_name=lambda request, name: request[name])
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)


@pytest.fixture
def model(backend, artefact, tmp_path):
    """The class in the written `model.py`, and what Triton passes to `initialize`."""
    out = tmp_path / "models" / "tarq"
    triton.write(artefact(), out, batch=9, delay=0.0)
    made = runpy.run_path(str(out / "1" / "model.py"))["TritonPythonModel"]
    return made(), {"model_repository": str(out), "model_version": "1",
                    "model_config": json.dumps({"max_batch_size": 9})}


def test_requests_are_answered_in_order_and_a_wrong_one_fails_alone(model, scorer):
    made, arguments = model
    made.initialize(arguments)
    assert made._scorer.ready
    texts = [body(), body(candidates=[4, 5])], [body(), body(top_k=0)], 6 * [body(candidates=[7, 9])]
    first, wrong, last = made.execute([
        {"request": Tensor("request", np.array(each, object)[:, None])} for each in texts])
    written = Path(arguments["model_repository"]) / "1" / "artefact"
    for response, candidates in ((first, (None, [4, 5])), (last, 6 * ([7, 9],))):
        assert response.error is None
        (name, found), = response.output_tensors
        assert (name, found.shape, found.dtype) == ("answer", (len(candidates), 1), object)
        found = [json.loads(text) for text in found[:, 0]]
        check(scorer(), found, *candidates)
        assert {answer["version"] for answer in found} == {version_name(written, written / "index")}
    assert wrong.output_tensors == [] and wrong.error.code == TritonError.INVALID_ARG
    assert wrong.error.message.startswith("text 1: 'top_k' is 0, expected an integer in [1, ")


def test_a_model_that_cannot_be_served_does_not_start(model, monkeypatch):
    made, arguments = model
    with (Path(arguments["model_repository"]) / "1" / "artefact" / "index" / "ids.npy").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"ids\.npy has "):
        made.initialize(arguments)
    monkeypatch.setattr(Tensor, "from_dlpack", lambda name, capsule: Tensor(name, capsule * 0))
    with pytest.raises(ValueError, match="it was built for NumPy 1, expected that of Triton"):
        made.initialize(arguments)


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
    assert runpy.run_path(str(out / "1" / "model.py"))["TritonPythonModel"] is TritonPythonModel
    again = command(*TRITON, *flags)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith(f"error: {out} exists, expected a path that does not")


@pytest.mark.parametrize(("flag", "words"), [
    ("--max_batch_size=0", "max_batch_size"), ("--delay_ms=-1", "delay_ms"),
    ("--delay_ms=inf", "--delay_ms is inf, expected a finite number"),
    ("--delay_ms=nan", "--delay_ms is nan, expected a finite number")])
def test_wrong_calls(wrong_call, flag, words):
    assert words in wrong_call(*TRITON, "--artefact=x", "--out=y", flag)


def test_what_the_model_imports(command, tmp_path):
    """It imports from the extra [serve] only what the extra [triton] has, too."""
    for name in ("httptools", "prometheus_client", "starlette", "uvicorn", "uvloop"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    done = command("-c", triton.MODEL, path=(tmp_path,))
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_written(artefact, tmp_path):
    with pytest.raises(ValueError, match="exists"):
        triton.write(artefact(), tmp_path, batch=1, delay=0.0)
    for name in ("é", 'a"b', "a b", "-a"):
        with pytest.raises(ValueError, match=r"named '.*', expected letters of ASCII"):
            triton.write(artefact(), tmp_path / name, batch=1, delay=0.0)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        triton.write(tmp_path / "nowhere", out, batch=1, delay=0.0)
    with pytest.raises(ValueError, match=r"out, expected a folder outside of the artefact"):
        triton.write(tmp_path, out, batch=1, delay=0.0)
    shutil.copytree(artefact(), tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "index")
    shutil.copytree(artefact("two_tower") / "index", tmp_path / "mixed" / "index")
    with pytest.raises(ValueError, match="made by another model"):
        triton.write(tmp_path / "mixed", out, batch=1, delay=0.0)
    assert not out.exists()


@pytest.fixture
def start(tmp_path):
    """Starts a Triton server on loopback for `models/tarq`; returns its URL when ready, None if it fails."""
    if not SERVER:
        pytest.skip("no tritonserver on the path, and no TRITONSERVER in the environment")
    started = []

    def run():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [SERVER, f"--model-repository={tmp_path / 'models'}", "--http-address=127.0.0.1",
                 f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false", *FLAGS],
                stdout=log, stderr=log, cwd=Path(triton.__file__).parents[2])  # for its Python's imports
        started.append(process)
        url = f"http://127.0.0.1:{port}/v2/models/tarq"
        services.wait_for(lambda: process.poll() is not None or ready(url))
        if "built for NumPy 1" in (tmp_path / "log").read_text():
            pytest.skip("this Triton is older than 25.01: its Python backend was built for NumPy 1")
        return url if process.poll() is None else None

    yield run
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def ready(url):
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def infer(url, *bodies):
    """The answers to one request with these texts, or status and error."""
    asked = {"inputs": [{"name": "request", "datatype": "BYTES", "shape": [len(bodies), 1],
                         "data": [one.decode() for one in bodies]}]}
    try:
        with urllib.request.urlopen(f"{url}/infer", json.dumps(asked).encode(), 60) as answer:
            output, = json.load(answer)["outputs"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]
    assert output["name"] == "answer" and output["shape"] == [len(bodies), 1]
    return [json.loads(text) for text in output["data"]]


def executions(url):
    with urllib.request.urlopen(f"{url}/stats", timeout=60) as answer:
        return json.load(answer)["model_stats"][0]["execution_count"]


@pytest.mark.slow
def test_a_real_server(start, artefact, scorer, tmp_path):
    """The texts of one request and of several are computed together; a wrong request fails alone."""
    triton.write(artefact(), tmp_path / "models" / "tarq", batch=4, delay=1.0)
    url = start()
    assert url, (tmp_path / "log").read_text()[-2000:]

    check(scorer(), infer(url, body(), body(candidates=[4, 5])), None, [4, 5])
    status, error = infer(url, body(), body(top_k=0))
    assert status == 400 and error.startswith("text 1: 'top_k' is 0, expected an integer in [1, ")
    before = executions(url)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first, wrong, *others = pool.map(
            lambda text: infer(url, text), [body(), b"{", body(candidates=[7, 9]), body()])
    for found, chosen in zip((first, *others), (None, [7, 9], None), strict=True):
        check(scorer(), found, chosen)
    assert wrong[0] == 400 and "text 0: body is '{'" in wrong[1]
    assert executions(url) == before + 1


@pytest.mark.slow
def test_a_damaged_artefact_is_not_served(start, artefact, tmp_path):
    triton.write(artefact(), tmp_path / "models" / "tarq", batch=1, delay=0.0)
    with (tmp_path / "models" / "tarq" / "1" / "artefact" / "index" / "ids.npy").open("ab") as file:
        file.write(b"more")
    assert start() is None
    assert "ids.npy has " in (tmp_path / "log").read_text()
