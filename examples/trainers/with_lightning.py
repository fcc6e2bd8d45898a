"""SINGD under PyTorch Lightning: accumulation, clipping, bfloat16, checkpoints.

python examples/trainers/with_lightning.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from task import digits, network, options
from torch import Tensor
from torch.utils.data import DataLoader

import tnkfac


class Classifier(lightning.LightningModule):
    """The optimizer is made where any other would be."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = tnkfac.SINGD(self.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(argv: list[str] | None = None) -> tuple[Path, float]:
    """Train; returns the last checkpoint and the last loss."""
    args = options(__doc__).parse_args(argv)
    saved = ModelCheckpoint(dirpath=args.out, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="auto",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[saved],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(digits(), batch_size=32)
    trainer.fit(Classifier(), loader, ckpt_path=args.resume)
    loss = float(trainer.callback_metrics["loss"])
    print(f"loss {loss:.4f}, checkpoint {saved.last_model_path}")
    return Path(saved.last_model_path), loss


if __name__ == "__main__":
    main()
