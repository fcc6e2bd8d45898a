"""A loop that takes natural-gradient steps with the linear operators of curvlinops."""

import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from torch import nn


def train(model, loader):
    loss_function = nn.CrossEntropyLoss()
    params = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for x, y in loader:
        model.zero_grad()
        loss = loss_function(model(x), y)
        loss.backward()
        kfac = KFACLinearOperator(
            model,
            loss_function,
            params,
            [(x, y)],
            fisher_type="empirical",
            kfac_approx="expand",
            separate_weight_and_bias=False,
        )
        inverse = KFACInverseLinearOperator(kfac, damping=0.1, use_exact_damping=True)
        steps = inverse @ [p.grad for p in params]
        with torch.no_grad():
            for p, step in zip(params, steps, strict=True):
                p.sub_(0.1 * step)
        losses.append(loss.item())
    return losses
