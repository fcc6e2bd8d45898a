"""Images for ``imagenet.py``: read from folders or made up, in an order that can be gone on with.

What is drawn for an image depends on the seed, the epoch and its index alone, not on which worker
reads it or on where a run was interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Place = tuple[int, int]
"""Epoch and index of an image."""
Item = tuple[Tensor, int, str]
"""Image, class, and the file that could not be read in its place."""


class MissingDataError(Exception):
    """There are no images where they are said to be."""


def gratings(label: int, seed: int, size: int) -> Image.Image:
    """A picture of stripes whose direction and width tell the class, with noise."""
    generator = torch.Generator().manual_seed(seed)
    phase, shade = torch.rand(2, generator=generator).mul(2 * math.pi).tolist()
    angle, period = math.pi * label / 7, 4 + 3 * (label % 3)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    wave = torch.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period + phase)
    color = torch.tensor([math.sin(shade + channel) for channel in range(3)])
    picture = wave.unsqueeze(-1) * (0.6 + 0.3 * color) + 0.3 * color
    picture = picture + 0.4 * torch.randn(size, size, 3, generator=generator)
    pixels = picture.mul(50).add(128).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.numpy())


def make_folder(folder: Path, classes: int = 4, train: int = 48, val: int = 12) -> None:
    """Write a small data set as JPEG files, in the folders that ImageNet has.

    Args:
        folder: Where to.
        classes: How many.
        train: Images of each class to train with.
        val: Images of each class to test with.
    """
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            own = folder / part / f"class_{label}"
            own.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                seed = 1000 * label + index + (part == "val") * 500
                gratings(label, seed, 48).save(own / f"{index:04d}.jpg", quality=90)


class Gratings(Dataset[tuple[Image.Image, int]]):
    """Made-up images, as many as asked for."""

    def __init__(self, count: int, classes: int, size: int, first: int) -> None:
        self.count, self.size, self.first = count, size, first
        self.classes = [f"class_{label}" for label in range(classes)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        label = index % len(self.classes)
        return gratings(label, self.first + index, self.size), label


class Folder(Dataset[tuple[Image.Image, int]]):
    """Images in a folder for each class, in the order of torchvision's ``ImageFolder``.

    Args:
        root: The folder of these folders.

    Raises:
        MissingDataError: If a class has no images.
        OSError: If a folder cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.classes: list[str] = []
        self.samples: list[tuple[str, int]] = []
        for own in sorted(path for path in root.iterdir() if path.is_dir()):
            if _leads_back(own, root):
                continue
            files = image_files(own)
            if not files:
                kinds = ", ".join(IMG_EXTENSIONS)
                raise MissingDataError(f"{own}: no images for this class ({kinds}).")
            self.samples += [(file, len(self.classes)) for file in files]
            self.classes.append(own.name)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return default_loader(path), label


