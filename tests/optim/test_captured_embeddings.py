"""Embeddings with curvature train like linear layers on one-hot vectors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tnkfac import KFAC, SINGD

WORDS = 7
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "auto": (SINGD, {}),
    "diagonal": (SINGD, {"structures": "diagonal"}),
    "diagonal, reduce": (SINGD, {"structures": "diagonal", "kfac_approx": "reduce"}),
    "dense, reduce": (SINGD, {"structures": "dense", "kfac_approx": "reduce", "T": 2}),
    "blocks": (SINGD, {"structures": "block3diagonal", "T": 1}),
    "hierarchical": (SINGD, {"structures": ("hierarchical2_1", "dense"), "T": 1}),
    "toeplitz": (SINGD, {"structures": "triltoeplitz", "T": 1}),
    "arrow": (SINGD, {"structures": ("triltopleftdiag", "diagonal"), "T": 1}),
    "the paper's": (SINGD, {**SINGD.REFERENCE, "structures": "diagonal", "T": 1}),
    "KFAC": (KFAC, {}),
    "KFAC, diagonal": (KFAC, {"structures": "diagonal"}),
    "EKFAC": (KFAC, {"compute_method": "ekfac", "inv_update_steps": 3}),
    "EKFAC, reduce": (KFAC, {"compute_method": "ekfac", "kfac_approx": "reduce"}),
    "KFAC, cholesky": (KFAC, {"compute_method": "cholesky", "factor_update_steps": 1}),
}


class Words(nn.Module):
    """Words of a sentence, embedded."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)).flatten(1))


def pair(padding: int | None = None) -> tuple[Words, Words]:
    embedding = nn.Embedding(WORDS, 2, padding_idx=padding)
    model, twin = Words(embedding).double(), Words(nn.Linear(WORDS, 2, bias=False)).double()
    twin.first.weight.data = embedding.weight.data.T.clone()
    twin.last.load_state_dict(model.last.state_dict())
    return model, twin


def trained(model: nn.Module, optimizer: Any, one_hot: bool, padding: int | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = torch.randint(WORDS, (8, 3), generator=generator)
        y = torch.randint(3, (8,), generator=generator)
        inputs = x
        if one_hot:
            inputs = nn.functional.one_hot(x, WORDS).double()
            if padding is not None:
                inputs[..., padding] = 0
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), y).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("name", CASES)
def test_like_a_linear_layer_on_one_hot_vectors(name: str, padding: int | None) -> None:
    make, options = CASES[name]
    model, twin = pair(padding)
    optimizer = make(model.parameters(), lr=0.05, capture_embeddings=True, **options)
    assert all(row.reason in ("", "no statistics yet") for row in optimizer.report())
    found = trained(model, optimizer, False, padding)
    other = make(twin.parameters(), lr=0.05, **options)
    weight, *rest = trained(twin, other, True, padding)
    for one, expected in zip(found, (weight.T, *rest), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-7, atol=1e-9)


LEFT: dict[str, dict[str, Any]] = {
    "max_norm": {"max_norm": 1.0},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
}


@pytest.mark.parametrize("make", [SINGD, KFAC])
@pytest.mark.parametrize("hyper", LEFT)
def test_others_are_left_to_the_fallback(hyper: str, make: Any) -> None:
    model = Words(nn.Embedding(WORDS, 2, **LEFT[hyper]))
    optimizer = make(model.parameters(), capture_embeddings=True)
    rows = {row.name: row.reason for row in optimizer.report()}
    assert rows["first.weight"] == "Embedding is not a supported layer"


def test_a_weight_tied_to_a_linear_layer_is_captured_there() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(WORDS, 2), nn.Linear(2, WORDS, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words(x))

    reports = []
    for asked in (False, True):
        optimizer = SINGD(Tied().parameters(), capture_embeddings=asked)
        reports.append([(row.name, row.reason) for row in optimizer.report()])
    assert reports[0] == reports[1]


def test_by_group_and_only_when_asked() -> None:
    def reasons(**options: Any) -> list[str]:
        torch.manual_seed(0)
        model, _ = pair()
        groups = [
            {"params": list(model.first.parameters()), **options},
            {"params": list(model.last.parameters())},
        ]
        return [row.reason for row in SINGD(groups).report()]

    assert "Embedding is not a supported layer" in reasons()
    assert "Embedding is not a supported layer" not in reasons(capture_embeddings=True)
    with pytest.raises(TypeError, match="capture_embeddings"):
        reasons(capture_embeddings="yes")
