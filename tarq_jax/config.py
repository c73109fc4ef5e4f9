"""Every setting of a run with its default, and the check that a configuration has to pass.

A file in `configs/` starts from `default_config()` and changes what its experiment is about.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections

MODELS = ("two_tower", "two_tower_large", "target_attention", "tarq")
DECODED = ("query", "item")  # as `tarq_jax.models.tarq.Decoded`
REACHES = ("student", "backbone", "teacher")  # as `tarq_jax.models.tarq.Reach`
HEADS = ("scalar", "dot", "mlp")  # as `tarq_jax.models.tarq.Head`; flags are read before JAX is imported


def default_config() -> ml_collections.ConfigDict:
    """All settings at their defaults; unknown keys are refused by `validate`."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 1500
    config.batch_size = 64  # requests a step
    config.baselines = ()  # models trained before the main one on the same budget, for its table

    config.data = ml_collections.ConfigDict()
    config.data.name = "synthetic"  # key of tarq_jax.data.BUILDERS; its options follow as further keys
    config.data.data_dir = "runs/data"  # where prepared data sets are kept
    config.data.prepared = ""  # a prepared directory to read instead, where the source files are not at hand
    config.data.stream = False  # requests stay on disk, for data that memory does not hold
    config.data.buckets = ()  # lengths that histories of a training batch are padded to, beside the longest
    config.data.readers = 0  # threads that make batches; 0 leaves it to the one that prefetches

    config.model = ml_collections.ConfigDict()
    config.model.name = "tarq"
    config.model.width = 32
    config.model.num_heads = 2
    config.model.hidden = (64,)
    config.model.order = 1  # look-ups with a first-order correction; or 0, look-ups alone
    config.model.num_levels = 3
    config.model.num_codewords = 64
    config.model.head = "mlp"
    config.model.decoded = "query"  # what the decoder reconstructs; or "item"
    config.model.aligned_share = 0.25  # share of the requests of a batch that the alignment loss looks at
    config.model.assign = "nearest"  # of codes in training; or "cosine", or "balanced"
    config.model.pass_through = "straight_through"  # gradient through quantization; or "rotation"
    config.model.student_gradient = "student"  # how far it reaches; or "backbone", or "teacher"

    config.codebook = ml_collections.ConfigDict()
    config.codebook.init = "kmeans"  # or "random"
    config.codebook.start = 300  # step at which the codebook is initialised and put to use
    config.codebook.init_latents = 16384  # real latents that k-means runs on
    config.codebook.learning = "ema"  # or "gradient"
    config.codebook.decay = 0.99  # of the running statistics
    config.codebook.revive_every = 100  # steps; 0 never
    config.codebook.dead = "count"  # or "age"
    config.codebook.min_usage = 0.05  # by count: dead below this share of an even share
    config.codebook.max_age = 1000  # by age: dead once unused for more steps than this

    config.loss_weights = ml_collections.ConfigDict()
    config.loss_weights.student = 1.0
    config.loss_weights.teacher = 1.0
    config.loss_weights.distillation = 1.0
    config.loss_weights.output_reconstruction = 1.0
    config.loss_weights.alignment = 0.003  # a sum over levels and codewords: large beside the others
    config.loss_weights.commitment = 0.25
    config.loss_weights.codebook = 1.0
    config.loss_weights.reconstruction = 1.0

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 0
    config.optimizer.clip_norm = 0.0  # 0 does not clip

    config.log_every = 100
    config.eval_every = 0  # 0 evaluates once, at the end
    config.eval_batch_size = 128
    config.checkpoint_every = 500
    config.recall_k = 4  # recall@k of the student's order against the teacher's
    config.prefetch = 4  # batches made ahead
    return config.lock()


def smoke(config: ml_collections.ConfigDict, **data_options: Any) -> ml_collections.ConfigDict:
    """The same experiment in seconds: few steps, a small model, no claim about quality."""
    config.steps, config.batch_size, config.baselines = 12, 8, ()
    config.log_every, config.checkpoint_every, config.eval_batch_size = 4, 6, 32
    config.model.width, config.model.hidden, config.model.num_codewords = 8, (8,), 8
    config.codebook.start = min(config.codebook.start, 4)
    config.codebook.init_latents, config.codebook.revive_every = 256, 4
    with config.data.unlocked():
        config.data.update(data_options)
    return config


