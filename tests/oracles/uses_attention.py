"""Stock attention in its variants, and the same one of linear layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oracles.uses_training import copy_weights

__all__ = ["VARIANTS", "Attending", "Naive", "naive_pairs", "twins"]


class Naive(nn.Module):
    """Attention as it is written down; inputs, masks and results are those of the stock one."""

    def __init__(self, stock: nn.MultiheadAttention) -> None:
        super().__init__()
        size, bias = stock.embed_dim, stock.in_proj_bias is not None
        self.q = nn.Linear(size, size, bias)
        self.k = nn.Linear(stock.kdim, size, bias)
        self.v = nn.Linear(stock.vdim, size, bias)
        self.out = nn.Linear(size, size, bias)
        self.bias_k, self.bias_v = (
            None if b is None else nn.Parameter(torch.zeros_like(b))
            for b in (stock.bias_k, stock.bias_v)
        )
        self.heads, self.batch_first = stock.num_heads, stock.batch_first
        self.add_zero_attn = stock.add_zero_attn

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Output and weights."""
        batched = query.ndim == 3
        given = [query, key, value]
        if not batched:
            given = [t.unsqueeze(0) for t in given]
        elif not self.batch_first:
            given = [t.transpose(0, 1) for t in given]
        q, k, v = (layer(t) for layer, t in zip((self.q, self.k, self.v), given, strict=True))
        if self.bias_k is not None:
            k, v = (
                torch.cat([t, b.expand(len(t), 1, -1)], 1)
                for t, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (torch.cat([t, torch.zeros_like(t[:, :1])], 1) for t in (k, v))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if attn_mask is not None:
            scores = scores.masked_fill(attn_mask, -torch.inf)
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None], -torch.inf)
        weights = scores.softmax(-1)
        out = self.out((weights @ v).transpose(1, 2).flatten(2))
        weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return out[0], weights[0]
        return (out if self.batch_first else out.transpose(0, 1)), weights


def naive_pairs(stock: nn.MultiheadAttention, naive: Naive) -> list[tuple[Tensor, Tensor]]:
    """Views of parameters of the stock attention, and parameters of the other."""
    if stock.in_proj_weight is None:
        weights = [stock.q_proj_weight, stock.k_proj_weight, stock.v_proj_weight]
    else:
        weights = [*stock.in_proj_weight.detach().chunk(3)]
    layers = naive.q, naive.k, naive.v
    found = [*zip(weights, (layer.weight for layer in layers), strict=True)]
    if stock.in_proj_bias is not None:
        found += zip(stock.in_proj_bias.detach().chunk(3), (la.bias for la in layers), strict=True)
    found += zip(stock.out_proj.parameters(), naive.out.parameters(), strict=True)
    if stock.bias_k is not None:
        found += [(stock.bias_k, naive.bias_k), (stock.bias_v, naive.bias_v)]
    return found


def alone(attention: Any, x: Tensor) -> Tensor:
    return attention(x, x, x, need_weights=False)[0]


def sequence_first(attention: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return attention(x, x, x, need_weights=False)[0].transpose(0, 1)


def crossing(attention: Any, x: Tensor) -> Tensor:
    """Keys and values are one tensor, with fewer tokens."""
    other = x[:, :3].sin()
    return attention(x, other, other)[0]


def crossing_first(attention: Any, x: Tensor) -> Tensor:
    x, other = x.transpose(0, 1), x[:, :3].sin().transpose(0, 1)
    return attention(x, other, other)[0].transpose(0, 1)


def different(attention: Any, x: Tensor) -> Tensor:
    return attention(x, x.sin(), x.cos())[0]


def narrow(attention: Any, x: Tensor) -> Tensor:
    """Keys and values have other widths."""
    return attention(x, x[:, :3, :3].sin(), x[:, :3, :2].cos())[0]


def weighed(attention: Any, x: Tensor) -> Tensor:
    """Weights are returned, and a loss sees them."""
    out, weights = attention(x, x, x, average_attn_weights=False)
    return torch.cat([out, weights.movedim(1, 2).flatten(2).square()], -1)


def causal(attention: Any, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return attention(x, x, x, attn_mask=mask)[0]


def padded(attention: Any, x: Tensor) -> Tensor:
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[::2, -2:] = True
    return attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]


def self_then_cross(attention: Any, x: Tensor) -> Tensor:
    """Twice, with the same weights."""
    return crossing(attention, torch.tanh(alone(attention, x)))


class Variant(NamedTuple):
    """One way to build and to call attention."""

    options: dict[str, Any]
    run: Callable[[Any, Tensor], Tensor]
    shape: tuple[int, ...] = (4, 5, 4)


VARIANTS: dict[str, Variant] = {
    "self": Variant({"batch_first": True}, alone),
    "sequence first": Variant({}, sequence_first),
    "unbatched": Variant({}, alone, (5, 4)),
    "cross": Variant({"batch_first": True}, crossing),
    "cross, sequence first": Variant({}, crossing_first),
    "three inputs": Variant({"batch_first": True}, different),
    "kdim, vdim": Variant({"batch_first": True, "kdim": 3, "vdim": 2}, narrow),
    "kdim, vdim, no bias": Variant(
        {"batch_first": True, "kdim": 3, "vdim": 2, "bias": False}, narrow
    ),
    "no bias": Variant({"batch_first": True, "bias": False}, alone),
    "bias_kv": Variant({"batch_first": True, "add_bias_kv": True}, alone),
    "zero_attn": Variant({"batch_first": True, "add_zero_attn": True}, crossing),
    "weights": Variant({"batch_first": True}, weighed),
    "causal": Variant({"batch_first": True}, causal),
    "padded": Variant({"batch_first": True}, padded),
    "self and cross": Variant({"batch_first": True}, self_then_cross),
}


class Attending(nn.Module):
    """A layer, and attention of either kind behind it."""

    def __init__(self, variant: Variant, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.attention, self.run = nn.Linear(4, 4), attention, variant.run

    def forward(self, x: Tensor) -> Tensor:
        """What attention returns."""
        return self.run(self.attention, torch.tanh(self.first(x)))


def twins(variant: Variant) -> tuple[Attending, Attending, list[tuple[Tensor, Tensor]]]:
    """Both with the same weights, in float64, and what has to stay equal."""
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(4, 2, **variant.options)
    models = [Attending(variant, attention).double() for attention in (stock, Naive(stock))]
    for param in models[0].parameters():  # biases are zeros
        nn.init.normal_(param, std=0.5)
    firsts = (model.first.parameters() for model in models)
    found = [*zip(*firsts, strict=True)]
    found += naive_pairs(stock, models[1].attention)
    copy_weights(found)
    return *models, found
