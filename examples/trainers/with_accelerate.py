"""SINGD under Hugging Face Accelerate: accumulation, clipping, bfloat16, checkpoints.

python examples/trainers/with_accelerate.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from task import digits, network, options
from torch.utils.data import DataLoader

import tnkfac


def main(argv: list[str] | None = None) -> tuple[Path, float]:
    """Train; returns the last checkpoint and the last loss."""
    args = options(__doc__).parse_args(argv)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    model = network()
    optimizer = tnkfac.SINGD(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    loader = DataLoader(digits(), batch_size=32)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    first = 0
    if args.resume is not None:
        accelerator.load_state(str(args.resume))
        first = int(args.resume.name.removeprefix("epoch_"))
    for epoch in range(first, args.epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        saved = args.out / f"epoch_{epoch + 1}"
        accelerator.save_state(str(saved))
    accelerator.print(f"loss {loss.item():.4f}, checkpoint {saved}")
    return saved, loss.item()


if __name__ == "__main__":
    main()
