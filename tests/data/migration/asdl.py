"""A loop in the form of the examples of asdl."""

import torch
from asdl.precondition import KfacGradientMaker, PreconditioningConfig
from torch.nn import functional


def train(model, loader):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    config = PreconditioningConfig(
        data_size=32,
        damping=0.01,
        ema_decay=0.1,
        curvature_upd_interval=2,
        preconditioner_upd_interval=4,
        ignore_modules=["head"],
    )
    grad_maker = KfacGradientMaker(model, config, fisher_type="fisher_mc")
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        dummy_output = grad_maker.setup_model_call(model, x)
        grad_maker.setup_loss_call(functional.cross_entropy, dummy_output, y)
        _, loss = grad_maker.forward_and_backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
