"""Every setting of a run with its default, and the check that a configuration has to pass.

A file in `configs/` starts from `default_config()` and changes what its experiment is about.
"""

import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections

from tarq_jax import own

COMPARED = ("two_tower", "two_tower_large", "target_attention", "tarq")  # what a comparison trains by default
MODELS = (*COMPARED, "cold", "inttower", "linear_attention", "sdim", "eta", "sim", "din")
DECODED = ("query", "item")  # as `tarq_jax.models.tarq.Decoded`
REACHES = ("student", "backbone", "teacher")  # as `tarq_jax.models.tarq.Reach`
WITH_CODEBOOK = frozenset({"tarq"})
BEST = {"auc": 1.0, "gauc": 1.0, "log_loss": -1.0}  # metrics that checkpoints are chosen by, and their sign
WHERE_DATA_LIE = ("data_dir", "prepared", "source", "attributes")  # keys of `config.data` that say it
MESH_AXES = ("data", "model")  # as `tarq_jax.training.sharding` names them
NUM_SEEDS = 2 ** 32  # `jax.random.key` has no more, and takes others for one of them
HEADS = ("scalar", "dot", "mlp")  # as `tarq_jax.models.tarq.Head`; flags are read before JAX is imported


def default_config() -> ml_collections.ConfigDict:
    """All settings at their defaults; unknown keys are refused by `validate`."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 1500
    config.batch_size = 64  # requests a step
    config.accumulate = 1  # micro-batches that a step goes through one after the other, in less memory
    config.baselines = ()  # models trained before the main one on the same budget, for its table

    config.parallel = "mesh"  # how a step uses many devices: jit over a mesh; or "pmap"

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 0  # devices along the axis `data`; 0 takes all that are left
    config.mesh.model = 1  # devices along the axis `model`
    # How parameters are split: pairs of a pattern (of a part of the parameter's path) and, for each axis of
    # the array, a mesh axis, several, or None; the first that matches holds, other parameters are copied to
    # all devices. (("embedding$", ("model",)),) splits the rows of all tables over `model`,
    # (("item_id/embedding$", (("data", "model"),)),) those of one over all devices.
    config.mesh.rules = ()

    config.data = ml_collections.ConfigDict()
    # A key of tarq_jax.data.BUILDERS, or MODULE:FUNCTION of your own; its options follow as further keys.
    config.data.name = "synthetic"
    config.data.data_dir = "runs/data"  # where prepared data sets are kept
    config.data.prepared = ""  # a prepared directory to read instead, where the source files are not at hand
    config.data.stream = False  # requests stay on disk, for data that memory does not hold
    config.data.buckets = ()  # lengths that histories of a training batch are padded to, beside the longest
    config.data.readers = 0  # threads that make batches; 0 leaves it to the one that prefetches

    config.model = ml_collections.ConfigDict()
    config.model.name = "tarq"  # one of `MODELS`, or MODULE:FUNCTION of your own
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
    config.model.num_vectors = 4  # of inttower: vectors of an item, and of every layer of the user tower
    config.model.hash_rounds = 16  # of sdim: signatures of an item; eta takes their bits together
    config.model.hash_bits = 3  # of sdim and eta: of a signature
    config.model.num_selected = 16  # of eta and sim: positions of the history that a candidate attends to
    config.model.category = ""  # of sim: a categorical field of items, which selected positions share
    config.model.dtype = "float32"  # of activations; or "bfloat16"; parameters and losses stay float32
    config.model.remat = False  # recompute history encoders and attention in the backward pass
    config.model.attention_block = 0  # positions that attention looks at together, e.g. 256; 0 for all
    config.model.table_multiple = 1  # rows of embedding tables are rounded up to a multiple of it

    config.codebook = ml_collections.ConfigDict()
    config.codebook.init = "kmeans"  # or "random"
    config.codebook.start = 300  # step at which the codebook is initialised and put to use
    config.codebook.init_latents = 16384  # real latents that k-means runs on
    config.codebook.learning = "ema"  # or "gradient"
    config.codebook.decay = 0.95  # of the running statistics; the nearer to 1, the later the dead are found
    config.codebook.revive_every = 20  # steps; 0 never
    config.codebook.dead = "count"  # or "age"
    config.codebook.min_usage = 0.1  # by count: dead below this share of an even share
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
    config.optimizer.table = "adamw"  # of embedding tables; or "rowwise_adagrad", or "lazy_adam"
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 0
    config.optimizer.clip_norm = 0.0  # 0 does not clip
    config.optimizer.max_gradient_norm = 0.0  # a run stops where the gradient is longer; 0 for no limit

    config.log_every = 100
    config.eval_every = 0  # 0 evaluates once, at the end
    config.eval_batch_size = 128
    config.checkpoint_every = 500
    config.checkpoints_kept = 2  # the newest
    config.best_metric = ""  # of the validation split: "auc", "gauc" or "log_loss" keeps and tests the best
    config.recall_k = 4  # recall@k of the student's order against the teacher's
    config.save_scores = False  # keep the score of every test candidate, for statistics over runs
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


def is_smoke(mode: str) -> bool:
    """Whether the mode of a configuration, what follows `:` in `--config`, asks for `smoke`.

    Raises:
      ValueError: it is another one.
    """
    if mode not in ("", "smoke"):
        raise ValueError(f"mode is {mode!r}, expected 'smoke' or none")
    return mode == "smoke"


def data_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What `tarq_jax.data.load` takes of the settings in `config.data`: all but those of the run."""
    settings = ("name", "data_dir", "buckets", "readers")
    return {key: value for key, value in config.data.items() if key not in settings}


