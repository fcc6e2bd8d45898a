"""SINGD under the Trainer of Transformers: accumulation, clipping, bfloat16, checkpoints.

python examples/trainers/with_transformers.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from task import digits, network, options
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import tnkfac


class Named(Dataset[dict[str, Tensor]]):
    """Digits under the names that the model takes."""

    def __init__(self) -> None:
        self.digits = digits()

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.digits[index]
        return {"pixel_values": image, "labels": label}


class Classifier(nn.Module):
    """Returns the loss beside the logits, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def main(argv: list[str] | None = None) -> tuple[Path, float]:
    """Train; returns the last checkpoint and the mean loss of the last epoch."""
    args = options(__doc__).parse_args(argv)
    model = Classifier()
    optimizer = tnkfac.SINGD(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    settings: Any = TrainingArguments(
        output_dir=str(args.out),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="epoch",
        logging_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, settings, train_dataset=Named(), optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=str(args.resume) if args.resume else None)
    saved = max(args.out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print(f"loss {losses[-1]:.4f}, checkpoint {saved}")
    return saved, losses[-1]


if __name__ == "__main__":
    main()
