"""The microbenchmarks run, compare revisions and give verdicts."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import benchmarks.__main__
from benchmarks import comparing, machine, measuring, verdicts
from benchmarks.machine import Peaks
from benchmarks.measuring import Key


@pytest.mark.slow
@pytest.mark.skipif(not (comparing.ROOT / ".git").exists(), reason="no repository to take a revision from")
def test_rows_and_verdicts_against_a_revision(command, tmp_path):
    found = tmp_path / "found.json"
    run = command("-m", "benchmarks", "look_up", "--workload=single", "--processes=1", "--seconds=0.02",
                  "--revision=HEAD", f"--json={found}", "--slowdown=look_up=1000")
    assert run.returncode == 1, run.stderr
    assert "error: slower: look_up/single/" in run.stderr and "plain" not in run.stderr
    rows = {(row["implementation"], row["direction"]): row for row in json.loads(found.read_text())}
    assert set(rows) == {(way, direction) for way in ("plain", "xla", "one_hot")
                         for direction in ("forward", "gradient")}
    for (way, _), row in rows.items():
        assert row["run_ms"] > 0 and row["compile_ms"] > 0 and len(row["processes_ms"]) == 1
        assert row["error"] < measuring.WORST and row["bound_ms"] > 0
        assert "change" not in row if way == "plain" else row["change"] > 0  # `plain` is not judged
    assert rows["xla", "forward"]["verdict"] == "slower" and rows["xla", "forward"]["change"] > 10
    assert len({row["revision"] for row in rows.values()}) == 1 and row["device"] == "cpu"


def test_an_earlier_file(tmp_path):
    path, key = tmp_path / "earlier.json", Key("look_up", "single", "xla", "forward")
    facts = {"device": "cpu", "revision": "123abc"}
    path.write_text(json.dumps([key._asdict() | facts | {"processes_ms": [1.0, 2.0]},
                                key._asdict() | facts | {"workload": "paper", "note": "takes 9 MB"}]))
    assert benchmarks.__main__.earlier(str(path)) == ({key.name: [1.0, 2.0]}, "cpu", "123abc")


@pytest.mark.parametrize("in_turns, word", [([1.0, 1.0, 1.0], "same"), ([1.3, 1.3, 1.4], "slower")])
def test_what_differs_from_a_file_is_judged_in_turns(monkeypatch, tmp_path, in_turns, word):
    """Only what differs, in more processes, which alone decide; without a tree, against the file again."""
    keys = [Key("encode", "odd", way, "forward") for way in ("plain", "xla", "blocks")]
    plain, xla, blocks = keys
    before, asked = {key.name: [1.0, 1.0] for key in keys}, []

    def measure(wanted, trees, processes):
        asked.append((wanted, list(trees), processes))
        new = {xla: in_turns if "old" in trees else [1.5, 1.6]}
        return {tree: {key: comparing.Series({}, [[time] for time in (
            new.get(key, [1.0] * 3) if tree == "new" else [1.0] * 3)]) for key in wanted} for tree in trees}

    monkeypatch.setattr(comparing, "measure", measure)
    _, judged = comparing.compare(keys, tmp_path, before, processes=3)
    assert asked == [(keys, ["new"], 3), ([xla], ["new", "old"], 6)]
    assert {name: verdict.word for name, verdict in judged.items()} == {xla.name: word, blocks.name: "same"}
    asked.clear()
    _, judged = comparing.compare(keys, None, before, processes=3)
    assert judged[xla.name].word == "slower"
    assert asked == [(keys, ["new"], 3), ([plain, xla], ["new"], 6)]


def test_each_name_counts_once(with_flags):
    with with_flags(workload=["odd", "odd"], implementation=["xla"]):
        assert benchmarks.__main__.chosen(["top_k", "top_k"]) == [Key("top_k", "odd", "xla", "forward")]


@pytest.mark.parametrize("words, flags, complaint", [
    (["encoding"], {}, "operation is 'encoding', expected some of align, attend"),
    ([], {"workload": ["huge"]}, "--workload is 'huge'"),
    ([], {"implementation": ["cuda"]}, "--implementation is 'cuda'"),
    (["encode"], {"implementation": ["one_hot"]}, "--implementation is 'one_hot', expected some that encode"),
    ([], {"against": "nowhere.json"}, "--against=nowhere.json: FileNotFoundError"),
    ([], {"against": "setup.cfg"}, "--against=setup.cfg: JSONDecodeError"),
    ([], {"revision": "nothing"}, "--revision is 'nothing': fatal: not a valid object name"),
    ([], {"against": "a.json", "revision": "HEAD"}, "--against is 'a.json' and --revision is 'HEAD', expe"),
    (["top_k"], {"slowdown": ["encode=2"]}, "--slowdown is 'encode=2', expected OPERATION=FACTOR with one"),
    *(([], {"slowdown": [text]}, f"--slowdown is {text!r}, expected OPERATION=FACTOR with one of align, att")
      for text in ("foo", "foo=2", "encode", "encode=x", "encode=0.5", "encode=nan", "encode=inf")),
])
def test_wrong_calls(capsys, words, flags, complaint, with_flags):
    with with_flags(**flags), pytest.raises(SystemExit) as ended:
        benchmarks.__main__.main(words)
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


MACHINE = {"peaks": [1.0, 1.0, 1.0], "device": "none", "platform": "cpu"}


@pytest.fixture
def file_of(tmp_path):
    """A function that writes a file with a time for each of some implementations of a look-up."""
    def write(implementations, **facts):
        keys = [Key("look_up", "paper", implementation, "forward") for implementation in implementations]
        (path := tmp_path / "old.json").write_text(json.dumps(
            [key._asdict() | {"processes_ms": [1.0]} | facts for key in keys]))
        return str(path)

    return write


@pytest.mark.parametrize("there, asked, counts", [
    (["plain", "xla"], "encode", "0 `plain` and 0 other"), (["xla"], "look_up", "0 `plain` and 1 other"),
    (["plain"], "look_up", "1 `plain` and 0 other")])
def test_a_file_of_other_programs_is_refused(capsys, file_of, there, asked, counts, with_flags):
    with with_flags(against=file_of(there)), pytest.raises(SystemExit) as ended:
        benchmarks.__main__.main([asked])
    assert ended.value.code == 2 and f"has times of {counts} programs" in capsys.readouterr().err


def test_a_file_of_another_device_is_refused(capsys, file_of, monkeypatch, with_flags):
    monkeypatch.setattr(comparing, "ask_machine", lambda _: MACHINE)
    against = file_of(["plain", "xla"], device="TPU v6", revision="no such revision")
    with with_flags(against=against), pytest.raises(SystemExit):
        benchmarks.__main__.main(["look_up"])
    found = capsys.readouterr()
    assert "is of device 'TPU v6', expected 'none'" in found.err and "no such revision of" in found.out


def test_what_has_no_verdict_is_listed(capsys, file_of, monkeypatch, with_flags):
    def found(times):
        return {"new": {Key("look_up", "paper", way, "forward"): comparing.Series({}, times)
                        for way in ("plain", "xla", "one_hot")}}

    monkeypatch.setattr(comparing, "ask_machine", lambda _: MACHINE)
    monkeypatch.setattr(comparing, "compare", lambda *_, **options: (
        found([[2.0]]), {"look_up/paper/xla/forward": verdicts.Verdict((1.0,))}))
    with with_flags(against=file_of(["plain", "xla"])):
        benchmarks.__main__.main(["look_up"])
        listed = capsys.readouterr().out.splitlines()
        assert "revision None of" in listed[0] and "cannot be measured again" in listed[0]
        assert "not compared: look_up/paper/one_hot/forward: not in the file" in listed
        assert sum("not compared:" in line for line in listed) == 1
        monkeypatch.setattr(comparing, "compare", lambda *_, **options: (found([]), {}))
        with pytest.raises(ValueError, match="no program could be compared"):
            benchmarks.__main__.main(["look_up"])


def test_why_an_older_revision_has_no_verdict():
    keys = [Key("look_up", "odd", way, "forward") for way in ("plain", "xla", "pallas")]
    ran, lacks = comparing.Series({"error": 0.0}, [[1.0]]), comparing.Series({"note": "TypeError: align"}, [])
    found = {"new": dict(zip(keys, (ran, ran, lacks), strict=True)),
             "old": dict(zip(keys, (ran, lacks, lacks), strict=True))}
    assert comparing.not_compared(found, [keys[0].name]) == {"look_up/odd/xla/forward": "TypeError: align"}


def test_suspects_are_measured_with_plain_programs_that_run():
    """Their own, or else all: without any, a slower machine would look like slower programs."""
    keys = [Key(name, "odd", way, "forward") for name in ("encode", "expand") for way in ("plain", "xla")]
    encode_plain, encode, expand_plain, expand = keys
    running = [encode_plain.name, encode.name, expand.name]
    assert comparing.with_plain(keys, [encode.name], running) == [encode_plain, encode]
    assert comparing.with_plain(keys, [expand.name], running) == [encode_plain, expand]
    assert comparing.with_plain(keys, [expand.name], [expand_plain.name]) == [expand_plain, expand]


def test_a_worker_that_dies_is_told():
    with comparing.Worker(comparing.ROOT) as worker:
        worker._process.kill()
        with pytest.raises(OSError, match="ended with code -9"):
            for _ in range(2):
                worker.ask(peaks=0.1)


def test_what_cannot_run_is_noted(monkeypatch):
    from benchmarks import worker

    monkeypatch.setattr(measuring, "MOST_MB", 0)
    worker.program.cache_clear()
    found = worker.answer({"key": ["encode", "single", "plain", "forward"]}, {})
    worker.program.cache_clear()
    assert found["note"].startswith("takes ") and found["flops"] > 0 and "error" not in found


def test_what_a_kernel_refuses_is_noted(monkeypatch):
    from benchmarks import worker

    def refused(key):
        raise NotImplementedError("encode has no kernel for this")

    monkeypatch.setattr(worker, "describe", refused)
    assert worker.answer({"key": ["encode", "single", "pallas", "forward"]}, {}) == {
        "note": "NotImplementedError: encode has no kernel for this"}


def test_what_xla_refuses_fails_alone(monkeypatch):
    """The other programs are measured, and the command ends with code 1."""
    from benchmarks import worker

    def refused(key):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic\nfailed")

    monkeypatch.setattr(worker, "describe", refused)
    key = Key("top_k", "single", "xla", "forward")
    found = worker.answer({"key": key}, {})
    assert found == {"note": "JaxRuntimeError: INTERNAL: Mosaic failed", "failed": True}
    assert benchmarks.__main__.wrong_of([key._asdict() | found]) == [f"{key.name} {found['note']}"]


def test_an_older_tree_does_not_run_modules_of_another(monkeypatch, tmp_path):
    from benchmarks import worker

    assert worker.foreign(comparing.ROOT) is None
    monkeypatch.setattr(worker, "describe", lambda key: {"error": 0.0})
    request = {"key": ["top_k", "single", "xla", "forward"]}
    monkeypatch.chdir(tmp_path)
    assert worker.answer(request, {}) == {"error": 0.0}
    assert "which would come from another" in worker.answer(request | {"may_lack": True}, {})["note"]


def test_only_an_older_revision_may_lack_something():
    from benchmarks import worker

    request = {"key": ["gone", "single", "xla", "forward"]}
    assert "KeyError" in worker.answer(request | {"may_lack": True}, {})["note"]
    with pytest.raises(KeyError, match="gone"):
        worker.answer(request, {})


class Recorded:
    """A worker that answers by a function of the request, and keeps the requests."""

    def __init__(self, answer=lambda request: {}):
        self.asked, self._answer = [], answer

    def ask(self, **request):
        self.asked.append(request)
        return self._answer(request)


def test_only_the_older_tree_may_lack_something():
    workers, key = {"new": Recorded(), "old": Recorded()}, Key("look_up", "odd", "xla", "forward")
    series = {name: {key: comparing.Series({}, [])} for name in workers}
    comparing._measure_group([key], workers, 0.1, series)
    assert [worker.asked[0]["may_lack"] for worker in workers.values()] == [False, True]


def test_the_same_program_is_not_run_twice():
    def answer(request):
        if "seconds" in request:
            return {"times": [1.0]}
        programs = {"plain": "a", "xla": "b", "xla_blocks": "b", "xla_whole": "c"}
        return error | {"program": programs[request["key"].implementation]} if "key" in request else {}

    error = {"error": 0.0}
    keys = [Key("encode", "odd", way, "forward") for way in ("plain", "xla", "xla_blocks", "xla_whole")]
    found = {"new": {key: comparing.Series({}, []) for key in keys}}
    comparing._measure_group(keys, {"new": Recorded(answer)}, 0.001, found)
    assert {key.implementation for key, series in found["new"].items() if series.times} == {
        "plain", "xla", "xla_whole"}
    assert found["new"][keys[2]].described == {"program": "b", "note": comparing.SAME}
    error = {}  # as if all took too much memory
    comparing._measure_group(keys, {"new": (worker := Recorded(answer))}, 0.001, found)
    assert not any("seconds" in request for request in worker.asked)


def test_long_programs_run_after_the_others():
    keys = [Key("align", "odd", way, "forward") for way in ("plain", "xla", "xla_whole")]

    def answer(request):
        if "seconds" in request:
            return {"times": [1e3]}
        return {"error": 0.0, "once_ms": 3e3 if request.get("key") == keys[0] else 1.0}

    found = {name: {key: comparing.Series({}, []) for key in keys} for name in ("new", "old")}
    new, old = Recorded(answer), Recorded(lambda request: answer(request) | {"once_ms": 1.0})
    comparing._measure_group(keys, {"new": new, "old": old}, 0.001, found)
    for worker in (new, old):  # what is long in one tree is long in both, so that trees take turns
        ran = [request["key"] for request in worker.asked if "seconds" in request]
        assert ran == comparing.LEAST * keys[1:] + comparing.LEAST * keys[:1]
    assert found["new"][keys[0]].described == {"error": 0.0}


@pytest.mark.parametrize("platform, most", [("cpu", 2), ("tpu", 1)])
def test_a_tpu_is_used_by_one_process_at_a_time(monkeypatch, platform, most):
    running, seen = [], []

    class Process(Recorded):
        def __enter__(self):
            running.append(self)
            seen.append(len(running))
            return self

        def __exit__(self, *_):
            running.remove(self)

    def worker(tree, slowdowns):
        return Process(lambda request: {"device": "this"} if "device" in request else {})

    monkeypatch.setattr(comparing, "Worker", worker)
    trees, machine = {"new": comparing.ROOT, "old": comparing.ROOT}, {"device": "this", "platform": platform}
    comparing.measure([Key("encode", "odd", "xla", "forward")], trees, machine=machine, processes=2,
                      seconds=0.1)
    assert max(seen) == most and len(seen) == 4
    with pytest.raises(OSError, match="has device 'this', expected 'another'"):
        comparing.measure([], trees, machine=machine | {"device": "another"}, processes=1, seconds=0.1)


def test_the_parent_leaves_the_device_to_its_workers(command):
    """A TPU can be used by one process only."""
    done = command("-c", "from absl.flags import FLAGS; from benchmarks import __main__ as own; import jax; "
                         "FLAGS(['own']); own.comparable(own.chosen([])); "
                         "print(jax._src.xla_bridge.backends_are_initialized())")
    assert done.stdout.split() == ["False"], done.stderr


def test_kernels_are_not_measured_where_they_are_interpreted(monkeypatch, with_flags):
    asked = []
    monkeypatch.setattr(comparing, "measure", lambda keys, *_, **options: asked.append(
        {key.implementation for key in keys}) or {"new": {}})
    for platform, chosen in (("cpu", []), ("gpu", []), ("cpu", ["pallas"])):
        monkeypatch.setattr(comparing, "ask_machine", lambda _, name=platform: MACHINE | {"platform": name})
        with with_flags(implementation=chosen):
            benchmarks.__main__.main(["look_up"])
    assert asked == [{"plain", "xla", "one_hot"}, {"plain", "xla", "pallas", "one_hot"}, {"pallas"}]


@pytest.mark.parametrize("found, expected, error", [
    ((1.0, 2), (1.0, 2), 0.0), ((1.5, 2), (2.0, 2), 0.25), ((1.0, 3), (1.0, 2), 1.0),
    ((1.0, 0.2), (1.0, 0.1), 1.0), ((1.0, 1e-7), (1.0, 1e-8), 9e-6),
    ((1.0, 1.0, np.nan), (1.0, 1.0, 1.0), np.nan), ((1.0, 1.0), (1.0, np.nan), np.nan),
])
def test_error_of_numbers_and_codes(found, expected, error):
    both = (tuple(jnp.asarray(value) for value in values) for values in (found, expected))
    np.testing.assert_allclose(measuring.error(*both), error, rtol=1e-5)


def test_numbers_that_are_none_are_wrong():
    """NaN and large errors are wrong; a missing one, without numbers of `plain` to compare with, is not.

    It does not matter whether `plain` is in the table.
    """
    def row(operation, implementation, **described):
        return Key(operation, "odd", implementation, "forward")._asdict() | described

    rows = [row("encode", "plain", error=0.0), row("encode", "xla", error=0.0),
            row("encode", "pallas", error=np.nan, note="differs"), row("align", "plain", error=0.0),
            row("align", "xla", error=1.0, note="differs too"), row("attend", "plain", note="takes 9 MB"),
            row("attend", "xla", error=None), row("top_k", "xla", error=0.5, note="differs as well")]
    assert benchmarks.__main__.wrong_of(rows) == [
        "encode/odd/pallas/forward differs", "align/odd/xla/forward differs too",
        "top_k/odd/xla/forward differs as well"]


def test_a_slowdown_is_one():
    from benchmarks import worker

    key = Key("top_k", "odd", "xla", "forward")
    usual, slow = (worker.times(key, 0.02, slowdowns) for slowdowns in ({}, {"top_k": 50.0}))
    assert min(slow) > 5 * min(usual)


def test_the_first_call_of_a_turn_is_not_counted(monkeypatch):
    from benchmarks import worker

    pauses = iter([0.1, *[0.0] * worker.MOST])
    monkeypatch.setattr(worker, "program", lambda key: measuring.Program(
        lambda: time.sleep(next(pauses)), {}))
    assert max(worker.times(Key("top_k", "odd", "xla", "forward"), 0.02, {})) < 90
    pauses = iter([0.3])  # a long call counts, as no cache helps it
    assert len(worker.times(Key("top_k", "odd", "xla", "forward"), 0.02, {})) == 1


# Verdicts


def times(values):
    return {"encode/odd/xla/forward": values}


@pytest.mark.parametrize("new, old, word", [
    ([1.3, 1.3, 1.3], [1.0, 1.0, 1.0], "slower"),
    ([1.3, 1.3, 0.9], [1.0, 1.0, 1.0], "same"),  # one process disagrees
    ([1.3, 1.3, 1.05], [1.0, 1.0, 1.0], "same"), ([0.7, 0.95, 0.7], [1.0, 1.0, 1.0], "same"),
    ([1.1, 1.1, 1.1], [1.0, 1.0, 1.0], "same"),  # within tolerance
    ([0.7, 0.7, 0.7], [1.0, 1.0, 1.0], "faster"),
    ([2.6, 1.3, 1.3], [2.0, 1.0, 1.0], "slower"),  # the machine was slow in the first turns
])
def test_verdicts_of_turns(new, old, word):
    found, = verdicts.in_turns(times(new), times(old)).values()
    assert found.word == word


@given(st.floats(0.2, 5.0), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_faster_machine_changes_no_verdict_against_a_file(drift, factor):
    name, plain = "encode/odd/xla/forward", "encode/odd/plain/forward"
    old = {name: [1.0, 1.02, 0.98], plain: [3.0, 3.1, 2.9]}
    new = {name: [drift * factor * value for value in old[name]],
           plain: [drift * value for value in old[plain]]}
    found = verdicts.against(new, old)
    assert found[name].word == {0.5: "faster", 1.0: "same", 2.0: "slower"}[factor]
    assert plain not in found


def test_without_plain_programs_the_speed_of_the_machine_is_unknown():
    with pytest.raises(ValueError, match="only encode/odd/xla/forward ran both times, expected a `plain`"):
        verdicts.against(times([1.0]), times([1.0]))
    assert verdicts.against(times([1.0]), {}) == {}


@pytest.mark.parametrize("again, word", [([1.3, 1.2, 1.4], "slower"), ([1.0, 0.9, 1.1], "same")])
def test_suspects_are_measured_again(again, word):
    asked = []

    def measure(names):
        asked.extend(names)
        return verdicts.in_turns({name: again for name in names}, {name: [1.0] * 3 for name in names})

    first = verdicts.in_turns({"a": [1.3, 1.2, 1.4], "b": [1.0] * 3}, {"a": [1.0] * 3, "b": [1.0] * 3})
    found = verdicts.settled(first, measure)
    assert asked == ["a"] and found["a"].word == word and found["b"].word == "same"


def test_false_alarms_and_misses_at_a_noise_of_eight_percent():
    """Of 2,000 programs, at most 2 that did not change are called something else; 19 slower ones missed."""
    rng = np.random.default_rng(0)

    def judge(factor, processes):
        ratios = factor * np.exp(0.08 * rng.standard_normal(processes))
        return verdicts.in_turns(times(ratios), times(np.ones(processes)))

    def words(factor):
        return [next(iter(verdicts.settled(judge(factor, 3), lambda _: judge(factor, 3 * verdicts.AGAIN))
                          .values())).word for _ in range(2000)]

    assert words(1.0).count("same") >= 1998 and words(1.3).count("slower") > 1980


def test_bounds():
    assert Peaks(1e9, 1e9, 1e9).bounds(2e6, 3e6, 1e6) == {
        "flop_bound_ms": 2.0, "byte_bound_ms": 3.0, "exp_bound_ms": 1.0}


def test_rows_have_the_share_of_the_bound_that_is_reached():
    """FLOPs and exponentials are those of `plain`, bytes those of the program; time is the median."""
    keys = [Key("encode", "odd", way, "forward") for way in ("plain", "xla")]
    plain = {"flops": 2e6, "exponentials": 1e3, "bytes": 9e9, "error": 0.0}
    series = comparing.Series(plain, [[8.0, 8.0], [9.0]]), comparing.Series(
        {"flops": 1.0, "bytes": 1e6, "error": 0.0}, [[4.0, 5.0, 40.0]])
    _, row = benchmarks.__main__.rows_of(dict(zip(keys, series, strict=True)), Peaks(1e9, 1e9, 1e9))
    assert (row["bound"], row["bound_ms"], row["roofline_share"]) == ("flop", 2.0, 0.4)
    assert row["run_ms"] == 5.0 and row["speedup"] == 1.6 and row["calls"] == 3
    unknown = {keys[0]: comparing.Series({"error": 0.0}, []), keys[1]: series[1]}
    assert "bound" not in benchmarks.__main__.rows_of(unknown, Peaks(1e9, 1e9, 1e9))[1]


@pytest.mark.parametrize("load", [machine.ON_CPU, machine.ELSEWHERE])
def test_peaks_are_rates_of_what_ran(monkeypatch, load):
    """The same rates, whether much or little is measured together: 2 N^3 FLOPs, 8 bytes a number."""
    monkeypatch.setattr(machine, "MATRIX", 8)
    monkeypatch.setattr(machine, "CHANGED", 4)
    monkeypatch.setattr(machine, "ON_CPU", load._replace(exponentials=2))

    def in_turns(calls, seconds):
        for call in calls.values():
            assert np.isfinite(np.asarray(call())).all()
        return {name: np.array([2.0, 1.0]) for name in calls}

    monkeypatch.setattr(machine, "in_turns", in_turns)
    assert machine.peaks() == (load.repeats * 1024, load.repeats * 32, load.repeats * 32)