class Rule(NamedTuple):
    """What a setting may be."""

    holds: Callable[[Any], bool]
    expected: str


def _at_least(minimum: float) -> Rule:
    return Rule(lambda value: minimum <= value < 2**31, f"at least {minimum} and below 2**31")


def _one_of(*choices: str | int) -> Rule:
    return Rule(lambda value: value in choices, f"one of {choices}")


def is_model(name: Any) -> bool:
    """Whether it is a model of the library, or MODULE:FUNCTION of a module that Python finds."""
    return name in MODELS or (isinstance(name, str) and own.is_there(name))


MODEL_NAME = (f"one of {MODELS}, or MODULE:FUNCTION of a module that Python finds, for a model of your own "
              "(tarq_jax.training.objectives.MakeObjective)")
POSITIVE = Rule(lambda value: 0 < value < math.inf, "a positive number")
FRACTION = Rule(lambda value: 0 <= value < 1, "a number in [0, 1)")


def _is_sharding_table(table: Any) -> bool:
    """Whether every entry is a pair of a regular expression and a specification over `MESH_AXES`."""
    try:
        for pattern, spec in table:
            re.compile(pattern)
            named = [axis for entry in spec if entry is not None
                     for axis in ((entry,) if isinstance(entry, str) else entry)]
            if isinstance(spec, str) or not set(named) <= set(MESH_AXES) or len(set(named)) < len(named):
                return False
    except (TypeError, ValueError, re.error):
        return False
    return True


RULES: Mapping[str, Rule] = {
    "seed": Rule(lambda value: 0 <= value < NUM_SEEDS, "a number in [0, 2**32)"),
    "steps": _at_least(1),
    "batch_size": _at_least(1),
    "accumulate": _at_least(1),
    "baselines": Rule(lambda value: all(map(is_model, value)) and len(set(value)) == len(value),
                      f"a tuple of different ones, each {MODEL_NAME}"),
    "data.buckets": Rule(lambda value: all(isinstance(length, int) and length > 0 for length in value)
                         and list(value) == sorted(set(value)), "rising positive lengths"),
    "data.readers": _at_least(0),
    "parallel": _one_of("mesh", "pmap"),
    "mesh.data": _at_least(0),
    "mesh.model": _at_least(1),
    "mesh.rules": Rule(_is_sharding_table, "pairs of a regular expression and a tuple of mesh axes, each of "
                                           f"{MESH_AXES} at most once, such as ('embedding$', ('model',))"),
    "model.name": Rule(is_model, MODEL_NAME),
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
    "model.num_vectors": _at_least(1),
    "model.hash_rounds": _at_least(1),
    "model.hash_bits": Rule(lambda value: 1 <= value <= 12, "from 1 to 12: a round has 2^bits buckets"),
    "model.num_selected": _at_least(1),
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.remat": Rule(lambda value: isinstance(value, bool), "a bool like False"),
    "model.attention_block": _at_least(0),
    "model.table_multiple": _at_least(1),
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
    "optimizer.table": _one_of("adamw", "rowwise_adagrad", "lazy_adam"),
    "optimizer.weight_decay": _at_least(0),
    "optimizer.warmup_steps": _at_least(0),
    "optimizer.clip_norm": _at_least(0),
    "optimizer.max_gradient_norm": _at_least(0),
    "log_every": _at_least(1),
    "eval_every": _at_least(0),
    "eval_batch_size": _at_least(1),
    "checkpoint_every": _at_least(1),
    "checkpoints_kept": _at_least(1),
    "best_metric": _one_of("", *BEST),
    "recall_k": _at_least(1),
    "save_scores": Rule(lambda value: isinstance(value, bool), "a bool like False"),
    "prefetch": _at_least(1),
}

