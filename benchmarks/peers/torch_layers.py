"""The layers of the PyTorch peer: batched, with fused projections and `scaled_dot_product_attention`."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SDPA = F.scaled_dot_product_attention


def mlp(inputs: int, hidden: tuple[int, ...], width: int) -> nn.Sequential:
    """Linear layers with GELU between them."""
    sizes = (inputs, *hidden)
    layers = [part for one, other in zip(sizes, hidden, strict=False)
              for part in (nn.Linear(one, other), nn.GELU(approximate="tanh"))]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], width))


class ItemFeatures(nn.Module):
    """An item's embedding plus a linear map of its vector: [...] and [..., F] to [..., D]."""

    def __init__(self, num_items: int, vector: int, width: int):
        """Makes the parameters; `num_items` rows of the table include padding."""
        super().__init__()
        self.item_id = nn.Embedding(num_items, width)
        self.features = nn.Linear(vector, width)

    def forward(self, item_id: Tensor, features: Tensor) -> Tensor:
        """Embeds ids [...] with vectors [..., F]."""
        return self.item_id(item_id) + self.features(features)


def split_heads(values: Tensor, heads: int) -> Tensor:
    """[..., N, D] to [..., H, N, E]."""
    return values.unflatten(-1, (heads, -1)).transpose(-2, -3)


def join_heads(values: Tensor) -> Tensor:
    """[..., H, N, E] to [..., N, D]."""
    return values.transpose(-2, -3).flatten(-2)


class Attention(nn.Module):
    """Multi-head attention with the projections of queries, keys and values in one matrix."""

    def __init__(self, width: int, heads: int):
        """Makes the parameters of `heads` heads over `width`."""
        super().__init__()
        self.width, self.heads = width, heads
        self.projections = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def queries(self, inputs: Tensor) -> Tensor:
        """[B, Q, D] to [B, H, Q, E]."""
        weight, bias = self.projections.weight[: self.width], self.projections.bias[: self.width]
        return split_heads(F.linear(inputs, weight, bias), self.heads)

    def keys_values(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] to two [B, H, N, E]."""
        weight, bias = self.projections.weight[self.width:], self.projections.bias[self.width:]
        keys, values = F.linear(history, weight, bias).chunk(2, dim=-1)
        return split_heads(keys, self.heads), split_heads(values, self.heads)

    def over_itself(self, history: Tensor, mask: Tensor) -> Tensor:
        """`X + MHA(X, X, X)`, [B, N, D] with mask [B, N]."""
        queries, keys, values = (
            split_heads(x, self.heads) for x in self.projections(history).chunk(3, dim=-1))
        return history + self.output(join_heads(SDPA(queries, keys, values, attn_mask=mask[:, None, None])))

    def forward(self, inputs: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """[B, Q, D] over [B, N, D] with mask [B, N]: [B, Q, D]."""
        attended = SDPA(self.queries(inputs), *self.keys_values(history), attn_mask=mask[:, None, None])
        return self.output(join_heads(attended))


class LevelAttention(nn.Module):
    """Attention with separate projections for each level, all levels in one product."""

    def __init__(self, levels: int, width: int, heads: int):
        """Makes the parameters of `levels` levels; only values have a bias, not queries, keys and outputs."""
        super().__init__()
        self.levels, self.heads = levels, heads
        self.query = nn.Parameter(torch.empty(levels, width, width))
        self.key_value = nn.Linear(width, 2 * levels * width)
        self.output = nn.Parameter(torch.empty(levels, width, width))

    def keys_values(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D] to two [B, L, H, N, E]."""
        weight, bias = self.key_value.weight, self.key_value.bias.chunk(2)[1]
        key_weight, value_weight = weight.chunk(2)
        both = F.linear(history, key_weight), F.linear(history, value_weight, bias)
        keys, values = (x.unflatten(-1, (self.levels, self.heads, -1)).permute(0, 2, 3, 1, 4) for x in both)
        return keys, values

    def forward(self, inputs: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[B, L, Q, D] or [L, Q, D] over keys and values with mask [B, N]: [B, L, Q, D]."""
        queries = split_heads(inputs @ self.query, self.heads).expand(len(keys), -1, -1, -1, -1)
        queries, keys, values = (x.flatten(0, 1) for x in (queries, keys, values))
        masks = mask[:, None, None, None].expand(-1, self.levels, -1, -1, -1).flatten(0, 1)
        attended = SDPA(queries, keys, values, attn_mask=masks).unflatten(0, (-1, self.levels))
        return join_heads(attended) @ self.output


def encode(codewords: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residual quantization: [L, K, D], [B, G, D] to codes [B, G, L], residuals, chosen [B, G, L, D]."""
    residual, codes, residuals, chosen = latents, [], [], []
    for level in codewords:
        with torch.no_grad():
            offsets = -0.5 * level.square().sum(dim=-1)
            scores = torch.addmm(offsets, residual.flatten(0, -2), level.T)
            codes.append(scores.argmax(dim=-1).view(residual.shape[:-1]))
        residuals.append(residual)
        chosen.append(F.embedding(codes[-1], level))
        residual = residual - chosen[-1]
    stack = functools.partial(torch.stack, dim=-2)
    return torch.stack(codes, dim=-1), stack(residuals), stack(chosen)
