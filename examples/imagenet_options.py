"""What ``imagenet.py`` can be told on its command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tnkfac

EXAMPLES = """\
examples:
  python examples/imagenet.py --fake-data 512 --arch resnet18 --size 64 --epochs 2
  python examples/imagenet.py --data /data/imagenet --arch resnet50 --autocast bf16 --channels-last
  torchrun --nproc-per-node=8 examples/imagenet.py --data /data/imagenet --arch convnext_tiny --ddp
  torchrun --nproc-per-node=8 examples/imagenet.py --data /data/imagenet --arch vit_b_16 --fsdp
A run that was interrupted goes on with the same command: all it needs is in --out.
"""
OPTIMIZERS = ("singd", "kfac", "sgd", "adamw")


def parser() -> argparse.ArgumentParser:
    """The parser."""
    found = argparse.ArgumentParser(
        description="Train an image classifier with SINGD, KFAC, SGD or AdamW.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = found.add_argument_group("data")
    data.add_argument("--data", metavar="FOLDER", help="with train/CLASS/ and val/CLASS/")
    data.add_argument("--fake-data", type=int, nargs="?", const=1024, default=0, metavar="N")
    data.add_argument("--fake-classes", type=int, default=10)
    data.add_argument("--make-data", metavar="FOLDER", help="write a small data set, and stop")
    data.add_argument("--size", type=int, default=224, help="pixels")
    data.add_argument("--least-crop", type=float, default=0.08, help="smallest part of an image")
    data.add_argument("--batch-size", type=int, default=64, help="of each process")
    data.add_argument("--workers", type=int, default=4, help="that read images, of each process")
    model = found.add_argument_group("model")
    model.add_argument("--arch", default="resnet50", help="of torchvision, or timm")
    model.add_argument("--ema", type=float, default=0.0, metavar="DECAY", help="average weights")
    model.add_argument("--channels-last", action="store_true")
    model.add_argument("--compile", action="store_true")
    loss = found.add_argument_group("loss")
    loss.add_argument("--label-smoothing", type=float, default=0.1)
    loss.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA")
    step = found.add_argument_group("optimizer")
    step.add_argument("--optimizer", choices=OPTIMIZERS, default="singd")
    step.add_argument("--lr", type=float, default=1e-3)
    step.add_argument("--weight-decay", type=float, default=0.05)
    step.add_argument("--momentum", type=float, default=None)
    step.add_argument("--damping", type=float, default=None)
    step.add_argument("--structures", nargs="+", default=["auto"], help="one, or input and output")
    step.add_argument("--kfac-approx", choices=("expand", "reduce"), default="reduce")
    step.add_argument("--interval", type=int, default=10, help="steps between updates of curvature")
    step.add_argument("--grad-worker-fraction", type=float, default=1.0)
    step.add_argument("--epochs", type=int, default=90)
    step.add_argument("--warm-up", type=float, default=5.0, metavar="EPOCHS")
    step.add_argument("--accumulate", type=int, default=1, help="batches for each step")
    step.add_argument("--clip-grad-norm", type=float, default=None)
    step.add_argument("--autocast", choices=("bf16", "fp16"), default=None)
    run = found.add_argument_group("run")
    run.add_argument("--ddp", action="store_true", help="DistributedDataParallel, under torchrun")
    run.add_argument("--fsdp", action="store_true", help="fully_shard, under torchrun")
    run.add_argument("--device", choices=("cpu", "cuda"), default=None)
    run.add_argument("--threads", type=int, default=None, help="of the CPU, for each process")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--out", type=Path, default=Path("imagenet-run"))
    run.add_argument("--restart", action="store_true", help="do not go on from a checkpoint")
    run.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    run.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    run.add_argument("--diagnose-every", type=int, default=500, metavar="STEPS")
    run.add_argument("--tensorboard", action="store_true")
    return found


def checked(arguments: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse and compare options with each other."""
    args = arguments.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.ddp and args.fsdp:
        arguments.error("--ddp and --fsdp: choose one")
    if len(args.structures) > 2:
        arguments.error("--structures: one name, or one for inputs and one for outputs")
    for name in ("batch_size", "accumulate", "save_every", "log_every", "diagnose_every"):
        if getattr(args, name) < 1:
            arguments.error(f"--{name.replace('_', '-')}: at least 1")
    return args


def build_model(name: str, classes: int, size: int = 224) -> nn.Module:
    """A network of torchvision, or else of timm.

    Args:
        name: As in the list of torchvision, or in that of timm.
        classes: Number of classes.
        size: Pixels of an image along each axis; some networks are built for one size.

    Raises:
        ValueError: If neither has one of that name.
    """
    import torchvision

    if name in torchvision.models.list_models():
        fixed: dict[str, Any] = {}
        if name.startswith("vit_"):
            fixed["image_size"] = size
        elif name.startswith("maxvit"):
            fixed["input_size"] = (size, size)
        return torchvision.models.get_model(name, num_classes=classes, **fixed)
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"--arch {name}: not a network of torchvision, and timm is not installed "
            "(pip install timm)."
        ) from error
    if not timm.is_model(name):
        raise ValueError(f"--arch {name}: neither torchvision nor timm has a network so named.")
    config = timm.get_pretrained_cfg(name)
    fixed = {"img_size": size} if config is not None and config.fixed_input_size else {}
    return timm.create_model(name, num_classes=classes, **fixed)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that was asked for."""
    shared = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.momentum is not None and args.optimizer != "adamw":
        shared["momentum"] = args.momentum
    if args.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), **{"momentum": 0.9, **shared})
    if args.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **shared)
    curvature: dict[str, Any] = {
        "structures": args.structures[0] if len(args.structures) == 1 else tuple(args.structures),
        "kfac_approx": args.kfac_approx,
        "grad_worker_fraction": args.grad_worker_fraction,
        "decoupled_weight_decay": True,
        **({} if args.damping is None else {"damping": args.damping}),
    }
    if args.optimizer == "singd":
        return tnkfac.SINGD(model.parameters(), T=args.interval, **shared, **curvature)
    return tnkfac.KFAC(
        model.parameters(),
        factor_update_steps=args.interval,
        inv_update_steps=args.interval,
        **shared,
        **curvature,
    )
