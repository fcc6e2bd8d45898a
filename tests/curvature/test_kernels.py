"""`gram` and `ntk` against Jacobians of autograd."""

import pytest
import torch

from oracles.compare import assert_close
from oracles.curvature import joint, model_jacobian, output_hessian
from oracles.estimator_cases import LOSSES, MODELS, make
from tnkfac.curvature import gram, ntk

EXACT = 1e-9


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


each_model = pytest.mark.parametrize("name", MODELS)
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


@each_model
def test_ntk(name: str) -> None:
    model, data = make(name)
    x = data[0][0]
    jacobian = model_jacobian(model, x).flatten(1, -2).transpose(0, 1).flatten(0, 1)
    assert_close(ntk(model, x), jacobian @ jacobian.T, EXACT)


@each_reduction
@each_loss
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d", "attention", "other parameters"])
def test_gram(name: str, loss: str, reduction: str) -> None:
    """`V^T V` with `V V^T` the Gauss-Newton matrix, and its order."""
    model, data = make(name, loss)
    loss_fn = LOSSES[loss](reduction=reduction)
    found = gram(model, loss_fn, data)
    x, y = joint(data)
    outputs = model(x).detach()
    samples, classes = outputs.shape
    jacobian = model_jacobian(model, x)  # [N, C, P]
    hessian = output_hessian(loss_fn, outputs, y).view(samples, classes, samples, classes)
    roots = []
    for n in range(samples):
        block = hessian[n, :, n]
        if loss == "cross-entropy":
            p = outputs[n].softmax(0)
            scale = len(x) ** -0.5 if reduction == "mean" else 1.0
            root = (torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())) * scale
        else:
            root = block.diagonal().sqrt().diag()
        assert_close(root @ root.T, block, EXACT)
        roots.append(root)
    v = torch.stack([jacobian[n].T @ roots[n] for n in range(samples)])  # [N, P, C]
    rows = v.permute(2, 0, 1).flatten(0, 1)
    assert_close(found, rows @ rows.T, EXACT)


def test_kernels_form_rows_a_few_channels_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from tnkfac.curvature.estimators import ntk as kernels

    model, data = make("conv_transpose1d")
    expected = ntk(model, data[0][0])
    monkeypatch.setattr(kernels, "MOST", 200)
    assert_close(ntk(model, data[0][0]), expected, 1e-12)
