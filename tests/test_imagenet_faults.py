"""The ImageNet script where data are damaged, and where nothing can be written."""

import io
import os
import random
import re
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imagenet
import imagenet_data
import imagenet_logs
import pytest
import torch
from checkpoints import Checkpoints, NotWrittenError, replacing
from imagenet_data import Folder, Images, MissingDataError, gratings, image_files, sources
from imagenet_logs import EPOCHS, Table
from imagenet_options import checked, parser
from PIL import Image
from torch import nn
from torchvision import transforms

from distributed.launching import launch

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


# ---------------------------------------------------------------- what cannot be written


@contextmanager
def full_disc(most: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_permission(folder: Path) -> Iterator[None]:
    """As somebody who may not write in a folder; the owner of all may."""
    mode = folder.stat().st_mode
    if os.geteuid() == 0:
        os.seteuid(65534)
    else:
        folder.chmod(0o500)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        else:
            folder.chmod(mode)


SMALL = ["--fake-data", "16", "--fake-classes", "3", "--size", "8", "--batch-size", "4"]
SMALL += ["--epochs", "1", "--workers", "0", "--device", "cpu", "--save-every", "1"]
SMALL += ["--log-every", "1", "--structures", "diagonal", "--out"]


def network(name: str, classes: int, size: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, classes))


def draw(logs: Any, title: str) -> Path:
    return Path(logs.folder / "curves.png")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a second: a small network, and no picture."""
    monkeypatch.setattr(imagenet, "build_model", network)
    monkeypatch.setattr(imagenet_logs.Logs, "draw", draw)


def complaint(status: int, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        imagenet.main([*SMALL, str(out)])
    assert stopped.value.code == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    *_, last = said.splitlines()
    assert said.count("error") == 1
    assert last.startswith("imagenet.py: error: ")
    return last


FAULTS: dict[str, tuple[str, Callable[[Path], Any], str, int]] = {
    "checkpoint, full": ("save", lambda out: full_disc(1000), "step_000000003 .*too large", 2),
    "checkpoint, fuller": ("save", lambda out: full_disc(0), "step_000000003 .*too large", 2),
    "checkpoint, denied": (
        "save",
        lambda out: no_permission(out / "checkpoints"),
        "step_000000003 .*denied",
        2,
    ),
    "log, full": ("_log", lambda out: full_disc(10), "steps.csv .*too large", 2),
    "weights, full": ("finish", lambda out: full_disc(1000), "weights.pt .*too large", 4),
    "weights, denied": ("finish", no_permission, "weights.pt .*denied", 4),
}
"""Method that meets a fault at the third step, the fault, what is said, and which step is left."""


@pytest.mark.parametrize("case", FAULTS)
def test_a_run_goes_on_once_it_can_write_again(
    case: str,
    small: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the last checkpoint, to the same weights; what was there before stays."""
    where, fault, message, step = FAULTS[case]
    out = tmp_path / "run"
    imagenet.main([*SMALL, str(tmp_path / "undisturbed")])
    method = getattr(imagenet.Run, where)

    def meets_it(run: Any, *arguments: Any) -> Any:
        if where != "finish" and run.step != 3:
            return method(run, *arguments)
        (out / "weights.pt").write_bytes(b"of an earlier run")
        with fault(out):
            return method(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(imagenet.Run, where, meets_it)
        found = complaint(1, out, capsys)
    assert re.search(message, found), found
    checkpoints = Checkpoints(out / "checkpoints")
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.name == f"step_{step:09d}"
    assert (out / "weights.pt").read_bytes() == b"of an earlier run"
    assert imagenet.main([*SMALL, str(out)]) == 0
    assert f"Going on from step {step} of 4" in capsys.readouterr().out
    expected = torch.load(tmp_path / "undisturbed" / "weights.pt")
    for key, value in torch.load(out / "weights.pt").items():
        assert torch.equal(value, expected[key])
    assert len(Table(out / "steps.csv", imagenet_logs.STEPS, 4).rows) == 4
    assert not [path for path in out.rglob("*") if path.suffix in (".partial", ".old")]


@contextmanager
def file_at(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("not a folder")
    yield
    path.unlink()


STARTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file": (file_at, "/out cannot be written: Not a directory"),
    "below a file": (lambda out: file_at(out.parent), "/out cannot be written: Not a directory"),
    "a file for checkpoints": (lambda out: file_at(out / "checkpoints"), "/checkpoints"),
    "denied": (lambda out: no_permission(out.parents[1]), "/out cannot be written: .* denied"),
    "full": (lambda out: full_disc(0), "/out/steps.csv cannot be written: .* too large"),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_run_that_cannot_write_does_not_begin(
    case: str, small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And does once it can."""
    fault, message = STARTS[case]
    out = tmp_path / "folder" / "out"
    with fault(out):
        found = complaint(2, out, capsys)
    assert re.search(message, found), found
    assert imagenet.main([*SMALL, str(out)]) == 0


def test_images_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit):
        imagenet.main(["--make-data", str(tmp_path / "file")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"imagenet.py: error: {tmp_path / 'file'} cannot be written: ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["--ddp", "--fsdp"])
def test_all_processes_say_what_cannot_be_written(kind: str, tmp_path: Path) -> None:
    """Each in a line, and ends by itself; the only traceback is that of torchrun.

    Which ends what is left once the first has failed, perhaps while Python exits.
    """
    (tmp_path / "out").write_text("not a folder")
    options = [*SMALL, str(tmp_path / "out"), "--arch", "squeezenet1_1", "--size", "32", kind]
    with pytest.raises(AssertionError) as caught:
        launch(imagenet.__file__, 2, *options)
    text = str(caught.value).partition("\n...\n")[0]
    assert text.count(f"imagenet.py: error: {tmp_path / 'out'} cannot be written: ") == 2
    assert text.count("Traceback") == 1
    codes = set(re.findall(r"exitcode  : (-?\d+) ", text))
    assert {"2"} <= codes <= {"2", "-15"}


def test_a_file_has_its_name_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(b"before")
    for error, kind in ((OSError(28, "No space left"), NotWrittenError), (KeyError(), KeyError)):
        with pytest.raises(kind), replacing(path) as file:
            file.write(b"half of")
            raise error
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("weights.pt", b"before")]
    with replacing(path) as file:
        file.write(b"after")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("weights.pt", b"after")]


@pytest.mark.parametrize(
    "end", ["4,1,0.", "4", "4,1,0.5,0,0,1,surplus\n", "four,1,0.5,0,0,1\n", "4,1\n", "\xff\n"]
)
def test_a_row_that_was_cut_off_is_dropped(end: str, tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv", EPOCHS, 0)
    table.add(step=3, epoch=1, loss=0.5, top1=0, top5=0, seconds=1)
    with (tmp_path / "t.csv").open("a", encoding="latin-1") as file:
        file.write(end)
    assert [row["step"] for row in Table(tmp_path / "t.csv", EPOCHS, 4).rows] == ["3"]
