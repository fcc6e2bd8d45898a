"""Random networks under random options, each trained three times: again, and from a file.

``python -m oracles.fuzz --runs 1000`` in ``tests`` prints what differs, by its seed.
"""

import argparse
import copy
import random
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tnkfac import KFAC, SINGD

__all__ = ["check"]

STEPS = 6


class Tokens(nn.Module):
    """Images ``[N, C, H, W]`` as tokens ``[N, H W, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Flatten."""
        return x.flatten(2).mT


class Residual(nn.Module):
    """A layer beside the identity, called twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Twice the same layer."""
        y: Tensor = x + self.layer(torch.tanh(self.layer(x)))
        return y


def convolution(rng: random.Random, channels: int) -> tuple[nn.Module, int]:
    """One of many kinds, which keeps ``[.., 6, 6]`` or changes it."""
    groups = rng.choice([1, 1, channels if channels < 9 else 1, 2 if channels % 2 == 0 else 1])
    out = groups * rng.randint(1, 3)
    kernel = rng.choice([1, 2, 3, (1, 3), (3, 2)])
    bias = rng.random() < 0.7
    if rng.random() < 0.25:
        return nn.ConvTranspose2d(channels, out, kernel, groups=groups, bias=bias), out
    options: dict[str, Any] = {"padding": rng.choice([0, 1, "same"]), "groups": groups}
    options["dilation"] = rng.choice([1, 1, 2])
    if options["padding"] != "same":
        options["stride"] = rng.choice([1, 1, 2])
        options["padding_mode"] = rng.choice(["zeros", "zeros", "circular"])
    if options["padding"] == 0:
        options["dilation"] = 1
    return nn.Conv2d(channels, out, kernel, bias=bias, **options), out


def network(rng: random.Random) -> nn.Module:
    """Convolutions, norms and activations, then tokens or a vector, then linear layers."""
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(rng.randint(1, 3)):
        layer, channels = convolution(rng, channels)
        layers.append(layer)
        if rng.random() < 0.3:
            layers.append(Residual(nn.Conv2d(channels, channels, 3, padding=1)))
        if rng.random() < 0.3:
            layers.append(rng.choice([nn.BatchNorm2d(channels), nn.GroupNorm(1, channels)]))
        layers.append(rng.choice([nn.ReLU(), nn.Tanh(), nn.GELU()]))
    if rng.random() < 0.4:
        layers += [Tokens(), nn.Linear(channels, 6, bias=rng.random() < 0.7), nn.LayerNorm(6)]
        layers += [nn.Linear(6, 4)]
    else:
        layers += [nn.Flatten(), nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 4)]
    return nn.Sequential(*layers)


def options(rng: random.Random) -> tuple[Callable[..., Any], dict[str, Any]]:
    """An optimizer with arguments that go together."""
    sides = ["auto", "dense", "diagonal", "block3diagonal"]
    shared: dict[str, Any] = {
        "lr": rng.choice([1e-3, 1e-2, 0.1]),
        "momentum": rng.choice([0.0, 0.5, 0.9]),
        "weight_decay": rng.choice([0.0, 0.1]),
        "decoupled_weight_decay": rng.random() < 0.5,
        "kfac_approx": rng.choice(["expand", "reduce"]),
        "loss_average": rng.choice(["batch", "batch+sequence", None]),
        "grafting": rng.choice([1.0, "rms", "adam", "sgd", None]),
        "fallback": rng.choice(["adamw", "sgd"]),
        "skip_layers": rng.choice([(), (), ("LayerNorm",), ("0",)]),
        "damping": rng.choice([None, 1e-3, 0.1]),
        "kl_clip": rng.choice([None, None, 1e-2]),
    }
    if rng.random() < 0.6:
        more = ["hierarchical2_2", "triltoeplitz", "triutoeplitz", "triltopleftdiag"]
        pair = rng.choice(sides + more), rng.choice(sides + more)
        return SINGD, {
            **shared,
            "structures": pair,
            "T": rng.choice([1, 2, 3]),
            "alpha1": rng.choice([0.0, 0.5]),
            "lr_cov": rng.choice([0.01, 0.2]),
            "init": rng.choice(["first_batch", "identity"]),
            "normalize_lr_cov": rng.random() < 0.3,
            "max_state_ratio": rng.choice([None, None, 1.0]),
        }
    return KFAC, {
        **shared,
        "structures": (rng.choice(sides), rng.choice(sides)),
        "factor_update_steps": rng.choice([1, 2]),
        "inv_update_steps": rng.choice([1, 2, 3]),
        "compute_method": rng.choice(["eigen", "cholesky", "ekfac"]),
        "fisher_type": rng.choice(["empirical", "forward-only"]),
        "nesterov": rng.random() < 0.3,
    }


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same for the same number."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(4, (5,), generator=generator)


def train(model: nn.Module, optimizer: Any, steps: range, dtype: torch.dtype) -> None:
    """Steps with cross-entropy, over positions if there are any."""
    for step in steps:
        x, y = batch(step, dtype)
        optimizer.zero_grad()
        output = model(x)
        if output.ndim == 3:
            output = output.mean(1)
        nn.functional.cross_entropy(output, y).backward()
        optimizer.step()


def _working(rng: random.Random, dtype: torch.dtype) -> nn.Module:
    """A network whose kernels fit its inputs, with its lazy layers made."""
    for _ in range(100):
        model = network(rng).to(dtype)
        try:
            model(batch(0, dtype)[0])
        except RuntimeError:
            continue
        return model
    raise AssertionError("no network fits")


def built(seed: int) -> tuple[nn.Module, Any, torch.dtype, dict[str, Any]]:
    """The network and the optimizer of a seed, before any step."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice([torch.float32, torch.float64])
    model = _working(rng, dtype)
    torch.manual_seed(seed)
    for param in model.parameters():
        if param.ndim > 1:
            nn.init.kaiming_uniform_(param, a=2.0)
    cls, given = options(rng)
    return model, cls(model.parameters(), **given), dtype, {"optimizer": cls.__name__, **given}


def check(seed: int) -> str:
    """What is wrong with the network of a seed; empty if nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _difference(seed)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def _difference(seed: int) -> str:
    model, optimizer, dtype, given = built(seed)
    stop = random.Random(seed).randint(1, STEPS - 1)
    train(model, optimizer, range(stop), dtype)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(stop, STEPS), dtype)
    again, other, *_ = built(seed)
    train(again, other, range(STEPS), dtype)
    resumed, loaded, *_ = built(seed)
    resumed.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    train(resumed, loaded, range(stop, STEPS), dtype)
    for name, param in model.named_parameters():
        if not param.isfinite().all():
            return f"{name} is not finite: {given}"
        if not torch.equal(param, again.get_parameter(name)):
            return f"{name} differs in a second run: {given}"
        if not torch.equal(param, resumed.get_parameter(name)):
            return f"{name} differs after resuming at step {stop}: {given}"
    return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for number in range(arguments.first, arguments.first + arguments.runs):
        what = check(number)
        if what:
            failed += 1
            print(f"seed {number}: {what}", flush=True)
    print(f"{arguments.runs} networks, {failed} with a difference.")
    sys.exit(failed > 0)
