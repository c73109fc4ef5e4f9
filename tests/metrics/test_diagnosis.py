"""What the health report writes about a level: every rule is tested, and a healthy level gives no finding."""

import math

import pytest

from tarq_jax.metrics.diagnosis import LEVEL_RULES, Level, diagnose_attention, diagnose_level

HEALTHY = Level(level=2, size=64, utilisation=1.0, perplexity=60.0, dead=0, quantization_error=0.1,
                error_before=0.3, distinct_items=900, init="kmeans", revive_every=100)
SICK = [  # changes to a healthy level, words in the finding, a setting that helps
    ({"distinct_items": 1, "utilisation": 1 / 64}, "collapsed, not the codebook", "weight_decay"),
    ({"distinct_items": 40, "utilisation": 0.6}, "only 40 different latents for 64", "num_codewords"),
    ({"init": "random", "utilisation": 0.5, "dead": 32}, "32 of 64 codewords", "codebook.init=kmeans"),
    ({"revive_every": 0, "utilisation": 0.5, "dead": 32}, "none is revived", "codebook.revive_every"),
    ({"utilisation": 0.5, "dead": 32}, "in spite of revival", "codebook.min_usage"),
    ({"perplexity": 20.0}, "20 would do the work of 64", "init_latents"),
    ({"quantization_error": 0.29}, "leaves 29.0% of the energy where 30.0% came in", "num_levels"),
    ({"level": 1, "quantization_error": 0.97, "error_before": 1.0}, "leaves 97.0% of the energy: its", "ema"),
    ({"level": 1, "quantization_error": 1.2, "error_before": 1.0}, "adds error, it leaves 120.0%", "assign"),
    ({"quantization_error": 0.36}, "adds error, it leaves 36.0% of the energy where 30.0%", "assign"),
]


def test_healthy_level():
    assert diagnose_level(HEALTHY) == [
        "Level 2 is healthy: 100% of 64 codewords in use, perplexity 60, 10.0% of the energy left."]


@pytest.mark.parametrize(("changed", "finding", "remedy"), SICK)
def test_each_rule(changed, finding, remedy):
    sentence, = diagnose_level(HEALTHY._replace(**changed))
    assert sentence.startswith(f"Level {changed.get('level', 2)}: ")
    assert finding in sentence and remedy in sentence


def test_every_rule_is_tested():
    held = {rule for changed, _, _ in SICK for rule in LEVEL_RULES if rule.holds(HEALTHY._replace(**changed))}
    assert held == set(LEVEL_RULES)


def test_attention():
    assert diagnose_attention(0.1, {"1 to 9": 0.1, "10 to 50": 0.12}, 1) == [
        "The attention output is 10.0% off that of full attention."]
    far = " ".join(diagnose_attention(0.4, {"1 to 9": 0.1, "10 to 50": 0.5}, 0))
    assert "config.model.order=1" in far and "from 10.0% to 50.0%" in far
    assert "config.model.num_codewords" in " ".join(diagnose_attention(0.4, {"all": math.nan}, 1))
