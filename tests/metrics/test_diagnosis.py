"""What the health report writes about a level: every rule is tested, and a healthy level gives no finding."""

import itertools
import math

import pytest

from tarq_jax.config import default_config
from tarq_jax.metrics.diagnosis import LEVEL_RULES, Level, diagnose_attention, diagnose_level

DEFAULTS = {"init": "kmeans", "revive_every": 20, "learning": "ema", "dead_by": "count", "assign": "nearest",
            "weight_decay": 0.0}  # settings of a run
HEALTHY = Level(level=2, size=64, utilisation=1.0, perplexity=60.0, dead=0, quantization_error=0.1,
                error_before=0.3, items=2000, items_seen=1000, distinct_latents=900, **DEFAULTS)
COLLAPSED = {"distinct_latents": 1, "utilisation": 1 / 64}
UNUSED = {"utilisation": 0.5, "dead": 32}
UNEVEN = {"perplexity": 20.0}
LEVEL_1 = {"level": 1, "error_before": 1.0}
SICK = [  # changes to a healthy level, words in the finding, all of the remedy
    (COLLAPSED, "collapsed, not the codebook", "see whether target attention helps on this data at all"),
    (COLLAPSED | {"weight_decay": 0.1}, "collapsed, not the codebook",
     "lower config.optimizer.weight_decay, or see whether target attention helps on this data at all"),
    ({"distinct_latents": 40, "utilisation": 0.6}, "only 40 different latents for 64",
     "lower config.model.num_codewords"),
    ({"items": 50, "items_seen": 50, "distinct_latents": 50, "utilisation": 0.6},
     "the data have 50 items for 64 codewords", "lower config.model.num_codewords"),
    ({"items_seen": 4, "distinct_latents": 4, "utilisation": 0.06, "perplexity": 4.0, "dead": 60},
     "4 of 2000 items were looked at, too few to judge 64 codewords",
     "raise --requests, or take a --split that has more"),
    ({"items_seen": 1, "distinct_latents": 1, "utilisation": 1 / 64}, "1 of 2000 items were looked at",
     "raise --requests, or take a --split that has more"),
    (UNUSED | {"init": "random"}, "32 of 64 codewords",
     "set config.codebook.init=kmeans with config.codebook.start after a warm-up"),
    (UNUSED | {"revive_every": 0}, "none is revived", "set config.codebook.revive_every, to 20 say"),
    (UNUSED, "in spite of revival", "lower config.codebook.revive_every, or lower config.codebook.decay, or "
                                    "raise config.codebook.min_usage"),
    (UNUSED | {"dead_by": "age"}, "in spite of revival",
     "lower config.codebook.revive_every, or lower config.codebook.max_age"),
    (UNUSED | {"dead_by": "age", "revive_every": 1}, "in spite of revival", "lower config.codebook.max_age"),
    (UNEVEN, "20 would do the work of 64",
     "raise config.codebook.init_latents, or lower config.model.num_codewords"),
    (UNEVEN | {"init": "random"}, "20 would do the work of 64",
     "set config.codebook.init=kmeans, or lower config.model.num_codewords"),
    ({"quantization_error": 0.29}, "leaves 29.0% of the energy where 30.0% came in",
     "lower config.model.num_levels"),
    ({"quantization_error": 0.29, "learning": "gradient"}, "leaves 29.0% of the energy where 30.0% came in",
     "lower config.model.num_levels, or set config.codebook.learning=ema"),
    (LEVEL_1 | {"quantization_error": 0.97}, "leaves 97.0% of the energy: its",
     "raise config.model.num_codewords"),
    (LEVEL_1 | {"quantization_error": 0.97, "learning": "gradient"}, "leaves 97.0% of the energy: its",
     "set config.codebook.learning=ema, or raise config.model.num_codewords"),
    (LEVEL_1 | {"quantization_error": 1.2}, "adds error, it leaves 120.0%",
     "lower config.model.num_codewords, or train on more data"),
    ({"quantization_error": 0.36}, "adds error, it leaves 36.0% of the energy where 30.0%",
     "lower config.model.num_levels, or train on more data"),
    ({"quantization_error": 0.36, "learning": "gradient"}, "adds error", "set config.codebook.learning=ema"),
    ({"quantization_error": 0.36, "learning": "gradient", "assign": "cosine"}, "adds error",
     "set config.codebook.learning=ema, or set config.model.assign=nearest"),
]


def test_healthy_level():
    assert diagnose_level(HEALTHY) == [
        "Level 2 is healthy: 100% of 64 codewords in use, perplexity 60, 10.0% of the energy left."]


@pytest.mark.parametrize(("changed", "finding", "remedy"), SICK)
def test_each_rule(changed, finding, remedy):
    sentence, = diagnose_level(HEALTHY._replace(**changed))
    assert sentence.startswith(f"Level {changed.get('level', 2)}: ")
    assert finding in sentence and sentence.endswith(f" What helps: {remedy}.")


def test_every_rule_is_tested():
    held = {rule for changed, _, _ in SICK for rule in LEVEL_RULES if rule.holds(HEALTHY._replace(**changed))}
    assert held == set(LEVEL_RULES)


def test_no_rule_names_a_setting_in_force():
    """Of all rules that hold, for every combination of settings."""
    config = {"init": "codebook.init", "learning": "codebook.learning", "assign": "model.assign"}
    values = {"init": ("kmeans", "random"), "revive_every": (0, 1, 20), "learning": ("ema", "gradient"),
              "dead_by": ("count", "age"), "assign": ("nearest", "cosine", "balanced"),
              "weight_decay": (0.0, 0.1), "level": (1, 2)}
    for chosen in itertools.product(*values.values()):
        settings = dict(zip(values, chosen, strict=True))
        never = [f"config.{path}={settings[name]}" for name, path in config.items()]
        never += ["weight_decay"] if not settings["weight_decay"] else []
        never += ["min_usage", "codebook.decay"] if settings["dead_by"] == "age" else ["max_age"]
        never += ["lower config.codebook.revive_every"] if settings["revive_every"] <= 1 else []
        never += ["init_latents"] if settings["init"] == "random" else []
        for changed, *_ in SICK:
            measured = HEALTHY._replace(**changed | settings)
            for rule in filter(lambda rule, measured=measured: rule.holds(measured), LEVEL_RULES):
                remedy = rule.remedy(measured)
                assert remedy and not any(words in remedy for words in never), remedy


def test_defaults_are_those_of_a_run():
    config = default_config()
    assert DEFAULTS == {
        "init": config.codebook.init, "revive_every": config.codebook.revive_every,
        "learning": config.codebook.learning, "dead_by": config.codebook.dead, "assign": config.model.assign,
        "weight_decay": config.optimizer.weight_decay}


def test_attention():
    assert diagnose_attention(0.1, {"1 to 9": 0.1, "10 to 50": 0.12}, 1) == [
        "The attention output is 10.0% off that of full attention."]
    far = " ".join(diagnose_attention(0.4, {"1 to 9": 0.1, "10 to 50": 0.5}, 0))
    assert "config.model.order=1" in far and "from 10.0% to 50.0%" in far
    assert "config.model.num_codewords" in " ".join(diagnose_attention(0.4, {"all": math.nan}, 1))
