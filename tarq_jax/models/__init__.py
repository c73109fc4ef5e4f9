"""Models, as flax.linen modules whose parameters are pytrees."""

from tarq_jax.models.approximate_attention import Din, HardSearch, LinearAttention, Sdim
from tarq_jax.models.cold import Cold
from tarq_jax.models.first_order import FirstOrderTarq
from tarq_jax.models.inttower import IntTower
from tarq_jax.models.layers import Compute
from tarq_jax.models.target_attention import TargetAttention, TargetAttentionOutput
from tarq_jax.models.tarq import Tarq, TarqOutput
from tarq_jax.models.two_tower import InteractionOutput, TwoTower, TwoTowerOutput

__all__ = [
    "Cold", "Compute", "Din", "FirstOrderTarq", "HardSearch", "IntTower", "InteractionOutput",
    "LinearAttention", "Sdim", "TargetAttention", "TargetAttentionOutput", "Tarq", "TarqOutput", "TwoTower",
    "TwoTowerOutput",
]
