"""The export command on finished runs; and what it wrote, served without the code that made it."""

import json

import jax
import numpy as np
import pytest
import tiny
import workloads
from jax import export

from configs import synthetic
from tarq_jax.models import FirstOrderTarq, TargetAttention, Tarq, TwoTower
from tarq_jax.serving import methods
from tarq_jax.training import loop

EXPORT = ("-m", "tarq_jax.serving.export")

SERVE = """
import json, sys
from tarq_jax.serving import Scorer
scorer = Scorer.load(sys.argv[1], batch_sizes=(1,), candidate_sizes=(256,), top_k=4)
ranking = scorer.score({"history": {"item_id": [4, 9, 4]}}, top_k=3)
scorer.encode({"item_id": [3], "features": [[0.0] * 24]})
code = [name for name in sys.modules
        if name.split(".")[0] in ("flax", "optax", "orbax", "tensorflow_datasets")
        or name.startswith(("tarq_jax.training", "tarq_jax.models", "tarq_jax.data"))]
print(json.dumps({"ids": ranking.ids.tolist(), "code": code, "facts": scorer.facts}))
"""

SEVERAL = """
import sys
from absl import flags
from tarq_jax.serving import export
run, out, *calls = sys.argv[1:]
for number, call in enumerate(calls):
    flags.FLAGS.unparse_flags()
    for flag in ("fine_tune", "seed", "correction", "calibration"):
        flags.FLAGS[flag].unparse()
    flags.FLAGS(["export", f"--run={run}", f"--out={out}/{number}", "--codewords=8", "--platforms=cpu",
                 *call.split()])
    export.main()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, silent):
    """Finished runs at smoke size."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("target_attention", "tarq"):
        config = loop.with_model(synthetic.get_config("smoke"), name)
        config.model.assign, config.data.data_dir = "balanced", str(folder / "data")
        with tiny.one_device():
            loop.train(config, loop.load_data(config), folder / name, silent)
    return folder


@pytest.mark.parametrize(("name", "flags", "method", "platforms"), [
    ("tarq", ["--vectors=int8", "--histories=4,8"], "mlp_first_order", ["cpu", "cuda", "tpu"]),
    pytest.param("target_attention", ["--platforms=cpu"], "target_attention", ["cpu"],
                 marks=pytest.mark.slow),
    ("target_attention", ["--codewords=8", "--fine_tune=2", "--capacity=600", "--platforms=cpu"],
     "mlp_first_order", ["cpu"]),
    pytest.param("target_attention", ["--codewords=8", "--levels=2", "--platforms=cpu"], "mlp_first_order",
                 ["cpu"], marks=pytest.mark.slow),
    pytest.param("target_attention", ["--codewords=8", "--order=0", "--platforms=cpu"], "mlp", ["cpu"],
                 marks=pytest.mark.slow),
])
def test_export_and_serve_without_training_code(command, runs, tmp_path, name, flags, method, platforms):
    out = tmp_path / "out"
    done = command(*EXPORT, f"--run={runs / name}", f"--out={out}", *flags)
    assert (done.returncode, done.stdout) == (0, f"{out}: written\n"), done.stderr
    served = command("-c", SERVE, out)
    assert served.returncode == 0, served.stderr
    found = json.loads(served.stdout)
    assert found["code"] == []
    assert len(set(found["ids"])) == 3 and set(found["ids"]) <= set(range(1, 121))
    assert (found["facts"]["method"], found["facts"]["platforms"]) == (method, platforms)
    for program in found["facts"]["programs"]:
        serialized = (out / "model" / f"{program}.jaxexport").read_bytes()
        assert list(export.deserialize(bytearray(serialized)).platforms) == platforms
    assert found["facts"]["histories"] == ([4, 8] if name == "tarq" else [8])
    index = json.loads((out / "index" / "manifest.json").read_text())
    assert index["facts"]["items"] == 120
    shapes = {array: facts["shape"] for array, facts in index["facts"]["arrays"].items()}
    assert shapes["ids"] == [1024 if "--capacity=600" in flags else 512]
    if "--levels=2" in flags:
        assert shapes["codes"] == [512, 3] and "correction" not in shapes
    types = {array: facts["dtype"] for array, facts in index["facts"]["arrays"].items()}
    vectors = {"first", "vector", "embedding"} & types.keys()
    assert {types[array] for array in vectors} == {"int8" if "--vectors=int8" in flags else "float32"}
    scaled = {array for array in vectors if f"{array}_scale" in types}
    assert scaled == (vectors if "--vectors=int8" in flags else set())


