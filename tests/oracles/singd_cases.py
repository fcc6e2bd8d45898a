"""Problems on which trajectories of the ``singd`` package are recorded, and how to run them.

Weights and data come from a formula, not from a random generator, and are multiples of 2**-12, so
that any version of torch on any machine starts from the same numbers. The network has the layers
that ``singd`` handles as it should: ungrouped ``Conv2d`` and ``Linear``, with and without weight
sharing and bias. A test of an optimizer on a case::

    model, losses = train(case, lambda model, **options: MyOptimizer(model, **options))
    assert_close_to_record(load_record(case), model, losses)
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import prod, sin, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

RECORD_FILE = Path(__file__).parent.parent / "data" / "singd_0_0_5.json"
STEPS = 10
BATCH_SIZE = 6
TOLERANCE = 1e-12


def warmup(step: int) -> float:
    """Return a step-dependent ``lr_cov``."""
    return 0.02 * min(step + 1, 5)


@dataclass(frozen=True)
class Case:
    """One optimizer run: options of ``singd.SINGD``, the loss, the split of each batch."""

    name: str
    options: dict[str, Any] = field(hash=False)
    reduction: str = "mean"
    micro_batches: int = 1

    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of logits ``2 output``, ``[N, 3]``: the factors count."""
        return functional.cross_entropy(2 * output, target, reduction=self.reduction)

    def describe(self) -> dict[str, Any]:
        """Return everything that defines the case in terms JSON knows."""
        options = {k: v.__name__ if callable(v) else v for k, v in self.options.items()}
        return {
            "options": json.loads(json.dumps(options)),
            "reduction": self.reduction,
            "micro_batches": self.micro_batches,
        }


BASE: dict[str, Any] = {
    "lr": 0.02,
    "momentum": 0.9,
    "damping": 0.01,
    "alpha1": 0.5,
    "weight_decay": 0.0,
    "T": 1,
    "loss_average": "batch",
    "lr_cov": 0.1,
    "structures": ("dense", "dense"),
    "kfac_approx": "expand",
    "kfac_like": False,
    "normalize_lr_cov": False,
}


def _case(
    name: str,
    structure: str = "dense",
    *,
    reduction: str = "mean",
    micro_batches: int = 1,
    **changed: Any,
) -> Case:
    """Return a case that differs from ``BASE`` by ``changed``, with one structure for both."""
    options = BASE | {"structures": (structure, structure)} | changed
    return Case(name, options, reduction, micro_batches)


PAIRS = {
    "dense": ("dense", "dense"),
    "diagonal": ("diagonal", "diagonal"),
    "dense-diagonal": ("dense", "diagonal"),
}
CASES = [
    *(
        _case(f"{name}-{approx}-T{T}", structures=pair, kfac_approx=approx, T=T)
        for name, pair in PAIRS.items()
        for approx in ("expand", "reduce")
        for T in (1, 2)
    ),
    _case("kfac-like", kfac_like=True, alpha1=0.0),
    _case("kfac-like-reduce", kfac_like=True, alpha1=0.0, kfac_approx="reduce"),
    # a sum taken for a mean makes the factors so large that the normalisation acts
    _case("normalize-lr-cov", normalize_lr_cov=True, reduction="sum", lr=0.001, lr_cov=0.2),
    _case("alpha1-zero", alpha1=0.0),
    _case("weight-decay", weight_decay=0.1),
    _case("lr-cov-schedule", lr_cov=warmup),
    _case("loss-sum", loss_average=None, reduction="sum", lr=0.002, lr_cov=0.02),
    _case("loss-batch+sequence", loss_average="batch+sequence"),
    _case("micro-batches", micro_batches=3),
    _case("micro-batches-diagonal-reduce", "diagonal", micro_batches=2, kfac_approx="reduce"),
    # ``singd`` multiplies by K where its transpose is meant, which shows from the second update on
    _case("block30diagonal-one-update", "block30diagonal", T=STEPS),
    *(
        _case(name, name)
        for name in (
            "hierarchical15_15",
            "triltoeplitz",
            "triutoeplitz",
            "triltopleftdiag",
            "trilbottomrightdiag",
            "triutopleftdiag",
            "triubottomrightdiag",
        )
    ),
]
CASE_NAMES = [case.name for case in CASES]


