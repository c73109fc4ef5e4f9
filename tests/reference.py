"""NumPy copies of the core layers, written for clarity, as references for the tests."""

import numpy as np


def attention(queries, keys, values, mask):
    """Softmax attention over the unmasked positions only, one query and one head at a time, in float64.

    queries [B, ..., Q, E], keys and values [B, ..., N, E], mask [B, N]: [B, ..., Q, E].
    """
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    outputs = np.zeros((*queries.shape[:-1], values.shape[-1]))
    for index in np.ndindex(*queries.shape[:-1]):
        where = np.asarray(mask[index[0]])
        if where.any():
            logits = keys[index[:-1]][where] @ queries[index] / np.sqrt(queries.shape[-1])
            weights = np.exp(logits - logits.max())
            outputs[index] = weights @ values[index[:-1]][where] / weights.sum()
    return outputs


def encode_features(params, fields, columns):
    """`FeatureEncoder`: the sum of table rows and linear maps."""
    encoded = params["bias"].astype(np.float64)
    for field in fields:
        if field.kind == "categorical":
            encoded = encoded + params[field.name]["embedding"][columns[field.name]]
        else:
            values = columns[field.name]
            values = values if field.kind == "vector" else values[..., None]
            encoded = encoded + values @ params[field.name]["kernel"]
    return encoded


def gelu(x):
    """Gaussian error linear unit, in its tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mlp(params, inputs):
    """`MLP`: dense layers with GELU between them."""
    layers = [params[f"Dense_{index}"] for index in range(len(params))]
    for layer in layers[:-1]:
        inputs = gelu(inputs @ layer["kernel"] + layer["bias"])
    return inputs @ layers[-1]["kernel"] + layers[-1]["bias"]


def multi_head_attention(params, queries, history, mask):
    """`MultiHeadAttention`: [B, Q, D] over [B, N, D] to [B, Q, D]."""

    def project(name, inputs):
        return np.einsum("bqd,dhe->bhqe", inputs, params[name]["kernel"]) + params[name]["bias"][:, None]

    attended = attention(
        project("query_projection", queries), project("key_projection", history),
        project("value_projection", history), mask,
    )
    output = params["output_projection"]
    return np.einsum("bhqe,hed->bqd", attended, output["kernel"]) + output["bias"]


def level_attention(params, queries, history, mask):
    """`LevelAttention`: [B, L, Q, D] over [B, N, D] to [B, L, Q, D], level by level."""
    outputs = []
    for level in range(queries.shape[1]):
        keys = np.einsum("bnd,dhe->bhne", history, params["key_kernel"][level])
        values = np.einsum("bnd,dhe->bhne", history, params["value_kernel"][level])
        values = values + params["value_bias"][level]
        projected = np.einsum("bqd,dhe->bhqe", queries[:, level], params["query_kernel"][level])
        attended = attention(projected, keys, values, mask)
        outputs.append(np.einsum("bhqe,hed->bqd", attended, params["output_kernel"][level]))
    return np.stack(outputs, axis=1)


def encode_history(params, history, mask):
    """`HistoryEncoder`: self-attention around a residual connection."""
    return history + multi_head_attention(params["MultiHeadAttention_0"], history, history, mask)


def two_tower(params, schema, batch, width):
    """`TwoTower`: logits [B, G], v_user, v_item, x_item and X."""
    candidates = encode_features(params["item_features"], schema.side("item"), batch.candidates)
    history = encode_features(params["item_features"], schema.side("item"), batch.history)
    history = history + encode_features(params["event_features"], schema.side("event"), batch.history)
    columns = {**batch.user, **batch.context}
    parts = [encode_features(params["user_features"], schema.side("user", "context"), columns)]
    for index in range(sum(name.startswith("history_encoder") for name in params)):
        encoded = encode_history(params[f"history_encoder_{index}"], history, batch.history_mask)
        attention_params = params[f"history_attention_{index}"]
        attended = multi_head_attention(attention_params, parts[0][:, None], encoded, batch.history_mask)
        parts.append(attended[:, 0])
    user = mlp(params["user_tower"], np.concatenate(parts, axis=-1))
    item = mlp(params["item_tower"], candidates)
    logits = np.sum(user[:, None] * item, axis=-1) / np.sqrt(width) + params["bias"]
    return logits, user, item, candidates, history


def interactions(output, user, item, candidates):
    """`[o, x_item, o * x_item, v_user * v_item]`."""
    return np.concatenate([output, candidates, output * candidates, user[:, None] * item], axis=-1)


def target_attention(params, schema, batch, width):
    """`TargetAttention`: logits [B, G], attention output, and H_t."""
    logits, user, item, candidates, history = two_tower(params["backbone"], schema, batch, width)
    encoded = encode_history(params["history_encoder"], history, batch.history_mask)
    queries = mlp(params["query_tower"], candidates)
    output = multi_head_attention(params["attention"], queries, encoded, batch.history_mask)
    added = mlp(params["head"], interactions(output, user, item, candidates))[..., 0]
    return logits + added, output, encoded