@pytest.mark.slow
def test_settings_of_the_conversion_reach_it(command, runs, tmp_path):
    """Weights and corrections decide the checksums: the same for the same flags, others for other flags."""
    calls = ("--order=0", "--order=0", "--order=0 --seed=1", "--order=0 --fine_tune=2", "--order=1",
             "--order=1 --correction=damped", "--order=1 --calibration=8")
    done = command("-c", SEVERAL, runs / "target_attention", tmp_path, *calls)
    assert done.returncode == 0, done.stderr
    first, *others = (
        [json.loads((tmp_path / str(number) / part / "manifest.json").read_text())["files"]
         for part in ("index", "model")] for number in range(len(calls)))
    assert first == others[0]
    assert len({json.dumps(files) for files in others}) == len(others)


def test_a_method_of_ones_own(runs):
    """It is made from the run's parameters as NumPy arrays; without one, the module must be known."""
    from tarq_jax.serving import build
    from tarq_jax.training import restore

    run = restore.load_run(runs / "target_attention")

    def with_objective(**changes):
        return run._replace(objective=run.objective._replace(**changes))

    made_of = []

    def to_method(*arguments):
        made_of.append(arguments)
        return methods.from_module(run.objective.module, run.state.params)._replace(name="mine")

    assert build.method_of(with_objective(to_method=to_method)).name == "mine"
    (params, codewords), = made_of
    assert codewords is None and {type(leaf) for leaf in jax.tree.leaves(params)} == {np.ndarray}
    with pytest.raises(ValueError, match="to_method of 'target_attention' gives a tuple, expected a Method"):
        build.method_of(with_objective(to_method=lambda *arguments: arguments))
    with pytest.raises(ValueError, match="one of 'target_attention', whose objective says neither module"):
        build.method_of(with_objective(module=None))
    with pytest.raises(ValueError, match="expected one of target attention with codewords"):
        build.method_of(with_objective(module=None), codewords=8)


@pytest.mark.slow
def test_scores_of_a_run(runs, tmp_path):
    """The served run gives its test requests the scores of its evaluation."""
    from tarq_jax.serving import build
    from tarq_jax.training import restore

    run = restore.load_run(runs / "tarq")
    check_scores(run, build.method_of(run), tmp_path, lambda batch: run.objective.predict(
        run.state.params, run.state.codebook.codewords, batch).logits["tarq"])


@pytest.mark.slow
@pytest.mark.parametrize("levels", [0, 2])
def test_scores_of_a_fine_tuned_conversion(runs, tmp_path, levels):
    from tarq_jax.models.parts import target_attention_parts
    from tarq_jax.serving import build
    from tarq_jax.training import conversion, restore

    run = restore.load_run(runs / "target_attention")
    parts = target_attention_parts(run.objective.module)
    model = conversion.trained_model(parts, run.state.params, run.dataset)
    index = conversion.fit_index(model, num_codewords=8, order=1, seed=3)
    if levels:
        index = conversion.quantize_corrections(index, num_levels=levels, seed=3)
    tuned, index = conversion.fine_tune(model, index, steps=3, seed=3)

    def logits(batch):
        _, found = conversion.exact_and_approximate(model, index, batch)
        return parts.head(tuned, parts.context(model.params, batch), found)

    method = build.method_of(run, codewords=8, levels=levels, fine_tune=3, seed=3)
    check_scores(run, method, tmp_path, logits)


