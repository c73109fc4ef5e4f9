"""The two-tower backbone compared with its NumPy copy."""

import numpy as np
import pytest
import reference
import workloads


@pytest.mark.parametrize("name", ["two_tower", "two_tower_large"])
def test_equals_reference(name):
    model, batch = workloads.compiled(name), workloads.make_batch()
    output = model(batch)
    expected = reference.two_tower(model.params["params"], workloads.SCHEMA, batch, workloads.WIDTH)
    for field, values in zip(("logits", "user", "item", "candidates", "history"), expected, strict=True):
        np.testing.assert_allclose(getattr(output, field), values, rtol=1e-3, atol=1e-4, err_msg=field)


def test_a_second_encoder_adds_parameters():
    small, large = (workloads.compiled(name).params["params"] for name in ("two_tower", "two_tower_large"))
    assert set(large) - set(small) == {"history_encoder_1", "history_attention_1"}
