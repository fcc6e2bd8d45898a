"""A loop in the form of the examples of singd."""

from singd.optim.optimizer import SINGD
from torch import nn


def train(model, loader):
    loss_function = nn.CrossEntropyLoss()
    optimizer = SINGD(
        model,
        lr=0.05,
        momentum=0.9,
        damping=0.01,
        weight_decay=1e-4,
        T=2,
        lr_cov=0.05,
        structures=("dense", "diagonal"),
        kfac_approx="reduce",
    )
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = loss_function(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
