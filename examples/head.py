"""A cross network as the student's head (DCN-v2, Wang et al. 2020, arXiv 2008.13535).

    python -m examples.head

Overrides `student_logits` of TARQ, of type (backbone, attended [B, G, L, D], chosen [B, G, L, D]) -> [B, G].
The class is of order 1; a subclass of `Tarq`, of order 0, would have the same code.
"""

from flax import linen as nn

from examples import small
from tarq_jax.models import FirstOrderTarq
from tarq_jax.models.target_attention import interaction_features
from tarq_jax.training.modules import as_served, common, of_tarq
from tarq_jax.training.objectives import tarq


class CrossTarq(FirstOrderTarq):
    """`x_{i+1} = x_0 * (W_i x_i + b_i) + x_i` on `x_0 = [o, x_item, o * x_item, v_user * v_item]`."""

    num_crosses: int = 2

    def setup(self):
        """Creates the parts; the parts that they replace are never called, and so have no parameters."""
        super().setup()
        self.crosses = [nn.Dense(4 * self.width) for _ in range(self.num_crosses)]
        self.cross_output = nn.Dense(1)

    def student_logits(self, backbone, attended, chosen):
        """The backbone's logits plus the output of the cross layers."""
        first = crossed = interaction_features(attended.sum(axis=-2), backbone)
        for cross in self.crosses:
            crossed = first * cross(crossed) + crossed
        return backbone.logits + self.cross_output(crossed)[..., 0]


def cross(model, loss_weights, schema, tables, axis_name):
    """TARQ with this head."""
    module = CrossTarq(**common(model, schema, tables), **of_tarq(model))
    return tarq(module, loss_weights, as_served(module, model), axis_name)


def compare(config, dataset):
    """A row per head: the student trained with it."""
    return small.table(config, dataset, ("tarq", "examples.head:cross"))


if __name__ == "__main__":
    small.run(compare)
