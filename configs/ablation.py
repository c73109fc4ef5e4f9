"""What each part of TARQ contributes: variants of an experiment, each with one part removed or replaced.

    python -m tarq_jax.experiments.ablate --config=configs/ablation.py --workdir=runs/ablation

The mode names the experiment to vary, a file in `configs/`. For experiments other than `synthetic`, give the
paths of the data as for that experiment:

    python -m tarq_jax.experiments.ablate --config=configs/ablation.py:lastfm --workdir=runs/ablation_lastfm \
        --config.base.data.source=DIR/LastFM.txt --config.base.data.attributes=DIR/LastFM_item2attributes.json

Expected test AUC on the synthetic task: `order_0` 0.0028 below `tarq`, `two_tower` 0.061 below, `no_guidance`
0.0002 below. The alignment loss changes nothing in order 1, where EMA sets the codewords and latents have
no gradient. A variant with five seeds takes about 3 minutes on one CPU core.
`configs/ablation.py:synthetic,smoke` shrinks it.
"""

from typing import Any

import ml_collections

from configs import beauty, lastfm, movielens_100k, synthetic

BASES = {"synthetic": synthetic, "movielens_100k": movielens_100k, "lastfm": lastfm, "beauty": beauty}

MODELS = ("two_tower", "two_tower_large", "target_attention", "cold", "inttower", "linear_attention", "sdim",
          "eta", "din")

# How the codebook is maintained, for order 1, and for order 0, whose latents come from a trained encoder.
CODEBOOK: dict[str, dict[str, Any]] = {
    "random_codebook": {"codebook": {"init": "random"}},
    "no_revival": {"codebook": {"revive_every": 0}},
    "learned_by_gradient": {"codebook": {"learning": "gradient"}},
    "unprotected": {"codebook": {"init": "random", "revive_every": 0}, "loss_weights": {"alignment": 0.0}},
}
NO_GUIDANCE: dict[str, Any] = {"loss_weights": {"distillation": 0.0, "output_reconstruction": 0.0}}
ORDER_0: dict[str, Any] = {"model": {"order": 0}}

VARIANTS = {
    "tarq": {},
    # Look-ups.
    "order_0": ORDER_0,
    "head_scalar": {"model": {"head": "scalar"}},
    "head_dot": {"model": {"head": "dot"}},
    # Residual quantization: order 1 needs at least 2 levels, order 0 a single codebook.
    "levels_2": {"model": {"num_levels": 2}},
    "levels_4": {"model": {"num_levels": 4}},
    "order_0_levels_1": {"model": {"order": 0, "num_levels": 1}},
    "codewords_16": {"model": {"num_codewords": 16}},
    "codewords_256": {"model": {"num_codewords": 256}},
    # The teacher.
    "no_distillation": {"loss_weights": {"distillation": 0.0}},
    "no_output_reconstruction": {"loss_weights": {"output_reconstruction": 0.0}},
    "no_guidance": NO_GUIDANCE,
    "no_teacher": {"loss_weights": NO_GUIDANCE["loss_weights"] | {"teacher": 0.0},
                   "model": {"student_gradient": "teacher"}},
    "gradient_to_backbone": {"model": {"student_gradient": "backbone"}},
    "gradient_to_teacher": {"model": {"student_gradient": "teacher"}},
    "order_0_no_guidance": ORDER_0 | NO_GUIDANCE,
    # The codebook. There is no `no_alignment` for order 1: it would equal `tarq` bit for bit.
    **CODEBOOK,
    **{f"order_0_{name}": ORDER_0 | changes for name, changes in CODEBOOK.items()},
    "order_0_no_alignment": ORDER_0 | {"loss_weights": {"alignment": 0.0}},
    **{name: {"model": {"name": name}} for name in MODELS},
}


def get_config(mode: str = "") -> ml_collections.ConfigDict:
    """The study: an experiment, its variants, and the variant with which the others are compared.

    Args:
      mode: a key of `BASES`, "smoke" for the short form, or both with a comma between.

    Raises:
      ValueError: another mode.
    """
    words = [word for word in mode.split(",") if word]
    name, *rest = [word for word in words if word != "smoke"] or ["synthetic"]
    if rest or name not in BASES:
        raise ValueError(f"mode is {mode!r}, expected one of {sorted(BASES)}, 'smoke', or both")
    base = BASES[name].get_config("smoke" if "smoke" in words else "")
    base.baselines = ()
    base.eval_every = base.steps // 5
    study = ml_collections.ConfigDict({"base": base, "reference": "tarq"})
    study.variants = ml_collections.ConfigDict(VARIANTS)
    return study.lock()