def image_files(folder: Path) -> list[str]:
    """All image files below a folder; links are followed, but none to a folder a second time."""
    found, seen = [], {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        found.append((place, sorted(f for f in files if f.lower().endswith(IMG_EXTENSIONS))))
        names, folders[:] = sorted(folders), []
        for name in names:
            real = os.path.realpath(os.path.join(place, name))
            if real not in seen and not _leads_back(Path(real), folder):
                seen.add(real)
                folders.append(name)
    return [os.path.join(place, file) for place, files in sorted(found) for file in files]


def _leads_back(link: Path, folder: Path) -> bool:
    """Whether something is a folder, or has it inside."""
    return folder.resolve().is_relative_to(link.resolve())


def _raise(error: OSError) -> None:
    raise error


class Images(Dataset[Item]):
    """A data set whose transforms draw the same for the same image of the same epoch.

    An image that cannot be read is replaced by the next one, and named.

    Args:
        source: Pictures and classes.
        transform: Of a picture to a tensor.
        seed: Of what is drawn.
    """

    def __init__(self, source: Any, transform: Any, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: Place) -> Item:
        epoch, index = place
        unread, last = "", None
        for offset in range(len(self.source)):
            try:
                picture, label = self.source[(index + offset) % len(self.source)]
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(hash((self.seed, epoch, index)) % 2**63)
                    return self.transform(picture), label, unread
            except Exception as error:  # a damaged file may raise anything
                unread, last = unread or self._file(index), error
        raise MissingDataError(f"None of the images can be read; of the last one: {last}") from last

    def _file(self, index: int) -> str:
        samples = getattr(self.source, "samples", None)
        return str(samples[index][0]) if samples else f"image {index}"


class Batches:
    """Places of the images of each batch of a process, from any batch of an epoch on.

    Args:
        count: Number of images.
        size: Images in a batch of one process.
        rank: Place of this process.
        world: Number of processes.
        seed: Of the order; None for the order of the data set, to the last image.
    """

    def __init__(self, count: int, size: int, rank: int, world: int, seed: int | None) -> None:
        self.count, self.size, self.rank, self.world, self.seed = count, size, rank, world, seed
        self.epoch = self.first = 0

    def __len__(self) -> int:
        whole = self.size * self.world
        return self.count // whole if self.seed is not None else -(-self.count // whole)

    def __iter__(self) -> Iterator[list[Place]]:
        order = torch.arange(self.count)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
            order = torch.randperm(self.count, generator=generator)
        whole = self.size * self.world
        for batch in range(self.first, len(self)):
            mine = order[batch * whole : (batch + 1) * whole][self.rank :: self.world]
            # a process without an image gets the first one, which does not count
            yield [(self.epoch, int(index)) for index in mine] or [(self.epoch, 0)]

    def real(self, batch: int) -> int:
        """How many images of a batch of this process count."""
        whole = self.size * self.world
        left = min(self.count - batch * whole, whole)
        return max(0, -(-(left - self.rank) // self.world))


def collate(items: list[Item]) -> tuple[Tensor, Tensor, list[str]]:
    """Images ``[N, 3, S, S]``, classes ``[N]``, and the files that could not be read."""
    images, labels, unread = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), [name for name in unread if name]


def sources(args: argparse.Namespace) -> tuple[Any, Any]:
    """Pictures and classes to train and to test with.

    Raises:
        MissingDataError: If the folder is not there, has no images, or has other classes to train
            than to test with; says what to do.
    """
    if args.fake_data:
        first = Gratings(args.fake_data, args.fake_classes, args.size, 0)
        return first, Gratings(max(args.fake_data // 4, 1), args.fake_classes, args.size, 10**6)
    if args.data is None:
        raise MissingDataError("No images: give --data FOLDER, or --fake-data.")
    folder = Path(args.data)
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise MissingDataError(
                f"{folder} has no folder {part!r} with a folder of images for each class. "
                "For ImageNet, extract the archives there; to try without, use --fake-data, or "
                f"make some: python examples/imagenet.py --make-data {folder}"
            )
    try:
        train, val = Folder(folder / "train"), Folder(folder / "val")
    except OSError as error:
        raise MissingDataError(f"{folder}: {error}") from error
    _compare(folder, train.classes, val.classes)
    return train, val


def _compare(folder: Path, train: list[str], val: list[str]) -> None:
    """Refuse classes that only one part has: labels are places in the list of folders."""
    for part, own, others in (("val", val, train), ("train", train, val)):
        lacking = sorted(set(others) - set(own))
        if lacking:
            names = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
            other = "train" if part == "val" else "val"
            raise MissingDataError(
                f"{folder / part} has no folder for {len(lacking)} of the classes in "
                f"{folder / other}: {names}. Both need the same ones."
            )


def loaders(args: argparse.Namespace, rank: int, world: int) -> tuple[Any, Any, int]:
    """Loaders of training and test images, and the number of classes."""
    train, val = sources(args)
    size = args.size
    end = [transforms.ToTensor(), transforms.Normalize(MEAN, SPREAD)]
    cropped = [
        transforms.RandomResizedCrop(size, scale=(args.least_crop, 1.0)),
        transforms.RandomHorizontalFlip(),
    ]
    centred = [transforms.Resize(round(size * 8 / 7)), transforms.CenterCrop(size)]
    found = []
    for source, first, seed in ((train, cropped, args.seed), (val, centred, None)):
        images = Images(source, transforms.Compose([*first, *end]), args.seed)
        batches = Batches(len(images), args.batch_size, rank, world, seed)
        found.append(
            DataLoader(
                images,
                batch_sampler=batches,
                num_workers=args.workers,
                collate_fn=collate,
                generator=torch.Generator(),  # of its own: a resumed run draws no more often
                pin_memory=args.device == "cuda",
                persistent_workers=args.workers > 0,
            )
        )
    if len(found[0]) == 0:
        raise MissingDataError(
            f"{len(train)} images do not fill a batch of {args.batch_size * world}. "
            "Give a smaller --batch-size."
        )
    return found[0], found[1], len(train.classes)
