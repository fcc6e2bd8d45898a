"""The ImageNet script where data are damaged, and where nothing can be written."""

import io
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagenet_data
import pytest
from imagenet_data import Folder, Images, MissingDataError, gratings, image_files, sources
from imagenet_options import checked, parser
from PIL import Image
from torchvision import transforms

FORMATS = {"png": "png", "jpg": "jpeg", "bmp": "bmp", "tif": "tiff", "gif": "gif", "webp": "webp"}


def content(ending: str) -> bytes:
    """A whole file."""
    file = io.BytesIO()
    gratings(1, 0, 16).save(file, FORMATS[ending])
    return file.getvalue()


def images_of(files: dict[str, bytes], folder: Path) -> Images:
    """Of one class."""
    own = folder / "only"
    own.mkdir()
    for name, data in files.items():
        (own / name).write_bytes(data)
    cropped = transforms.Compose([transforms.RandomResizedCrop(8), transforms.ToTensor()])
    return Images(Folder(folder), cropped, seed=0)


# ---------------------------------------------------------------- damaged images


def damaged(ending: str, count: int) -> Iterator[bytes]:
    """Files that are cut off, or in which some bits are others."""
    whole, chance = content(ending), random.Random(7)
    for number in range(count):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[chance.randrange(len(data)) :]
        for _ in range(number % 3):
            # more often in headers
            place = chance.randrange(min(len(data), 128) if number % 2 else len(data))
            data[place] ^= 1 << chance.randrange(8)
        yield bytes(data)


def readable(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            picture.convert("RGB").load()
    except Exception:
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", FORMATS)
def test_a_damaged_image_is_skipped_and_named(ending: str, tmp_path: Path) -> None:
    """Or read, if Pillow reads it, which looks at what is in a file and not at its name."""
    files = {f"{i:03d}.jpg": data for i, data in enumerate(damaged(ending, 150))}
    images = images_of({**files, "whole.jpg": content(ending)}, tmp_path)
    named = 0
    for index, (file, _) in enumerate(images.source.samples):
        picture, label, unread = images[0, index]
        assert picture.shape == (3, 8, 8)
        assert label == 0
        assert unread == ("" if readable(Path(file)) else file)
        named += bool(unread)
    assert named > 20


def large_png() -> bytes:
    data = bytearray(content("png"))
    data[16:24] = struct.pack(">2I", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def large_bmp() -> bytes:
    data = bytearray(content("bmp"))
    data[18:26] = struct.pack("<2i", 60000, 60000)
    return bytes(data)


def large_gif() -> bytes:
    data = bytearray(content("gif"))
    data[6:10] = struct.pack("<2H", 60000, 60000)
    return bytes(data)


def large_tif() -> bytes:
    """Width and height are the entries of tags 256 and 257."""
    data = bytearray(content("tif"))
    (place,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, place)
    for entry in range(place + 2, place + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] in (256, 257):
            struct.pack_into("<HII", data, entry + 2, 4, 1, 60000)
    return bytes(data)


@pytest.mark.parametrize("make", [large_png, large_bmp, large_gif, large_tif])
def test_an_image_that_says_to_be_enormous_is_skipped(
    make: Callable[[], bytes], tmp_path: Path
) -> None:
    """Pillow refuses it with an error of its own kind."""
    ending = make.__name__.removeprefix("large_")
    images = images_of({"0.jpg": make(), "1.jpg": content(ending)}, tmp_path)
    file = images.source.samples[0][0]
    with pytest.raises(Image.DecompressionBombError):
        Image.open(file)
    assert images[0, 0][2] == file


@pytest.mark.parametrize("error", [MemoryError, struct.error, IndexError, RecursionError, KeyError])
def test_whatever_reading_raises(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_of({"0.png": content("png"), "1.png": content("png")}, tmp_path)

    def load(path: str) -> Any:
        if path.endswith("0.png"):
            raise error("what it found")
        return gratings(0, 0, 8)

    monkeypatch.setattr(imagenet_data, "default_loader", load)
    assert images[0, 0][2] == images.source.samples[0][0]
    monkeypatch.setattr(imagenet_data, "default_loader", lambda path: load("0.png"))
    with pytest.raises(MissingDataError, match=r"None of the images.*what it found"):
        images[0, 0]


# ---------------------------------------------------------------- folders


def tree(root: Path, *names: str) -> None:
    """Folders with an image each; ``a -> b`` for a link."""
    for name in names:
        place, _, target = name.partition(" -> ")
        path = root / place
        if target:
            path.symlink_to(target)
        else:
            path.mkdir(parents=True, exist_ok=True)
            (path / f"{path.name}.png").write_bytes(content("png"))


CLASSES: dict[str, tuple[list[str], str]] = {
    "val lacks one": (["train/a", "train/b", "val/b"], r"val has no folder .* 1 .*train: a\."),
    "val has one more": (["train/a", "val/a", "val/b"], r"train has no folder .* 1 .*val: b\."),
    "another name": (["train/a", "val/A"], r"val has no folder .* 1 .*train: a\."),
    "many": ([*(f"train/{i}" for i in range(8)), "val/0"], r"7 .*train: 1, 2, 3, 4, 5, \.\.\."),
    "without images": (["train/a", "val/a", "val/a/sub"], r"val/a: no images"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_train_and_val_need_the_same_classes(case: str, tmp_path: Path) -> None:
    """Labels are places in the list of folders."""
    names, message = CLASSES[case]
    tree(tmp_path, *names)
    if case == "without images":
        for path in (tmp_path / "val").rglob("*.png"):
            path.unlink()
    with pytest.raises(MissingDataError, match=message) as caught:
        sources(checked(parser(), ["--data", str(tmp_path)]))
    assert "\n" not in str(caught.value)


LINKS: dict[str, tuple[list[str], list[str]]] = {
    "to itself": (["a", "a/loop -> ."], ["a/a.png"]),
    "to all classes": (["a", "a/loop -> .."], ["a/a.png"]),
    "to what has all classes": (["a", "a/loop -> ../.."], ["a/a.png"]),
    "between folders": (
        ["a/x", "a/y", "a/x/there -> ../y", "a/y/back -> ../x"],
        ["a/x/x.png", "a/y/y.png"],
    ),
    "two that double": (["a", "a/one -> .", "a/two -> ."], ["a/a.png"]),
    "a class that is all classes": (["a", "loop -> ."], ["a/a.png"]),
    "elsewhere": (["../else", "a -> ../else"], ["a/else.png"]),
    "elsewhere, twice": (
        ["../else", "a", "a/x -> ../../else", "a/y -> x"],
        ["a/a.png", "a/x/else.png"],
    ),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_do_not_multiply_images(case: str, tmp_path: Path) -> None:
    """They are followed, but not in a circle."""
    names, expected = LINKS[case]
    root = tmp_path / "some" / "train"
    root.mkdir(parents=True)
    tree(root, *names)
    found = [os.path.relpath(file, root) for file, _ in Folder(root).samples]
    assert found == expected


def test_the_order_is_that_of_torchvision(tmp_path: Path) -> None:
    """So that runs that were begun with it go on with the same images."""
    datasets = pytest.importorskip("torchvision.datasets")
    tree(tmp_path, "b/y", "b", "b/x/deep", "b/x", "b/x-1", "B", "a/2", "a/10", "c -> a")
    expected = datasets.ImageFolder(str(tmp_path))
    found = Folder(tmp_path)
    assert found.samples == expected.samples
    assert found.classes == expected.classes
    assert len(image_files(tmp_path / "b")) == 5
