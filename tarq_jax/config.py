"""Every setting of a run with its default, and the checks that a configuration has to pass.

A file in `configs/` starts from `default_config()` and changes the settings that its experiment is about.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_collections

from tarq_jax import user_code

COMPARED = ("two_tower", "two_tower_large", "target_attention", "tarq")  # trained in a comparison by default
MODELS = (*COMPARED, "cold", "inttower", "linear_attention", "sdim", "eta", "sim", "din")
DECODED = ("query", "item")  # the same as `tarq_jax.models.tarq.Decoded`
REACHES = ("student", "backbone", "teacher")  # the same as `tarq_jax.models.tarq.Reach`
WITH_CODEBOOK = frozenset({"tarq"})
BEST = {"auc": 1.0, "gauc": 1.0, "log_loss": -1.0}  # metrics that can select the best checkpoint, with sign
DATA_PATHS = ("data_dir", "prepared", "source", "attributes")  # keys of `config.data`: paths to the data
# Settings that do not change what is trained: where and how data are read, what is measured and saved.
WITHOUT_EFFECT = ("baselines", "log_every", "eval_every", "eval_batch_size", "checkpoint_every",
                  "checkpoints_kept", "recall_k", "save_scores", "prefetch", "data.readers",
                  *(f"data.{key}" for key in DATA_PATHS))
MESH_AXES = ("data", "model")  # the names that `tarq_jax.training.sharding` uses
NUM_SEEDS = 2 ** 32  # `jax.random.key` has only these; it maps any other number to one of them
HEADS = ("scalar", "dot", "mlp")  # copy of `tarq_jax.models.tarq.Head`: flags are read before JAX is imported


def default_config() -> ml_collections.ConfigDict:
    """All settings at their defaults; `validate` refuses unknown keys.

    Only `config.data` takes further keys: the options of the data set, which `tarq_jax.data.load` checks.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 1500
    config.batch_size = 64  # requests per step
    config.accumulate = 1  # micro-batches per step, computed one after the other to save memory
    config.baselines = ()  # models trained first, on the same budget, for comparison in the results

    config.parallel = "mesh"  # how a step uses several devices: "mesh" (jit over a mesh) or "pmap"

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = 0  # devices along the axis `data`; 0: all that the axis `model` leaves
    config.mesh.model = 1  # devices along the axis `model`
    # How parameters are split. Each rule is a pair: a regular expression, searched in the parameter's path,
    # and for each axis of the array a mesh axis, a tuple of mesh axes, or None. The first rule that matches
    # applies; parameters without a rule are copied to all devices. (("embedding$", ("model",)),) splits the
    # rows of all tables over `model`; (("item_id/embedding$", (("data", "model"),)),) splits the rows of one
    # table over all devices.
    config.mesh.rules = ()

    config.data = ml_collections.ConfigDict()
    # A key of tarq_jax.data.BUILDERS, or your own MODULE:FUNCTION; options of the data set are further keys.
    config.data.name = "synthetic"
    config.data.data_dir = "runs/data"  # where prepared data sets are kept
    config.data.prepared = ""  # a prepared directory to read instead, when the source files are not available
    config.data.stream = False  # leave requests on disk, for data larger than memory
    config.data.buckets = ()  # lengths to pad the histories of a training batch to, besides the longest
    config.data.window = 32  # blocks of requests that are shuffled together; memory holds two such windows
    config.data.readers = 0  # threads that make batches; 0: the prefetching thread makes them itself

    config.model = ml_collections.ConfigDict()
    config.model.name = "tarq"  # one of `MODELS`, or MODULE:FUNCTION of your own
    config.model.width = 32
    config.model.num_heads = 2
    config.model.hidden = (64,)
    config.model.order = 1  # 1: look-ups with a first-order correction; 0: look-ups alone
    config.model.num_levels = 3
    config.model.num_codewords = 64
    config.model.head = "mlp"
    config.model.decoded = "query"  # what the decoder reconstructs: "query" or "item"
    config.model.aligned_share = 0.25  # share of the requests of a batch that the alignment loss uses
    config.model.assign = "nearest"  # how training assigns codes: "nearest", "cosine" or "balanced"
    config.model.pass_through = "straight_through"  # gradient estimator of quantization; or "rotation"
    config.model.student_gradient = "student"  # reach of the student's gradient; or "backbone", or "teacher"
    config.model.num_vectors = 4  # inttower: vectors per item, and per layer of the user tower
    config.model.hash_rounds = 16  # sdim: signatures per item; eta joins their bits into one signature
    config.model.hash_bits = 3  # sdim and eta: bits per signature
    config.model.num_selected = 16  # eta and sim: history positions that a candidate attends to
    config.model.category = ""  # sim: categorical item field that selected positions share with the candidate
    config.model.dtype = "float32"  # type of activations; or "bfloat16". Parameters and losses stay float32
    config.model.remat = False  # recompute history encoders and attention in the backward pass
    config.model.attention_block = 0  # history positions per block of attention, e.g. 256; 0: all in one
    config.model.table_multiple = 1  # rows of tables are a multiple of this and of their devices

    config.codebook = ml_collections.ConfigDict()
    config.codebook.init = "kmeans"  # or "random"
    config.codebook.start = 300  # step at which the codebook is initialised and from which it is used
    config.codebook.init_latents = 16384  # number of real latents that k-means runs on
    config.codebook.learning = "ema"  # or "gradient"
    config.codebook.decay = 0.95  # decay of running statistics; nearer to 1, dead codewords are found later
    config.codebook.revive_every = 20  # steps between revivals; 0: never
    config.codebook.dead = "count"  # how dead codewords are found; or "age"
    config.codebook.min_usage = 0.1  # with "count": dead if used less than this fraction of an even share
    config.codebook.max_age = 1000  # with "age": dead if unused for more than this number of steps

    config.loss_weights = ml_collections.ConfigDict()
    config.loss_weights.student = 1.0
    config.loss_weights.teacher = 1.0
    config.loss_weights.distillation = 1.0
    config.loss_weights.output_reconstruction = 1.0
    config.loss_weights.alignment = 0.003  # small: the loss is a sum over levels and codewords
    config.loss_weights.commitment = 0.25
    config.loss_weights.codebook = 1.0
    config.loss_weights.reconstruction = 1.0

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = 2e-3
    config.optimizer.table = "adamw"  # optimizer of embedding tables; or "rowwise_adagrad", or "lazy_adam"
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 0
    config.optimizer.clip_norm = 0.0  # 0: no clipping
    config.optimizer.max_gradient_norm = 0.0  # a run stops if the norm is larger; 0: no limit

    config.log_every = 100
    config.eval_every = 0  # steps between evaluations on the validation split; 0: none, only the final test
    config.eval_batch_size = 128
    config.checkpoint_every = 500
    config.checkpoints_kept = 2  # how many of the newest checkpoints are kept
    config.best_metric = ""  # "auc", "gauc" or "log_loss": test the best validated step; "": the last step
    config.recall_k = 4  # k of recall@k: the student's ranking against the teacher's
    config.save_scores = False  # save the score of every test candidate, for statistics over runs
    config.prefetch = 4  # batches prepared in advance
    config.lock()
    config.data.unlock()
    return config


