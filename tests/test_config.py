"""Every setting is checked, and every message names the setting, its value and what is expected."""

import math
from typing import get_args

import ml_collections
import pytest

from tarq_jax.config import (
    DECODED,
    HEADS,
    REACHES,
    RULES,
    default_config,
    is_smoke,
    smoke,
    validate,
    variants_of,
)
from tarq_jax.data.order import WINDOW
from tarq_jax.models.tarq import Decoded, Head, Reach

BAD = {
    "seed": [-1, 2 ** 32, 2 ** 63],
    "steps": [0, -3], "batch_size": [0], "baselines": [("two_tower", "tower"), (3,), ([],)],
    "accumulate": [0, -1],
    "data.buckets": [(16, 8), (0, 4), (8, 8), ("16",)], "data.window": [0, -32], "data.readers": [-1],
    "parallel": ["xmap"], "mesh.data": [-1], "mesh.model": [0],
    "mesh.rules": [(("(", ("model",)),), (("kernel", ("modle",)),), (("kernel", "model"),), ("kernel",), (3,),
                   (("kernel", ("model", "model")),)],
    "model.name": ["tark", "", "tark:make", "tark.models:make", "json:", ":loads", "json:a b"],
    "model.width": [0], "model.num_heads": [0],
    "model.hidden": [(64, 0), ("64",), (-1,)], "model.num_levels": [0], "model.num_codewords": [1],
    "model.head": ["mpl"], "model.student_gradient": ["all"], "model.decoded": ["user"],
    "model.table_multiple": [0], "optimizer.table": ["adam"],
    "model.aligned_share": [0.0, 1.5, -0.1, math.nan],
    "model.num_vectors": [0], "model.hash_rounds": [0], "model.hash_bits": [0, 13], "model.num_selected": [0],
    "model.dtype": ["float16", "bf16"], "model.attention_block": [-1], "model.remat": [2, "yes"],
    "model.assign": ["even"], "model.pass_through": ["ste"],
    "codebook.init": ["k-means"], "codebook.start": [-1], "codebook.init_latents": [0],
    "codebook.learning": ["sgd"], "codebook.decay": [1.0, -0.1, math.nan],
    "codebook.revive_every": [-1], "model.order": [2, -1],
    "codebook.dead": ["never"], "codebook.max_age": [0],
    "codebook.min_usage": [1.0, -0.1, math.nan],
    **{f"loss_weights.{name}": [-1.0, math.nan, math.inf] for name in default_config().loss_weights},
    "optimizer.learning_rate": [0.0, -1.0, math.nan, math.inf],
    "optimizer.weight_decay": [-1e-9, math.nan, math.inf], "optimizer.warmup_steps": [-1],
    "optimizer.clip_norm": [-1.0, math.nan, math.inf],
    "optimizer.max_gradient_norm": [-1.0, math.nan, math.inf],
    "log_every": [0, 2**31], "eval_every": [-1], "eval_batch_size": [0], "checkpoint_every": [0],
    "checkpoints_kept": [0], "best_metric": ["accuracy"], "recall_k": [0], "prefetch": [0],
    "save_scores": [1, "yes"],
}
# left to the data
NOT_A_RULE = {"data.name", "data.data_dir", "data.prepared", "data.stream", "model.category"}