def get_case(name: str) -> Case:
    """Return the case with this name."""
    return CASES[CASE_NAMES.index(name)]


def numbers(*shape: int, seed: int) -> Tensor:
    """Return a float64 tensor of scattered multiples of 2**-12 in [-1, 1]."""
    values = (sin(0.37 * i * i + 1.3 * i + 2.1 * seed) for i in range(prod(shape)))
    rounded = [round(value * 4096) / 4096 for value in values]
    return torch.tensor(rounded, dtype=torch.float64).reshape(shape)


def build_model() -> nn.Sequential:
    """Return the network ``[N, 2, 7, 6] -> [N, 3]`` with its fixed start weights."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),  # [N, 4, 4, 3]
        nn.Tanh(),
        nn.Conv2d(4, 5, (2, 3), padding=(0, 1), dilation=(2, 1), bias=False),  # [N, 5, 2, 3]
        nn.Tanh(),
        nn.Flatten(2),
        nn.Linear(6, 7),  # shared by the 5 channels
        nn.Sigmoid(),
        nn.Flatten(1),
        nn.Linear(35, 3),
    ).double()
    for seed, parameter in enumerate(model.parameters()):
        fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 4
        scale = round(4096 * 1.5 / sqrt(fan_in)) / 4096
        parameter.data = scale * numbers(*parameter.shape, seed=seed)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return inputs ``[6, 2, 7, 6]`` and class labels ``[6]`` of a step."""
    x = numbers(BATCH_SIZE, 2, 7, 6, seed=100 + step)
    return 2 * x, torch.tensor([(step + n * n) % 3 for n in range(BATCH_SIZE)])


def micro_batches(case: Case, step: int) -> list[tuple[Tensor, Tensor, float]]:
    """Return the batch of a step as ``(x, y, loss weight)`` triples."""
    x, y = batch(step)
    n = case.micro_batches
    return [(x, y, 1.0 / n) for x, y in zip(x.chunk(n), y.chunk(n), strict=True)]


def train(
    case: Case,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    after_step: Callable[[nn.Module, torch.optim.Optimizer], None] | None = None,
) -> tuple[nn.Module, list[float]]:
    """Run a case with ``make_optimizer(model, **case.options)``; return model and losses."""
    model = build_model()
    optimizer = make_optimizer(model, **case.options)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for x, y, weight in micro_batches(case, step):
            loss = weight * case.loss_fn(model(x), y)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
        if after_step is not None:
            after_step(model, optimizer)
    return model, losses


def flat_weights(model: nn.Module) -> list[float]:
    """Return all parameters in order as one list."""
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def probe(matrix: Tensor) -> list[float]:
    """Return trace, squared Frobenius norm and a fixed bilinear form of a factor ``[d, d]``."""
    d = matrix.shape[0]
    form = numbers(d, seed=7) @ matrix @ numbers(d, seed=8)
    return [matrix.trace().item(), matrix.square().sum().item(), form.item()]


@cache
def _records() -> Any:
    return json.loads(RECORD_FILE.read_text())["cases"]


def load_record(case: Case) -> dict[str, Any]:
    """Return ``case``, ``losses``, ``weights``, ``K`` and ``C`` (probes by layer name)."""
    record: dict[str, Any] = _records()[case.name]
    if record["case"] != case.describe():
        raise ValueError(f"The record of {case.name!r} is stale: run record_singd.py again.")
    return record


def assert_numbers_close(name: str, actual: list[float], expected: list[float]) -> None:
    """Assert that two lists agree to 1e-12, relative to entries above 1."""
    assert len(actual) == len(expected), f"{name}: {len(actual)} numbers, not {len(expected)}"
    errors = [abs(a - e) / max(1.0, abs(e)) for a, e in zip(actual, expected, strict=True)]
    assert all(error <= TOLERANCE for error in errors), f"{name}: off by {max(errors):.1e}"


def assert_close_to_record(record: dict[str, Any], model: nn.Module, losses: list[float]) -> None:
    """Assert that losses and final weights of a run are those recorded."""
    assert_numbers_close("losses", losses, record["losses"])
    assert_numbers_close("weights", flat_weights(model), record["weights"])
