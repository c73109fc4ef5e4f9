"""Target attention compared with its NumPy copy."""

import numpy as np
import reference
import workloads

B, G, N = workloads.REQUESTS, workloads.CANDIDATES, workloads.POSITIONS
D, H, E = workloads.WIDTH, workloads.HEADS, workloads.WIDTH // workloads.HEADS


def test_equals_reference():
    model, batch = workloads.compiled("target_attention"), workloads.make_batch()
    output = model(batch)
    expected = reference.target_attention(model.params["params"], workloads.SCHEMA, batch, D)
    for field, values in zip(("logits", "attention_output", "history"), expected, strict=True):
        np.testing.assert_allclose(getattr(output, field), values, rtol=1e-3, atol=1e-4, err_msg=field)


def test_queries_keys_and_values_are_those_of_the_attention_output():
    """They reproduce the attention output, which conversion relies on: no projection is applied twice."""
    model, batch = workloads.compiled("target_attention"), workloads.make_batch()
    output = model(batch)
    assert output.queries.shape == (B, H, G, E)
    assert output.keys.shape == output.values.shape == (B, H, N, E)
    attended = reference.attention(output.queries, output.keys, output.values, batch.history_mask)
    projection = model.params["params"]["attention"]["output_projection"]
    expected = np.einsum("bhge,hed->bgd", attended, projection["kernel"]) + projection["bias"]
    np.testing.assert_allclose(output.attention_output, expected, rtol=1e-3, atol=1e-4)
    query = model.module.apply(model.params, output.backbone.candidates, method="query")
    np.testing.assert_allclose(query, output.queries, rtol=1e-4, atol=1e-5)
