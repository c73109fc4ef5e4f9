"""TARQ in PyTorch, of order 0 and 1: model, losses and step as `configs/synthetic*.py` set them up.

It implements what these configurations use: head `mlp`, decoded `query`, the student's gradient stopped at
the teacher. It leaves out health metrics, norms and revival, whose cost only our step bears.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.torch_layers import (
    SDPA,
    Attention,
    ItemFeatures,
    LevelAttention,
    encode,
    join_heads,
    mlp,
    split_heads,
)


class Sizes(NamedTuple):
    """Sizes of the model."""

    num_items: int
    vector: int
    width: int
    heads: int
    hidden: tuple[int, ...]
    levels: int
    codewords: int
    order: int
    aligned_share: float


class TorchBatch(NamedTuple):
    """A batch of requests as tensors; shapes as in `tarq_jax.types.Batch`."""

    history_id: Tensor
    history_features: Tensor
    history_mask: Tensor
    candidate_id: Tensor
    candidate_features: Tensor
    labels: Tensor
    weights: Tensor


class Teacher(nn.Module):
    """Two-tower backbone and target attention over it."""

    def __init__(self, sizes: Sizes):
        """Makes parameters with PyTorch's initial values; the benchmark sets them to ours."""
        super().__init__()
        width, hidden = sizes.width, sizes.hidden
        self.items = ItemFeatures(sizes.num_items, sizes.vector, width)
        self.user_bias = nn.Parameter(torch.zeros(width))
        self.backbone_encoder, self.history_encoder, self.backbone_attention, self.attention = (
            Attention(width, sizes.heads) for _ in range(4))
        self.user_tower, self.item_tower = mlp(2 * width, hidden, width), mlp(width, hidden, width)
        self.query_tower, self.head = mlp(width, hidden, width), mlp(4 * width, hidden, 1)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, batch: TorchBatch) -> dict[str, Tensor]:
        """The teacher's logits, and everything that the student reads."""
        mask = batch.history_mask
        candidates = self.items(batch.candidate_id, batch.candidate_features)
        history = self.items(batch.history_id, batch.history_features)
        profile = self.user_bias.expand(len(mask), -1)
        encoded = self.backbone_encoder.over_itself(history, mask)
        interest = self.backbone_attention(profile[:, None], encoded, mask)[:, 0]
        user = self.user_tower(torch.cat([profile, interest], dim=-1))
        item = self.item_tower(candidates)
        backbone = (item @ user[..., None])[..., 0] / math.sqrt(user.shape[-1]) + self.bias

        encoded = self.history_encoder.over_itself(history, mask)
        queries = self.attention.queries(self.query_tower(candidates))
        keys, values = self.attention.keys_values(encoded)
        output = self.attention.output(join_heads(SDPA(queries, keys, values, attn_mask=mask[:, None, None])))
        towers = user[:, None] * item
        logits = backbone + self.head(torch.cat(
            [output, candidates, output * candidates, towers], dim=-1))[..., 0]
        return {"logits": logits, "backbone": backbone, "candidates": candidates, "towers": towers,
                "history": encoded, "queries": queries, "keys": keys, "values": values, "output": output}