def smoke(config: ml_collections.ConfigDict, **data_options: Any) -> ml_collections.ConfigDict:
    """The same experiment in seconds: few steps and a small model; its quality means nothing."""
    config.steps, config.batch_size, config.baselines = 12, 8, ()
    config.log_every, config.checkpoint_every, config.eval_batch_size = 4, 6, 32
    config.model.width, config.model.hidden, config.model.num_codewords = 8, (8,), 8
    config.codebook.start = min(config.codebook.start, 4)
    config.codebook.init_latents, config.codebook.revive_every = 256, 4
    with config.data.unlocked():
        config.data.update(data_options)
    return config


def is_smoke(mode: str) -> bool:
    """Whether the mode of a configuration (the text after `:` in `--config`) asks for `smoke`.

    Raises:
      ValueError: the mode is neither empty nor `smoke`.
    """
    if mode not in ("", "smoke"):
        raise ValueError(f"mode is {mode!r}, expected 'smoke' or none")
    return mode == "smoke"


def data_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The settings in `config.data` that `tarq_jax.data.load` takes besides the name and `data_dir`."""
    settings = ("name", "data_dir", "buckets", "window", "readers")
    return {key: value for key, value in config.data.items() if key not in settings}


class Rule(NamedTuple):
    """The values that a setting may have."""

    holds: Callable[[Any], bool]
    expected: str


def _at_least(minimum: float) -> Rule:
    return Rule(lambda value: minimum <= value < 2**31, f"at least {minimum} and below 2**31")


def _one_of(*choices: str | int) -> Rule:
    return Rule(lambda value: value in choices, f"one of {choices}")


def is_model(name: Any) -> bool:
    """Whether `name` is a model of the library, or MODULE:FUNCTION of a module that Python finds."""
    return name in MODELS or (isinstance(name, str) and user_code.is_there(name))


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
    "data.window": _at_least(1),
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
    "model.table_multiple": _at_least(1),
    "model.num_vectors": _at_least(1),
    "model.hash_rounds": _at_least(1),
    "model.hash_bits": Rule(lambda value: 1 <= value <= 12, "from 1 to 12: a round has 2^bits buckets"),
    "model.num_selected": _at_least(1),
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.remat": Rule(lambda value: isinstance(value, bool), "a bool like False"),
    "model.attention_block": _at_least(0),
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

# With pmap each device sees only its own part of a batch, so settings that need a mesh are refused.
RULES_OF_PMAP: Mapping[str, Rule] = {
    "mesh.model": _one_of(1),
    "mesh.rules": Rule(lambda value: not value, "no rules"),
    "model.assign": _one_of("nearest", "cosine"),
}


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks keys, types and ranges against the defaults and `RULES`.

    Options of the data set are not checked here but by `tarq_jax.data.load`, which knows them.

    Raises:
      ValueError: a setting is unknown, missing, of the wrong type or out of range; names the first one.
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
    """Raises ValueError if settings contradict each other for a model with a codebook."""
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
    """A hash of the source file of each MODULE:FUNCTION in the settings; what it imports is not hashed."""
    return {name: user_code.source_of(name) for name in (config.model.name, config.data.name) if ":" in name}


def variants_of(study: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
    """The configurations of a study by name: for each of its `variants`, `base` with the variant's changes.

    `reference`, the variant that all others are compared with, comes first.

    Raises:
      ValueError: a key of the study is missing or unknown, or a variant has an invalid setting; names it.
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
    found = {study.reference: study.base}  # inserted first, because a ConfigDict sorts its keys
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


def shared_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The settings that all processes of a run share, by path: all but the paths of their data."""
    settings = flatten(json.loads(config.to_json()))
    return {name: value for name, value in settings.items() if name.removeprefix("data.") not in DATA_PATHS}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their path, such as `model.width`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, Mapping | ml_collections.ConfigDict)
        flat |= flatten(value, f"{name}.") if nested else {name: value}
    return flat