def check_scores(run, method, folder, logits):
    from tarq_jax import data
    from tarq_jax.serving import Scorer, build
    from tarq_jax.training import setup

    build.write(method, run.dataset, folder, histories=[8])
    scorer = Scorer.load(folder, batch_sizes=(8,), candidate_sizes=(), top_k=4)
    batch = next(data.eval_batches(run.dataset, "test", batch_size=8, **setup.batch_shapes(run.dataset)))
    expected, ids = np.asarray(logits(batch)), batch.candidates["item_id"]
    requests = [{"history": {"item_id": items[mask].tolist()}}
                for items, mask in zip(batch.history["item_id"], batch.history_mask, strict=True)]
    for row, ranking in enumerate(scorer.score(requests, list(ids))):
        scores = dict(zip(ranking.ids.tolist(), ranking.scores, strict=True))
        np.testing.assert_allclose(
            [scores[item] for item in ids[row].tolist()], expected[row], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_is_not_served(command, smoke_run, tmp_path):
    """Only its attention differs from target attention, but it is neither exported nor converted as such."""
    out, run = tmp_path / "out", smoke_run("linear_attention")
    for flags, words in (([], "a model of class LinearAttention is not served, expected one of "),
                         (["--codewords=8"], "one of 'linear_attention', expected one of target attention")):
        done = command(*EXPORT, f"--run={run}", f"--out={out}", *flags)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert words in done.stderr and not out.exists()


@pytest.mark.parametrize("name", workloads.BASELINES)
def test_no_baseline_is_served_as_what_it_is_not(name):
    model = workloads.compiled(name)
    with pytest.raises(ValueError, match=f"{type(model.module).__name__} is not served"):
        methods.from_module(model.module, model.params)


class AddsToTheHead(FirstOrderTarq):
    def student_logits(self, backbone, attended, chosen):
        return super().student_logits(backbone, attended, chosen) + 1.0


class ScoresOtherwise(TwoTower):
    def score(self, user, candidates, history):
        return super().score(2 * user, candidates, history)


class ScalesUsers(TwoTower):
    def user_vector(self, batch, history):
        return 2 * super().user_vector(batch, history)


class ScalesItems(TwoTower):
    def embed(self, batch):
        candidates, history = super().embed(batch)
        return 2 * candidates, history


class OnAnotherBackbone(TargetAttention):
    def make_backbone(self):
        return ScoresOtherwise(self.schema, self.width, self.num_heads, self.hidden, parent=None)


class TaughtByIt(Tarq):
    def make_teacher(self):
        return OnAnotherBackbone(self.schema, self.width, self.num_heads, self.hidden, parent=None)


class OwnTower(TwoTower):
    def user_layers(self, batch, history):
        return [2 * layer for layer in super().user_layers(batch, history)]


@pytest.mark.parametrize(("made", "named"), [
    (AddsToTheHead, "AddsToTheHead.student_logits"), (ScoresOtherwise, "ScoresOtherwise.score"),
    (ScalesUsers, "ScalesUsers.user_vector"), (ScalesItems, "ScalesItems.embed"),
    (OnAnotherBackbone, "ScoresOtherwise.score"), (TaughtByIt, "ScoresOtherwise.score")])
def test_what_scores_otherwise_than_it_would_be_served_is_refused(made, named):
    module = made(**workloads.SIZES)
    with pytest.raises(ValueError, match=f"{named} is not that of .*, whose scores would be served"):
        methods.from_module(module, {})
    if isinstance(module, TargetAttention):
        with pytest.raises(ValueError, match=named):
            methods.converted(module, {}, None)


def test_what_serving_calls_may_be_ones_own():
    for module in (OwnTower(**workloads.SIZES), *workloads.SERVED.values()):
        assert methods.check_served(module) is module


@pytest.mark.parametrize(("flags", "words"), [
    (["--vectors=int4"], "vectors"),
    (["--platforms=cpu,gpu"], "--platforms has 'gpu', expected some of cpu,cuda,rocm,tpu"),
    (["--platforms="], "--platforms is '', expected some of cpu,cuda,rocm,tpu"),
    (["--histories=8,none"], "--histories is '8,none', expected positive lengths"),
    (["--histories=0"], "--histories is '0'"),
    (["--codewords=1"], "--codewords is 1, expected at least 2"),
    (["--capacity=0"], "--capacity is 0"),
    (["--fine_tune=-1"], "fine_tune"),
    (["--fine_tune=5"], "--fine_tune is 5, expected --codewords with it"),
    (["--levels=2"], "--levels is 2, expected --codewords with it"),
    (["--order=0"], "--order is 0, expected --codewords with it"),
    (["--codewords=8", "--order=0", "--levels=2"], "--levels is 2, expected 0 with --order=0"),
    (["--codewords=8", "--order=0", "--correction=plain"], "--correction is plain, expected fitted with"),
    (["--order=2"], "order"),
    (["--levels=-1"], "levels"),
    (["extra"], "extra"),
])
def test_wrong_calls(wrong_call, tmp_path, flags, words):
    assert words in wrong_call(*EXPORT, f"--run={tmp_path}", f"--out={tmp_path / 'out'}", *flags)


def test_what_cannot_be_done(command, runs, tmp_path):
    def fails(*flags):
        done = command(*EXPORT, *flags)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    out = tmp_path / "out"
    assert "no checkpoints in it" in fails(f"--run={tmp_path}", f"--out={out}")
    assert "one of 'tarq', expected one of target attention with codewords" in fails(
        f"--run={runs / 'tarq'}", f"--out={out}", "--codewords=8")
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    assert f"{out} exists, expected a path that does not" in fails(f"--run={runs / 'tarq'}", f"--out={out}")
