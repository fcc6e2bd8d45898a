"""Train an image classifier on ImageNet, or on any folder of images, with SINGD or KFAC.

    python examples/imagenet.py --data /data/imagenet --arch resnet50 --autocast bf16
    torchrun --nproc-per-node=8 examples/imagenet.py --data /data/imagenet --ddp

Without data: ``--fake-data``, or ``--make-data FOLDER``, which writes a small set of JPEG files.
An interrupted run goes on with the same command, from the last checkpoint in ``--out``, to the same
weights as without the interruption. Also written there: ``steps.csv``, ``epochs.csv``,
``curvature.csv``, ``curves.png``, ``weights.pt``.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpoints import Checkpoints, NotWrittenError, in_first, replacing, writing
from imagenet_data import MissingDataError, loaders, make_folder
from imagenet_logs import Logs
from imagenet_options import build_model, build_optimizer, checked, parser
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

from tnkfac.optim.distributed import leave


class Average:
    """A moving average of the parameters, with the buffers as they are; zero decay for none."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.kept = {name: p.detach().clone() for name, p in self._params()} if decay else {}

    def _params(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after a step."""
        for name, param in self._params() if self.kept else ():
            self.kept[name].lerp_(param, 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and their averages."""
        for name, param in self._params() if self.kept else ():
            other = param.clone()
            param.copy_(self.kept[name])
            self.kept[name].copy_(other)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages."""
        return dict(self.kept)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore them."""
        for name, value in state.items():
            self.kept[name].copy_(value)


class Run:
    """One training run: model, optimizer, schedule, data, and where it stands."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rank, self.world = _processes()
        self.device = torch.device(args.device)
        self.checkpoints = Checkpoints(args.out / "checkpoints")
        in_first(args.out, self.checkpoints.prepare)
        self.train, self.val, self.classes = loaders(args, self.rank, self.world)
        torch.manual_seed(args.seed)
        random.seed(args.seed)
        np.random.seed(args.seed)
        self.module = build_model(args.arch, self.classes, args.size).to(self.device)
        if args.channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)
        self.model: nn.Module = self._wrapped()
        self.optimizer = build_optimizer(args, self.model)
        self.called: Any = torch.compile(self.model) if args.compile else self.model
        self.steps_per_epoch = max(1, len(self.train) // args.accumulate)
        self.steps = self.steps_per_epoch * args.epochs
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.autocast == "fp16")
        self.average = Average(self.module, args.ema)
        self.mixup = v2.MixUp(num_classes=self.classes, alpha=args.mixup) if args.mixup else None
        self.unread: set[str] = set()
        self.step = 0
        self._resume()
        self.logs: Logs | None = None
        in_first(args.out, self._open_logs)

    def _open_logs(self) -> None:
        self.logs = Logs(self.args.out, self.step, self.args.tensorboard)

    def _wrapped(self) -> nn.Module:
        if self.args.fsdp:
            mesh = init_device_mesh(self.args.device, (self.world,))
            return fully_shard(self.module, mesh=mesh)
        if self.args.ddp:
            return DistributedDataParallel(self.module)
        return self.module

    def _rate(self, step: int) -> float:
        """Warm-up, then a cosine to zero."""
        warm = self.args.warm_up * self.steps_per_epoch
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, self.steps - warm)))

    # ---------------------------------------------------------------- checkpoints

    def _others(self) -> dict[str, Any]:
        found = {"schedule": self.schedule, "average": self.average, "step": self.step}
        return {**found, "scaler": self.scaler} if self.scaler.is_enabled() else found

    def _resume(self) -> None:
        newest = None if self.args.restart else self.checkpoints.newest()
        if newest is None:
            return
        values = self.checkpoints.load(newest, self.model, self.optimizer, **self._others())
        self.step = values["step"]
        self.say(f"Going on from step {self.step} of {self.steps} ({newest}).")

    def save(self) -> None:
        """A checkpoint of where the run stands."""
        self.checkpoints.save(self.step, self.model, self.optimizer, **self._others())

    def say(self, text: str) -> None:
        """Print in one process."""
        if self.rank == 0:
            tqdm.write(text)

    # ---------------------------------------------------------------- training

    def fit(self) -> None:
        """Train from where the run stands to the end."""
        started = time.perf_counter()
        whole = self.args.batch_size * self.world * self.args.accumulate
        with tqdm(
            total=self.steps * whole,
            initial=self.step * whole,
            unit="img",
            unit_scale=True,
            disable=self.rank > 0,
            dynamic_ncols=True,
        ) as bar:
            while self.step < self.steps:
                epoch = self.step // self.steps_per_epoch
                bar.set_description(f"epoch {epoch + 1}/{self.args.epochs}")
                self._train(epoch, whole, bar)
                found = self.evaluate()
                if self.logs is not None:
                    seconds = time.perf_counter() - started
                    self.logs.epoch(step=self.step, epoch=epoch + 1, seconds=seconds, **found)
                text = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
                self.say(f"epoch {epoch + 1}: {text}")
                self.save()

    def _train(self, epoch: int, whole: int, bar: Any) -> None:
        """What is left of an epoch, in steps of so many images."""
        args, done = self.args, self.step % self.steps_per_epoch
        self.train.batch_sampler.epoch = epoch
        self.train.batch_sampler.first = done * args.accumulate
        batches = iter(self.train)
        for _ in range(done, self.steps_per_epoch):
            begun = time.perf_counter()
            row = self._one_step([next(batches) for _ in range(args.accumulate)])
            self.step += 1
            bar.update(whole)
            row["images_per_second"] = whole / (time.perf_counter() - begun)
            self._log(epoch, row)
            if self.step % args.save_every == 0 and self.step % self.steps_per_epoch:
                self.save()

    def _one_step(self, batches: list[Any]) -> dict[str, float]:
        args = self.args
        self.model.train()
        self.optimizer.zero_grad()
        losses, right, count = [], 0, 0
        for index, (images, labels, unread) in enumerate(batches):
            self._note(unread)
            images, labels = self._moved(images), labels.to(self.device, non_blocking=True)
            targets = labels
            if self.mixup is not None:
                images, targets = self.mixup(images, labels)
            with self._silent(index + 1 < len(batches)):
                with self._autocast():
                    outputs = self.called(images)
                    loss = F.cross_entropy(outputs, targets, label_smoothing=args.label_smoothing)
                self.scaler.scale(loss / len(batches)).backward()
            losses.append(loss.detach())
            right = right + (outputs.detach().argmax(1) == labels).sum()
            count += len(labels)
        norm = math.nan
        if args.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_grad_norm)
            norm = getattr(norm, "full_tensor", lambda norm=norm: norm)()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.average.update()
        if (self.step + 1) % args.log_every:
            return {}
        mean = torch.stack(losses).mean()
        return {"loss": float(mean), "top1": float(right) / count, "grad_norm": float(norm)}

    def _silent(self, more: bool) -> Any:
        """Keep processes from telling each other gradients that are not complete."""
        if self.args.fsdp:
            self.module.set_requires_gradient_sync(not more)
        elif self.args.ddp and more:
            return self.model.no_sync()
        return nullcontext()

    def _autocast(self) -> Any:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.args.autocast)
        return torch.autocast(self.args.device, dtype=kind) if kind else nullcontext()

    def _moved(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.args.channels_last else torch.contiguous_format
        return images.to(self.device, non_blocking=True, memory_format=layout)

    def _note(self, unread: list[str]) -> None:
        for name in unread:
            if name not in self.unread:
                self.unread.add(name)
                tqdm.write(f"{name} cannot be read; the next image is taken in its place.")

    def _log(self, epoch: int, row: dict[str, float]) -> None:
        if self.logs is None:
            return
        if "loss" in row:
            lr = float(self.optimizer.param_groups[0]["lr"])
            self.logs.step(step=self.step, epoch=epoch + 1, lr=lr, **row)
        if self.step % self.args.diagnose_every == 0:
            self.logs.diagnose(self.step, self.optimizer)

    # ---------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on the test images, of the averaged weights if there are any."""
        self.model.eval()
        self.average.swap()
        model = self.model if self.args.fsdp else self.module
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for batch, (images, labels, unread) in enumerate(self.val):
            self._note(unread)
            real = self.val.batch_sampler.real(batch)
            labels = labels[:real].to(self.device)
            with self._autocast():
                outputs = model(self._moved(images))[:real].float()
            best = outputs.topk(min(5, self.classes), dim=1).indices == labels.unsqueeze(1)
            losses = F.cross_entropy(outputs, labels, reduction="sum")
            sums[:3] += torch.stack([losses, best[:, :1].sum(), best.sum()])
            sums[3] += real
        if self.args.fsdp:
            self.module.reshard()  # without a backward pass the outermost parameters stay whole
        self.average.swap()
        if self.world > 1:
            dist.all_reduce(sums)
        loss, first, five, count = sums.tolist()
        return {"loss": loss / count, "top1": first / count, "top5": five / count}

    def finish(self) -> None:
        """Write weights and curves, and say what could not be read."""
        self.average.swap()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)
        if self.logs is not None:
            with replacing(self.args.out / "weights.pt") as file:
                torch.save(weights, file)
            picture = self.logs.draw(f"{self.args.arch}, {self.args.optimizer}")
            self.say(f"Weights: {self.args.out / 'weights.pt'}. Curves: {picture}.")
        if self.unread:
            names = ", ".join(sorted(self.unread)[:5])
            print(f"{len(self.unread)} images could not be read: {names}", flush=True)


def _processes() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def main(argv: list[str] | None = None) -> int:
    """Run the script; 2 for what is wrong with its arguments, 1 for what cannot be written."""
    options = parser()
    args = checked(options, argv)
    if args.make_data:
        return _make(Path(args.make_data))
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.ddp or args.fsdp:
        if "RANK" not in os.environ:
            options.error("--ddp and --fsdp are for processes that torchrun has started")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        run = Run(args)
    except (MissingDataError, NotWrittenError, ValueError, ImportError) as error:
        _stop(2, str(error))
    try:
        run.fit()
        run.finish()
    except (MissingDataError, NotWrittenError) as error:
        _stop(1, str(error).rstrip().splitlines()[-1])  # those before tell where a worker was
    leave()
    return 0


def _make(folder: Path) -> int:
    try:
        with writing(folder):
            make_folder(folder)
    except NotWrittenError as error:
        _stop(2, str(error))
    print(f"Images are in {folder}.")
    return 0


def _stop(status: int, text: str) -> NoReturn:
    """Say why in one line, below what has been said and drawn."""
    print(f"imagenet.py: error: {text}", file=sys.stderr, flush=True)
    leave()
    sys.exit(status)


if __name__ == "__main__":
    sys.exit(main())
