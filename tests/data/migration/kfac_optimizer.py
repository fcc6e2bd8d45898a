"""A loop in the form of the training script of KFAC-Pytorch."""

import torch
from optimizers import KFACOptimizer
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR


def train(model, loader):
    criterion = nn.CrossEntropyLoss()
    optimizer = KFACOptimizer(
        model,
        lr=0.05,
        momentum=0.9,
        stat_decay=0.9,
        damping=0.01,
        kl_clip=0.01,
        weight_decay=1e-4,
        TCov=2,
        TInv=4,
    )
    scheduler = MultiStepLR(optimizer, [15], gamma=0.1)
    losses = []
    for x, y in loader:
        optimizer.zero_grad()
        outputs = model(x)
        loss = criterion(outputs, y)
        if optimizer.steps % optimizer.TCov == 0:
            optimizer.acc_stats = True
            with torch.no_grad():
                sampled_y = torch.multinomial(outputs.softmax(dim=1), 1).squeeze()
            loss_sample = criterion(outputs, sampled_y)
            loss_sample.backward(retain_graph=True)
            optimizer.acc_stats = False
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses
