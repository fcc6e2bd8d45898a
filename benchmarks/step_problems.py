"""Networks and optimizers whose steps are measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional

import tnkfac

NEVER = 10**9
CLASSES = 100
Build = Callable[[nn.Module], Any]


def sgd(model: nn.Module) -> Any:
    """What all others are divided by."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def singd(structures: str, approx: str, T: int) -> Build:
    """SINGD at its defaults, but for these."""
    return lambda m: tnkfac.SINGD(m.parameters(), structures=structures, kfac_approx=approx, T=T)


def reference(model: nn.Module) -> Any:
    """The ``singd`` package for what it supports, in the same setting."""
    from singd.optim.optimizer import SINGD

    supported = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    params = [p for m in supported for p in m.parameters()]
    structures = ("diagonal", "diagonal")
    return SINGD(
        model, params=[{"params": params}], T=1, kfac_approx="reduce", structures=structures
    )


OPTIMIZERS: dict[str, Build] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters()),
    "SINGD diagonal, reduce, T=1": singd("diagonal", "reduce", 1),
    "SINGD diagonal, reduce, no update": singd("diagonal", "reduce", NEVER),
    "SINGD diagonal, expand, T=1": singd("diagonal", "expand", 1),
    "SINGD diagonal, expand, no update": singd("diagonal", "expand", NEVER),
    "SINGD block32diagonal, reduce, T=1": singd("block32diagonal", "reduce", 1),
    "SINGD block32diagonal, reduce, no update": singd("block32diagonal", "reduce", NEVER),
    "SINGD auto, reduce, T=1": singd("auto", "reduce", 1),
    "SINGD auto, reduce, no update": singd("auto", "reduce", NEVER),
    "KFAC auto, reduce, factors at every step": lambda m: tnkfac.KFAC(
        m.parameters(), kfac_approx="reduce", inv_update_steps=NEVER
    ),
    "KFAC auto, reduce, no update": lambda m: tnkfac.KFAC(
        m.parameters(), kfac_approx="reduce", factor_update_steps=NEVER, inv_update_steps=NEVER
    ),
    "singd diagonal, reduce, T=1": reference,
}
TALK = "SINGD diagonal, reduce, T=1"
REFERENCE = "singd diagonal, reduce, T=1"


@dataclass
class Problem:
    """A network and its batch.

    Attributes:
        args: Of the command line.
        arch: Name of a torchvision network.
        batch: Samples.
        size: Pixels of a side.
    """

    args: argparse.Namespace
    arch: str
    batch: int
    size: int

    def prepare(self, build: Build) -> tuple[nn.Module, Any, Callable[[], None]]:
        """Model, optimizer, and a function that does a step."""
        args = self.args
        torch.manual_seed(0)
        more = {"image_size": self.size} if self.arch.startswith("vit") else {}
        model = torchvision.models.get_model(self.arch, num_classes=CLASSES, **more)
        x = torch.randn(self.batch, 3, self.size, self.size, device=args.device)
        y = torch.randint(CLASSES, (self.batch,), device=args.device)
        model = model.to(args.device).train()
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
            x = x.to(memory_format=torch.channels_last)
        optimizer = build(model)
        call: Any = torch.compile(model) if args.compile else model
        half = torch.autocast(args.device, torch.bfloat16) if args.autocast else nullcontext()

        def step() -> None:
            optimizer.zero_grad()
            with half:
                loss = functional.cross_entropy(call(x), y)
            loss.backward()
            optimizer.step()

        return model, optimizer, step