# What needs a mesh is refused where each device sees no more than its own part of a batch.
RULES_OF_PMAP: Mapping[str, Rule] = {
    "mesh.model": _one_of(1),
    "mesh.rules": Rule(lambda value: not value, "no rules"),
    "model.assign": _one_of("nearest", "cosine"),
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks keys, types and ranges against the defaults and `RULES`.

    Options of the data set are left to `tarq_jax.data.load`, which knows them.

    Raises:
      ValueError: names the first setting that is unknown, missing, of another type or out of range.
    """
    settings, defaults = flatten(config), flatten(default_config())
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
    for key, rule in RULES_OF_PMAP.items() if settings["parallel"] == "pmap" else ():
        if not rule.holds(settings[key]):
            raise ValueError(f"config.{key} is {settings[key]!r}, expected {rule.expected} "
                             "with config.parallel='pmap'")
    if settings["model.width"] % settings["model.num_heads"]:
        raise ValueError(f"config.model.num_heads is {settings['model.num_heads']}, expected a divisor of "
                         f"config.model.width, {settings['model.width']}")
    if settings["batch_size"] % settings["accumulate"]:
        raise ValueError(f"config.accumulate is {settings['accumulate']}, expected a divisor of "
                         f"config.batch_size, {settings['batch_size']}")
    if settings["model.order"] == 1 and settings["model.num_levels"] < 2:
        raise ValueError(f"config.model.num_levels is {settings['model.num_levels']}, expected at least 2 "
                         f"with config.model.order=1: levels 2 and up quantize what level 1 leaves over")
    if settings["best_metric"] and not settings["eval_every"]:
        raise ValueError(f"config.eval_every is 0, expected at least 1 with config.best_metric="
                         f"{settings['best_metric']!r}: the best checkpoint is one of those evaluated")
    if settings["best_metric"] and settings["eval_every"] > settings["steps"]:
        raise ValueError(f"config.eval_every is {settings['eval_every']}, expected at most config.steps, "
                         f"{settings['steps']}, with config.best_metric={settings['best_metric']!r}")
    if settings["codebook.init_latents"] < settings["model.num_codewords"]:
        raise ValueError(f"config.codebook.init_latents is {settings['codebook.init_latents']}, expected at "
                         f"least config.model.num_codewords, {settings['model.num_codewords']}")
    if not WITH_CODEBOOK.isdisjoint((settings["model.name"], *settings["baselines"])):
        check_codebook(config)


def check_codebook(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError unless settings go together where a model with a codebook is trained."""
    settings = flatten(config)
    if settings["codebook.start"] >= settings["steps"]:
        raise ValueError(f"config.codebook.start is {settings['codebook.start']}, expected less than "
                         f"config.steps, {settings['steps']}: no student is trained before it")
    if settings["accumulate"] == 1:
        return
    if settings["model.assign"] == "balanced":
        raise ValueError(f"config.accumulate is {settings['accumulate']}, expected 1 with "
                         "config.model.assign='balanced': codes would be balanced within each micro-batch")
    aligned = settings["model.aligned_share"] * settings["batch_size"] / settings["accumulate"]
    if round(aligned) < 1 or not math.isclose(aligned, round(aligned), rel_tol=1e-6):
        raise ValueError(f"config.model.aligned_share is {settings['model.aligned_share']}, expected "
                         "one that gives whole requests of each micro-batch of config.batch_size / "
                         f"config.accumulate, {settings['batch_size'] // settings['accumulate']}")


def own_code(config: ml_collections.ConfigDict) -> dict[str, str]:
    """A hash of the file of each MODULE:FUNCTION that it names; what that imports is not told."""
    return {name: own.source_of(name) for name in (config.model.name, config.data.name) if ":" in name}


def variants_of(study: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The configurations of a study, by name: its `base`, with what each of its `variants` changes.

    The variant that others are compared with, `reference`, comes first.

    Raises:
      ValueError: names what is missing or unknown, or the variant and its setting that does not hold.
    """
    expected = {"base", "variants", "reference"}
    if set(study.keys()) != expected:
        raise ValueError(f"the study has {sorted(study.keys())}, expected {sorted(expected)}")
    if study.reference not in study.variants:
        raise ValueError(f"config.reference is {study.reference!r}, expected one of config.variants, "
                         f"{sorted(study.variants.keys())}")
    try:
        validate(study.base)
    except ValueError as error:
        raise ValueError(f"config.base: {error}") from error
    for name in study.variants.keys():
        if not re.fullmatch(r"\w[\w.+=-]*", name):
            raise ValueError(f"config.variants has {name!r}, expected letters, digits and '_.+=-'")
    found = {study.reference: study.base}  # first, as a ConfigDict sorts its keys
    for name, changes in study.variants.items():
        found[name] = copy.deepcopy(study.base)
        try:
            found[name].update(changes)
            validate(found[name])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"config.variants.{name}: {error.args[0]}") from error
    return found


def _check_type(key: str, value: Any, default: Any) -> None:
    accepted = {float: (int, float), tuple: (tuple, list)}.get(type(default), (type(default),))
    if not isinstance(value, accepted) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise ValueError(f"config.{key} is {value!r}, expected a {type(default).__name__} like {default!r}")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their path, such as `model.width`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, Mapping | ml_collections.ConfigDict)
        flat |= flatten(value, f"{name}.") if nested else {name: value}
    return flat
