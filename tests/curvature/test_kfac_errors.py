"""What `tnkfac.curvature.kfac` refuses, and that its messages say what it supports."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tnkfac.curvature import kfac

LINEAR = nn.Sequential(nn.Linear(3, 2))
X, CLASSES, VALUES = torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]), torch.zeros(4, 2)
CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
BAD: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "model": (TypeError, "Module", lambda: kfac(len, MSE, [(X, VALUES)])),
    "no layers": (ValueError, "ConvTranspose3d", lambda: kfac(nn.ReLU(), MSE, [(X, X)])),
    "loss": (TypeError, "MSELoss", lambda: kfac(LINEAR, nn.L1Loss(), [(X, VALUES)])),
    "class weights": (
        ValueError,
        "weight",
        lambda: kfac(LINEAR, nn.CrossEntropyLoss(torch.ones(2)), [(X, CLASSES)]),
    ),
    "ignored targets": (ValueError, "ignore_index", lambda: kfac(LINEAR, CE, [(X, CLASSES - 100)])),
    "targets": (ValueError, r"\(4, 2\)", lambda: kfac(LINEAR, MSE, [(X, CLASSES)])),
    "class targets": (ValueError, r"class indices", lambda: kfac(LINEAR, CE, [(X, X)])),
    "data": (TypeError, "iterable of pairs", lambda: kfac(LINEAR, MSE, (X, VALUES))),
    "no data": (ValueError, "iterable of pairs", lambda: kfac(LINEAR, MSE, [])),
    "approx": (ValueError, "reduce", lambda: kfac(LINEAR, MSE, [(X, VALUES)], approx="kfc")),
    "fisher type": (
        ValueError,
        "forward-only",
        lambda: kfac(LINEAR, MSE, [(X, VALUES)], fisher_type="exact"),
    ),
    "mc samples": (
        ValueError,
        "at least 1",
        lambda: kfac(LINEAR, MSE, [(X, VALUES)], fisher_type="mc", mc_samples=0),
    ),
    "sum for a mean": (
        ValueError,
        "loss_average",
        lambda: kfac(LINEAR, MSE, [(X, VALUES)], loss_average=None),
    ),
    "mean for a sum": (
        ValueError,
        "loss_average",
        lambda: kfac(LINEAR, nn.MSELoss(reduction="sum"), [(X, VALUES)], loss_average="batch"),
    ),
    "batch for positions": (
        ValueError,
        "batch\\+sequence",
        lambda: kfac(
            nn.Sequential(nn.Conv1d(3, 2, 1)),
            CE,
            [(torch.zeros(4, 3, 5), torch.zeros(4, 5, dtype=torch.long))],
            loss_average="batch",
        ),
    ),
    "loss average": (
        ValueError,
        "loss_average",
        lambda: kfac(LINEAR, MSE, [(X, VALUES)], loss_average="mean"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    error, match, call = BAD[name]
    torch.set_default_dtype(torch.float32)
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("loss_average", ["batch", "batch+sequence"])
def test_what_agrees_with_the_loss_changes_nothing(loss_average: str) -> None:
    data = [(torch.randn(4, 3), torch.randn(4, 2))]
    model = nn.Sequential(nn.Linear(3, 2))
    default = kfac(model, MSE, data)["0"].B
    assert torch.equal(kfac(model, MSE, data, loss_average=loss_average)["0"].B, default)
