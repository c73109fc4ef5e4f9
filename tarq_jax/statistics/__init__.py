"""Statistics of offline comparisons and A/B tests: intervals, paired tests, power. NumPy and SciPy, no JAX.

The units are users: their candidates and impressions depend on each other.
"""

from tarq_jax.statistics.auc import AucInfluence, auc_difference, auc_estimate, auc_influence
from tarq_jax.statistics.estimates import Estimate, wald
from tarq_jax.statistics.multiplicity import adjust
from tarq_jax.statistics.power import minimum_detectable_effect, power_of, users_needed
from tarq_jax.statistics.ratio import Arms, Ratio, cuped, lift, ratio
from tarq_jax.statistics.resampling import bootstrap, paired_permutation
from tarq_jax.statistics.variance import Components, SeededEstimate, over_seeds_and_data

__all__ = [
    "Arms",
    "AucInfluence",
    "Components",
    "Estimate",
    "Ratio",
    "SeededEstimate",
    "adjust",
    "auc_difference",
    "auc_estimate",
    "auc_influence",
    "bootstrap",
    "cuped",
    "lift",
    "minimum_detectable_effect",
    "over_seeds_and_data",
    "paired_permutation",
    "power_of",
    "ratio",
    "users_needed",
    "wald",
]
