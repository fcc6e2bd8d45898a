"""A loop in the form of the examples of kfac-pytorch."""

import torch
from kfac.preconditioner import KFACPreconditioner
from torch.nn import functional


def train(model, loader):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    preconditioner = KFACPreconditioner(
        model,
        factor_update_steps=2,
        inv_update_steps=4,
        damping=0.003,
        kl_clip=0.05,
        lr=lambda step: optimizer.param_groups[0]["lr"],
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 20)
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        preconditioner.step()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses
