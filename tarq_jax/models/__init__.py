"""Models, as flax.linen modules whose parameters are pytrees."""

from tarq_jax.models.first_order import FirstOrderTarq
from tarq_jax.models.layers import Compute
from tarq_jax.models.target_attention import TargetAttention, TargetAttentionOutput
from tarq_jax.models.tarq import Tarq, TarqOutput
from tarq_jax.models.two_tower import TwoTower, TwoTowerOutput

__all__ = [
    "Compute", "FirstOrderTarq", "TargetAttention", "TargetAttentionOutput", "Tarq", "TarqOutput",
    "TwoTower", "TwoTowerOutput",
]