def flatten(config, prefix="") -> dict:
    flat = {}
    for key, value in config.items():
        is_group = isinstance(value, ml_collections.ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": value}
    return flat


def refused(config) -> str:
    with pytest.raises(ValueError) as caught:
        validate(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(key, value) -> ml_collections.ConfigDict:
    """The defaults with one setting changed, whatever its type."""
    config = default_config().unlock()
    group = config
    for part in key.split(".")[:-1]:
        group = group[part]
    with group.ignore_type():
        group[key.split(".")[-1]] = value
    return config


def test_defaults_hold():
    validate(default_config())
    validate(smoke(default_config()))
    assert default_config().is_locked


def test_every_setting_has_a_rule_and_every_rule_a_bad_value():
    settings = flatten(default_config())
    assert RULES.keys() == settings.keys() - NOT_A_RULE
    assert BAD.keys() == RULES.keys()


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_every_rule_can_fail(key, value):
    message = refused(changed(key, value))
    assert message.startswith(f"config.{key} is {value!r}, expected ")
    assert message.endswith(RULES[key].expected)


@pytest.mark.parametrize(("key", "value"), [
    ("steps", 10.5), ("steps", "10"), ("steps", None), ("steps", True), ("model.name", 3),
    ("model.hidden", 64),
    ("optimizer.learning_rate", "fast"), ("data.data_dir", 7),
    ("baselines", "tarq"), ("loss_weights.student", (1.0,)),
])
def test_wrong_types(key, value):
    message = refused(changed(key, value))
    kind = type(flatten(default_config())[key]).__name__
    assert message.startswith(f"config.{key} is {value!r}, expected a {kind} like ")


@pytest.mark.parametrize(("key", "value"), [
    ("seed", 2 ** 32 - 1), ("optimizer.learning_rate", 1), ("model.hidden", [8, 8]), ("model.hidden", ()),
    ("loss_weights.alignment", 0), ("loss_weights.alignment", 0.0), ("model.aligned_share", 1.0),
    ("mesh.rules", [["table$", [None, ["data", "model"]]]]),
    ("codebook.decay", 0.0), ("codebook.start", 0), ("codebook.revive_every", 0), ("baselines", ["tarq"]),
])
def test_values_at_the_edge(key, value):
    validate(changed(key, value))


@pytest.mark.parametrize("key", ["foo", "optimizer.learningrate", "loss_weights.aligment", "optimiser.beta"])
def test_unknown_keys(key):
    config = default_config().unlock()
    *groups, name = key.split(".")
    group = config
    for part in groups:
        if part not in group:
            group[part] = ml_collections.ConfigDict()
        group = group[part]
    group[name] = 1
    assert refused(config).startswith(f"config.{key} is not a setting, expected one of ['accumulate', ")


@pytest.mark.parametrize("key", sorted(flatten(default_config())))
def test_missing_keys(key):
    config = default_config().unlock()
    group = config
    for part in key.split(".")[:-1]:
        group = group[part]
    del group[key.split(".")[-1]]
    kind = type(flatten(default_config())[key]).__name__
    assert refused(config) == f"config.{key} is missing, expected a {kind}"


def test_options_of_the_data_are_left_to_the_data():
    config = default_config().unlock()
    config.data.num_items = "many"
    validate(config)


def test_heads_have_to_divide_the_width():
    message = refused(changed("model.num_heads", 5))
    assert message == "config.model.num_heads is 5, expected a divisor of config.model.width, 32"


def test_micro_batches_have_to_divide_the_batch():
    message = refused(changed("accumulate", 5))
    assert message == "config.accumulate is 5, expected a divisor of config.batch_size, 64"


def test_balanced_codes_are_of_whole_batches():
    config = changed("model.assign", "balanced")
    validate(config)
    config.accumulate = 2
    assert refused(config).startswith(
        "config.accumulate is 2, expected 1 with config.model.assign='balanced'")
    config.model.name = "two_tower"
    validate(config)


@pytest.mark.parametrize(("share", "batch_size", "accumulate"), [
    (0.25, 64, 32), (0.3, 8, 2), (0.01, 8, 2), (0.124, 64, 8)])
def test_micro_batches_align_whole_requests(share, batch_size, accumulate):
    config = default_config()
    config.model.aligned_share, config.batch_size = share, batch_size
    validate(config)
    config.accumulate = accumulate
    assert refused(config) == (
        f"config.model.aligned_share is {share}, expected one that gives whole requests of each micro-batch "
        f"of config.batch_size / config.accumulate, {batch_size // accumulate}")


@pytest.mark.parametrize(("share", "batch_size", "accumulate"), [
    (0.25, 64, 16), (0.1, 60, 2), (0.7, 200, 20), (1 / 3, 18, 3), (1.0, 64, 64)])
def test_shares_that_micro_batches_can_align(share, batch_size, accumulate):
    config = default_config()
    config.model.aligned_share, config.batch_size, config.accumulate = share, batch_size, accumulate
    validate(config)


@pytest.mark.parametrize("name", ["json:loads", "importlib.metadata:version", "__main__:make"])
def test_a_model_of_ones_own(name):
    """The name is a module that Python finds; whether it has the function is checked when it is imported."""
    validate(changed("model.name", name))
    validate(changed("baselines", ("two_tower", name)))


def test_kmeans_needs_a_latent_for_each_codeword():
    message = refused(changed("codebook.init_latents", 63))
    assert message == ("config.codebook.init_latents is 63, expected at least config.model.num_codewords, 64")


@pytest.mark.parametrize("start", [7, 8])
def test_a_codebook_has_to_start_before_the_last_step(start):
    config = default_config()
    config.steps, config.codebook.start = 7, start
    message = refused(config)
    assert message.startswith(f"config.codebook.start is {start}, expected less than config.steps, 7")
    config.model.name = "two_tower"
    validate(config)
    config.baselines = ("tarq",)
    assert refused(config) == message
    config.codebook.start = 6
    validate(config)


@pytest.mark.parametrize(("key", "value"), [
    ("mesh.model", 2), ("mesh.rules", (("kernel", ("model",)),)), ("model.assign", "balanced"),
])
def test_what_pmap_cannot_do(key, value):
    config = changed(key, value)
    validate(config)
    config.parallel = "pmap"
    message = refused(config)
    assert message.startswith(f"config.{key} is {value!r}, expected ")
    assert message.endswith(" with config.parallel='pmap'")


def test_names_are_those_of_the_models():
    """The configuration repeats the names, as it must not import JAX."""
    assert get_args(Head) == HEADS
    assert default_config().data.window == WINDOW
    assert get_args(Reach) == REACHES
    assert get_args(Decoded) == DECODED


def test_smoke_is_small_and_takes_options_of_the_data():
    config = default_config()
    assert smoke(config, num_items=9, test_requests=3) is config
    assert (config.data.num_items, config.data.test_requests) == (9, 3)
    assert config.steps <= 20 and config.batch_size <= 8 and config.baselines == ()
    assert config.codebook.start < config.steps and config.checkpoint_every <= config.steps
    random = default_config()
    random.codebook.start = 0
    assert smoke(random).codebook.start == 0


def study(**changes) -> ml_collections.ConfigDict:
    parts = {"base": default_config(), "reference": "a", "variants": {"a": {}, "b": {"model": {"order": 0}}}}
    return ml_collections.ConfigDict(parts | changes)


def test_variants_are_the_base_with_changes():
    found = variants_of(study())
    assert list(found) == ["a", "b"]
    assert found["a"].to_dict() == default_config().to_dict()
    assert found["b"].model.order == 0 and found["b"].steps == default_config().steps
    found["a"].steps = 7
    assert found["b"].steps == default_config().steps


@pytest.mark.parametrize(("changes", "message"), [
    ({"more": 1}, r"the study has \['base', 'more', 'reference', 'variants'\], expected"),
    ({"reference": "c"}, "config.reference is 'c', expected one of config.variants"),
    ({"variants": {"a": {"model": {"order": 2}}}}, "config.variants.a: config.model.order is 2"),
    ({"variants": {"a": {"model": {"depth": 2}}}}, "config.variants.a: .*depth"),
    ({"variants": {"a": {"steps": "many"}}}, "config.variants.a: .*steps"),
])
def test_studies_that_do_not_hold(changes, message):
    with pytest.raises(ValueError, match=message):
        variants_of(study(**changes))


def test_modes_are_smoke_or_none():
    assert is_smoke("smoke") and not is_smoke("")
    with pytest.raises(ValueError, match="mode is 'smok', expected 'smoke' or none"):
        is_smoke("smok")


def test_the_best_of_no_evaluation_is_refused():
    config = default_config()
    config.best_metric, config.eval_every = "auc", config.steps + 1
    assert f"config.eval_every is {config.steps + 1}, expected at most config.steps" in refused(config)


def test_baselines_are_different_ones():
    config = default_config()
    config.baselines = ("two_tower", "two_tower")
    assert "config.baselines is ('two_tower', 'two_tower'), expected a tuple of different" in refused(config)