def data_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What `tarq_jax.data.load` takes of the settings in `config.data`: all but those of the run."""
    settings = ("name", "data_dir", "buckets", "readers")
    return {key: value for key, value in config.data.items() if key not in settings}


class Rule(NamedTuple):
    """What a setting may be."""

    holds: Callable[[Any], bool]
    expected: str


def _at_least(minimum: float) -> Rule:
    return Rule(lambda value: minimum <= value < math.inf, f"at least {minimum}")


def _one_of(*choices: str | int) -> Rule:
    return Rule(lambda value: value in choices, f"one of {choices}")


POSITIVE = Rule(lambda value: 0 < value < math.inf, "a positive number")
FRACTION = Rule(lambda value: 0 <= value < 1, "a number in [0, 1)")

RULES: Mapping[str, Rule] = {
    "seed": _at_least(0),
    "steps": _at_least(1),
    "batch_size": _at_least(1),
    "baselines": Rule(lambda value: all(name in MODELS for name in value), f"a tuple of {MODELS}"),
    "data.buckets": Rule(lambda value: all(isinstance(length, int) and length > 0 for length in value)
                         and list(value) == sorted(set(value)), "rising positive lengths"),
    "data.readers": _at_least(0),
    "model.name": _one_of(*MODELS),
    "model.width": _at_least(1),
    "model.num_heads": _at_least(1),
    "model.hidden": Rule(lambda value: all(isinstance(size, int) and size > 0 for size in value),
                         "positive widths"),
    "model.num_levels": _at_least(1),
    "model.num_codewords": _at_least(2),
    "model.order": _one_of(0, 1),
    "model.head": _one_of(*HEADS),
    "model.aligned_share": Rule(lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "model.decoded": _one_of(*DECODED),
    "model.assign": _one_of("nearest", "cosine", "balanced"),
    "model.pass_through": _one_of("straight_through", "rotation"),
    "model.student_gradient": _one_of(*REACHES),
    "codebook.init": _one_of("kmeans", "random"),
    "codebook.start": _at_least(0),
    "codebook.init_latents": _at_least(1),
    "codebook.learning": _one_of("gradient", "ema"),
    "codebook.decay": FRACTION,
    "codebook.revive_every": _at_least(0),
    "codebook.dead": _one_of("count", "age"),
    "codebook.min_usage": FRACTION,
    "codebook.max_age": _at_least(1),
    **{f"loss_weights.{name}": _at_least(0) for name in default_config().loss_weights},
    "optimizer.learning_rate": POSITIVE,
    "optimizer.weight_decay": _at_least(0),
    "optimizer.warmup_steps": _at_least(0),
    "optimizer.clip_norm": _at_least(0),
    "log_every": _at_least(1),
    "eval_every": _at_least(0),
    "eval_batch_size": _at_least(1),
    "checkpoint_every": _at_least(1),
    "recall_k": _at_least(1),
    "prefetch": _at_least(1),
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks keys, types and ranges against the defaults and `RULES`.

    Options of the data set are left to `tarq_jax.data.load`, which knows them.

    Raises:
      ValueError: names the first setting that is unknown, missing, of another type or out of range.
    """
    settings, defaults = _flatten(config), _flatten(default_config())
    for key, value in settings.items():
        if key in defaults:
            _check_type(key, value, defaults[key])
        elif not key.startswith("data."):
            raise ValueError(f"config.{key} is not a setting, expected one of {sorted(defaults)}")
    for key in defaults:
        if key not in settings:
            raise ValueError(f"config.{key} is missing, expected a {type(defaults[key]).__name__}")
    for key, rule in RULES.items():
        if not rule.holds(settings[key]):
            raise ValueError(f"config.{key} is {settings[key]!r}, expected {rule.expected}")
    if settings["model.width"] % settings["model.num_heads"]:
        raise ValueError(f"config.model.num_heads is {settings['model.num_heads']}, expected a divisor of "
                         f"config.model.width, {settings['model.width']}")
    if settings["model.order"] == 1 and settings["model.num_levels"] < 2:
        raise ValueError(f"config.model.num_levels is {settings['model.num_levels']}, expected at least 2 "
                         f"with config.model.order=1: levels 2 and up quantize what level 1 leaves over")
    if settings["codebook.init_latents"] < settings["model.num_codewords"]:
        raise ValueError(f"config.codebook.init_latents is {settings['codebook.init_latents']}, expected at "
                         f"least config.model.num_codewords, {settings['model.num_codewords']}")


def _check_type(key: str, value: Any, default: Any) -> None:
    accepted = {float: (int, float), tuple: (tuple, list)}.get(type(default), (type(default),))
    if not isinstance(value, accepted) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ValueError(f"config.{key} is {value!r}, expected a {type(default).__name__} like {default!r}")


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, Mapping | ml_collections.ConfigDict)
        flat |= _flatten(value, f"{name}.") if nested else {name: value}
    return flat
