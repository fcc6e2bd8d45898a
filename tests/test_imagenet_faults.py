"""The ImageNet script where data are damaged, and where nothing can be written."""

import io
import os
from pathlib import Path

import pytest
from imagenet_data import Folder, Images, MissingDataError, gratings, image_files, sources
from imagenet_options import checked, parser
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
