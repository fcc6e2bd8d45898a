"""Stock attention is trained as linear layers for queries, keys, values and outputs are."""

import pytest
import torch
from torch import Tensor, nn

from oracles.uses_attention import VARIANTS, Naive, naive_pairs, twins
from oracles.uses_training import OPTIMIZERS, assert_equal, assert_untouched, copy_weights, train


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_are_those_of_linear_layers(name: str, kind: str) -> None:
    variant = VARIANTS[name]
    stock, naive, pairs = twins(variant)
    optimizer, other = (train(net, OPTIMIZERS[kind], variant.shape) for net in (stock, naive))
    assert_equal(pairs)
    reasons, expected = ([bool(r.reason) for r in o.report()] for o in (optimizer, other))
    assert sorted(reasons) == sorted(expected)
    assert sum(reasons) == 2 * ("bias_kv" in name)


@pytest.mark.parametrize(("approx", "micro"), [("expand", 2), ("reduce", 1), ("reduce", 2)])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "unbatched"])
def test_samples_are_those_of_the_batch(name: str, approx: str, micro: int) -> None:
    """With damping: the sum over tokens of the gradients of keys is zero, but for rounding."""
    variant = VARIANTS[name]
    stock, naive, pairs = twins(variant)
    for net in (stock, naive):
        make, options = OPTIMIZERS["KFAC"], {"kfac_approx": approx, "damping": 0.1}
        train(net, make, variant.shape, micro, **options)
    assert_equal(pairs)


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_and_gradients_are_those_of_the_model_alone(name: str) -> None:
    stock, _, _ = twins(VARIANTS[name])
    assert_untouched(stock, VARIANTS[name].shape)


class Encoder(nn.Module):
    """A layer of an encoder as it is written down."""

    def __init__(self, stock: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.attention, self.norm_first = Naive(stock.self_attn), stock.norm_first
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 4)

    def mixed(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]

    def changed(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.inner(x)))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to the same."""
        if self.norm_first:
            x = x + self.mixed(self.norms[0](x))
            return x + self.changed(self.norms[1](x))
        x = self.norms[0](x + self.mixed(x))
        return self.norms[1](x + self.changed(x))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_layer_of_an_encoder(norm_first: bool, kind: str) -> None:
    torch.manual_seed(0)
    stock = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, norm_first=norm_first)
    naive = Encoder(stock)
    stock, naive = stock.double(), naive.double()
    pairs = naive_pairs(stock.self_attn, naive.attention)
    for ours, theirs in (
        (stock.linear1, naive.inner),
        (stock.linear2, naive.outer),
        (stock.norm1, naive.norms[0]),
        (stock.norm2, naive.norms[1]),
    ):
        pairs += zip(ours.parameters(), theirs.parameters(), strict=True)
    copy_weights(pairs)
    for net in (stock, naive):
        train(net, OPTIMIZERS[kind], (4, 5, 4))
    assert_equal(pairs)


class Shared(nn.Module):
    """Two layers with one weight, but biases of their own; the first one is that of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.body = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)
        self.body.weight = self.attention.out_proj.weight

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 4]`` to the same."""
        return self.body(torch.tanh(self.attention(x, x, x)[0]))


class Apart(nn.Module):
    """The same, with biases that are no part of a layer."""

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.attention = Naive(shared.attention)
        self.attention.out = nn.Linear(4, 4, bias=False)
        self.biases = nn.Parameter(torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.attention(x, x, x)[0] + self.biases[0])
        return self.attention.out(x) + self.biases[1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_weight_with_two_biases_counts_both_calls(kind: str) -> None:
    torch.manual_seed(0)
    shared = Shared()
    apart, shared = Apart(shared).double(), shared.double()
    own = shared.attention
    weights, biases = own.in_proj_weight.detach(), own.in_proj_bias.detach()
    layers = apart.attention.q, apart.attention.k, apart.attention.v
    pairs = [*zip(weights.chunk(3), (layer.weight for layer in layers), strict=True)]
    pairs += zip(biases.chunk(3), (layer.bias for layer in layers), strict=True)
    pairs += [(shared.body.weight, apart.attention.out.weight)]
    pairs += [(own.out_proj.bias, apart.biases[0])]
    pairs += [(shared.body.bias, apart.biases[1])]
    copy_weights(pairs)
    for net in (shared, apart):
        train(net, OPTIMIZERS[kind], (4, 5, 4))
    assert_equal(pairs)