class TorchTarq(nn.Module):
    """Teacher and student; codewords [L, K, D] are a parameter of order 0 and a buffer of order 1 (EMA)."""

    codewords: Tensor

    def __init__(self, sizes: Sizes):
        """Makes the parameters of order 0 or 1."""
        super().__init__()
        self.sizes = sizes
        width, hidden = sizes.width, sizes.hidden
        self.teacher = Teacher(sizes)
        self.student_head = mlp(4 * width, hidden, 1)
        codewords = torch.zeros(sizes.levels, sizes.codewords, width)
        if sizes.order == 0:
            self.codewords = nn.Parameter(codewords)
            self.encoder, self.decoder = mlp(width, hidden, width), mlp(width, hidden, width)
            self.level_attention = LevelAttention(sizes.levels, width, sizes.heads)
        else:
            self.register_buffer("codewords", codewords)
            self.log_radius = nn.Parameter(torch.zeros(sizes.heads, 1, 1))

    def forward(self, batch: TorchBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Losses [8] in the order of `LOSSES`, the teacher's logits, and codes, residuals and chosen."""
        teacher = self.teacher(batch)
        seen = {name: value.detach() for name, value in teacher.items()}
        flat_queries = join_heads(seen["queries"])
        aligned = max(1, round(self.sizes.aligned_share * len(batch.labels)))
        if self.sizes.order == 0:
            latents = F.rms_norm(self.encoder(seen["candidates"]), (self.sizes.width,), eps=1e-6)
        else:
            latents = flat_queries
        codes, residuals, chosen = encode(self.codewords, latents)
        quantized = chosen.sum(dim=-2)
        attend = self._attend if self.sizes.order == 0 else self._expand
        attended, personalized = attend(seen, chosen, batch.history_mask, aligned)
        passed = latents + (quantized - latents).detach()
        decoded = self.decoder(passed) if self.sizes.order == 0 else passed
        output = attended.sum(dim=-2)
        items = seen["candidates"]
        logits = seen["backbone"] + self.student_head(torch.cat(
            [output, items, output * items, seen["towers"]], dim=-1))[..., 0]

        bce = F.binary_cross_entropy_with_logits
        levels = personalized.shape[1]
        values = [
            bce(logits, batch.labels, reduction="none"),
            bce(teacher["logits"], batch.labels, reduction="none"),
            bce(logits, seen["logits"].sigmoid(), reduction="none"),
            0.5 * (output - seen["output"]).square().sum(dim=-1),
            alignment(latents[:aligned], seen["output"][:aligned], self.codewords[:levels], personalized,
                      chosen[:aligned, :, :levels], attended[:aligned, :, :levels]),
            (latents - quantized.detach()).square().sum(dim=-1),
            (chosen - residuals.detach()).square().sum(dim=(-2, -1)),
            (decoded - flat_queries).square().sum(dim=-1),
        ]
        losses = torch.stack([weighted_mean(value, batch.weights[: len(value)]) for value in values])
        return losses, teacher["logits"], codes, residuals.detach(), chosen.detach()

    def _attend(self, seen: dict[str, Tensor], chosen: Tensor, mask: Tensor, aligned: int
                ) -> tuple[Tensor, Tensor]:
        """Order 0: attention of the chosen codewords [B, G, L, D], and of all for the first requests."""
        keys, values = self.level_attention.keys_values(seen["history"])
        attended = self.level_attention(chosen.transpose(1, 2), keys, values, mask)
        personalized = self.level_attention(
            self.codewords, keys[:aligned], values[:aligned], mask[:aligned])
        return attended.transpose(1, 2), personalized

    def _expand(self, seen: dict[str, Tensor], chosen: Tensor, mask: Tensor, aligned: int
                ) -> tuple[Tensor, Tensor]:
        """Order 1: attention at the first codeword, and its damped derivative along the further codewords."""
        heads, keys, values = self.sizes.heads, seen["keys"], seen["values"]
        chosen = split_heads(chosen.permute(2, 0, 1, 3), heads)  # [L, B, H, G, E]
        centres, residuals = chosen[0], chosen[1:]
        length = residuals.sum(dim=0).square().sum(dim=-1, keepdim=True)
        damping = 1.0 / (1.0 + length / self.log_radius.exp().square())
        scale = 1.0 / math.sqrt(keys.shape[-1])
        transposed = keys.transpose(-1, -2) * scale
        weights = (centres @ transposed).masked_fill(~mask[:, None, None], -1e30).softmax(dim=-1)
        shifts = residuals @ transposed
        shifts = weights * (shifts - (weights * shifts).sum(dim=-1, keepdim=True))
        output = self.teacher.attention.output
        weight, bias = output.weight.detach(), output.bias.detach()
        mean = F.linear(join_heads(weights @ values), weight, bias)
        changes = F.linear(join_heads(damping * (shifts @ values)), weight)
        queries = split_heads(self.codewords[0], heads).expand(aligned, -1, -1, -1)
        at_codewords = SDPA(queries, keys[:aligned], values[:aligned],
                            attn_mask=mask[:aligned, None, None])
        personalized = F.linear(join_heads(at_codewords), weight, bias)
        return torch.stack([mean, *changes], dim=2), personalized[:, None]


LOSSES = ("student", "teacher", "distillation", "output_reconstruction", "alignment", "commitment",
          "codebook", "reconstruction")


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean."""
    return (values * weights).sum() / weights.sum()


def negative_distances(points: Tensor, codewords: Tensor) -> Tensor:
    """`2<x, c> - |c|^2`."""
    return 2.0 * points @ codewords.transpose(-1, -2) - codewords.square().sum(dim=-1)[..., None, :]


def alignment(latents: Tensor, outputs: Tensor, codewords: Tensor, personalized: Tensor, chosen: Tensor,
              attended: Tensor) -> Tensor:
    """Symmetric KL between softmaxes over codewords by latent and by attention output, [A, G]."""
    total = torch.zeros_like(latents[..., 0])
    for level in range(len(codewords)):
        log_p = negative_distances(latents, codewords[level]).log_softmax(dim=-1)
        log_q = negative_distances(outputs, personalized[:, level]).log_softmax(dim=-1)
        total = total + ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)
        latents, outputs = latents - chosen[:, :, level], outputs - attended[:, :, level]
    return total


class Codebook(NamedTuple):
    """Running statistics of codeword use."""

    counts: Tensor  # [L, K]
    sums: Tensor  # [L, K, D]


@torch.no_grad()
def update_codebook(model: TorchTarq, codebook: Codebook, codes: Tensor, residuals: Tensor, mask: Tensor,
                    decay: float) -> None:
    """Updates the statistics in place, and in order 1 sets the codewords to the running means."""
    levels, size = codebook.counts.shape
    real = mask.to(residuals.dtype).flatten()[:, None].expand(-1, levels).flatten()
    first = size * torch.arange(levels, device=codes.device)
    index = (codes.flatten(0, 1) + first).flatten()  # of all levels at once
    counts = torch.zeros(levels * size, device=codes.device).index_add_(0, index, real).view(levels, size)
    sums = torch.zeros(levels * size, residuals.shape[-1], device=codes.device).index_add_(
        0, index, residuals.flatten(0, 2) * real[:, None]).view_as(codebook.sums)
    codebook.counts.mul_(decay).add_(counts, alpha=1.0 - decay)
    codebook.sums.mul_(decay).add_(sums, alpha=1.0 - decay)
    if model.sizes.order == 1:
        total = codebook.counts.sum(dim=-1, keepdim=True)
        smoothed = (codebook.counts + 1e-5) / (total + size * 1e-5) * total
        model.codewords.copy_(codebook.sums / smoothed.clamp_min(1e-12)[..., None])
