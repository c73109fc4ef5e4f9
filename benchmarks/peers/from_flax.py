"""Copies our parameters into the PyTorch model, so that both compute the same."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.peers.torch_tarq import Codebook, Sizes, TorchBatch, TorchTarq
from tarq_jax.training.state import TrainState
from tarq_jax.types import Batch

Params = Mapping[str, Any]


def torch_batch(batch: Batch) -> TorchBatch:
    """Converts a batch with NumPy leaves to tensors."""
    arrays = (batch.history["item_id"], batch.history["features"], batch.history_mask,
              batch.candidates["item_id"], batch.candidates["features"], batch.labels, batch.weights)
    return TorchBatch(*(torch.from_numpy(np.asarray(array)) for array in arrays))


def torch_model(state: TrainState, sizes: Sizes) -> tuple[TorchTarq, Codebook]:
    """A model with the state's parameters and codewords, and the running statistics of its codebook."""
    model, params, ours = TorchTarq(sizes), state.params["params"], state.codebook
    if ours is None:
        raise ValueError("state.codebook is None, expected that of TARQ")
    weights = _teacher(params["teacher"]) | _mlp("student_head", params["student_head"])
    if sizes.order == 0:
        weights |= _mlp("encoder", params["encoder"]) | _mlp("decoder", params["decoder"])
        weights |= _level_attention(params["level_attention"])
    else:
        weights["log_radius"] = params["log_radius"]
    weights["codewords"] = ours.codewords
    model.load_state_dict({name: _tensor(values) for name, values in weights.items()})
    return model, Codebook(_tensor(ours.counts), _tensor(ours.sums))


def _tensor(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(values))


def _teacher(params: Params) -> dict[str, Any]:
    backbone = params["backbone"]
    items = backbone["item_features"]
    weights = {
        "teacher.items.item_id.weight": items["item_id"]["embedding"],
        "teacher.items.features.weight": np.transpose(items["features"]["kernel"]),
        "teacher.items.features.bias": items["bias"],
        "teacher.user_bias": backbone["user_features"]["bias"],
        "teacher.bias": backbone["bias"],
    }
    for name in ("user_tower", "item_tower"):
        weights |= _mlp(f"teacher.{name}", backbone[name])
    for name in ("query_tower", "head"):
        weights |= _mlp(f"teacher.{name}", params[name])
    encoder = backbone["history_encoder_0"]["MultiHeadAttention_0"]
    return (weights | _attention("teacher.backbone_encoder", encoder)
            | _attention("teacher.backbone_attention", backbone["history_attention_0"])
            | _attention("teacher.history_encoder", params["history_encoder"]["MultiHeadAttention_0"])
            | _attention("teacher.attention", params["attention"]))


def _mlp(name: str, params: Params) -> dict[str, Any]:
    weights = {}
    for index in range(len(params)):
        layer = params[f"Dense_{index}"]
        weights[f"{name}.{2 * index}.weight"] = np.transpose(layer["kernel"])
        weights[f"{name}.{2 * index}.bias"] = layer["bias"]
    return weights


def _attention(name: str, params: Params) -> dict[str, Any]:
    parts = [params[f"{kind}_projection"] for kind in ("query", "key", "value")]
    width = len(parts[0]["kernel"])
    return {
        f"{name}.projections.weight": np.concatenate(
            [np.reshape(part["kernel"], (width, width)).T for part in parts]),
        f"{name}.projections.bias": np.concatenate([np.ravel(part["bias"]) for part in parts]),
        f"{name}.output.weight": np.reshape(params["output_projection"]["kernel"], (width, width)).T,
        f"{name}.output.bias": params["output_projection"]["bias"],
    }


def _level_attention(params: Params) -> dict[str, Any]:
    levels, width = np.shape(params["query_kernel"])[:2]

    def stacked(kernel):  # [L, D, H, E] to [L * D, D]
        return np.swapaxes(np.reshape(kernel, (levels, width, width)), 1, 2).reshape(-1, width)

    value_bias = np.ravel(params["value_bias"])
    return {
        "level_attention.query": np.reshape(params["query_kernel"], (levels, width, width)),
        "level_attention.key_value.weight": np.concatenate(
            [stacked(params["key_kernel"]), stacked(params["value_kernel"])]),
        "level_attention.key_value.bias": np.concatenate([np.zeros_like(value_bias), value_bias]),
        "level_attention.output": np.reshape(params["output_kernel"], (levels, width, width)),
    }
