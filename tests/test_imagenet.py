"""The ImageNet script on a small folder of JPEG files, as a user would start it."""

import csv
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import imagenet
import pytest
import torch
from imagenet_data import Batches, MissingDataError, make_folder
from imagenet_logs import EPOCHS, Table
from imagenet_options import build_model, build_optimizer, checked, parser

from distributed.launching import PATHS, launch

SCRIPT = Path(imagenet.__file__)
SMALL = ["--arch", "resnet18", "--size", "32", "--batch-size", "16", "--workers", "0"]
SMALL += ["--threads", "1", "--device", "cpu", "--log-every", "1", "--warm-up", "0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes, 192 images to train with, 48 to test with."""
    found = tmp_path_factory.mktemp("images")
    make_folder(found)
    return found


def start(*arguments: str, folder: Path | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, PATHS))},
    )


def finished(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text[-3000:]
    return text


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_two_epochs_on_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option of the loop that needs no other process, and every file that is written."""
    extra = ["--data", str(folder), "--out", str(tmp_path), "--epochs", "2", "--accumulate", "2"]
    extra += ["--clip-grad-norm", "1", "--mixup", "0.2", "--ema", "0.9", "--channels-last"]
    extra += ["--autocast", "bf16", "--structures", "diagonal", "--diagnose-every", "5"]
    extra += ["--tensorboard", "--lr", "0.003"]
    imagenet.main([*SMALL, *extra])
    text = "".join(capsys.readouterr())
    assert "epoch 2: loss" in text
    assert "img/s" in text
    steps, epochs = rows(tmp_path / "steps.csv"), rows(tmp_path / "epochs.csv")
    assert [int(row["step"]) for row in steps] == list(range(1, 13))
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert all(float(row["grad_norm"]) > 0 for row in steps)
    assert float(epochs[-1]["loss"]) < 3
    curvature = rows(tmp_path / "curvature.csv")
    assert {row["step"] for row in curvature} == {"5", "10"}
    assert all(float(row["condition_input"]) >= 1 for row in curvature)
    assert all(float(row["update_rms"]) > 0 for row in curvature)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert list((tmp_path / "tensorboard").iterdir())
    model = build_model("resnet18", 4)
    model.load_state_dict(torch.load(tmp_path / "weights.pt"))


@pytest.mark.parametrize("name", ["singd", pytest.param("kfac", marks=pytest.mark.slow)])
def test_killed_and_resumed_it_ends_with_the_same_weights(
    name: str, folder: Path, tmp_path: Path
) -> None:
    """kill -9 at a random step, in the middle of an epoch or not; bit for bit."""
    options = [*SMALL, "--data", str(folder), "--epochs", "2", "--save-every", "5"]
    options += ["--optimizer", name, "--structures", "diagonal", "--ema", "0.9", "--mixup", "0.2"]
    options += ["--interval", "3"]
    finished(start(*options, "--out", str(tmp_path / "whole")))
    fatal = random.SystemRandom().randrange(2, 23)
    process = start(*options, "--out", str(tmp_path / "killed"))
    table = tmp_path / "killed" / "steps.csv"
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if table.exists() and len(table.read_text(encoding="utf-8").splitlines()) > fatal:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "weights.pt").exists()
    text = finished(start(*options, "--out", str(tmp_path / "killed")))
    assert ("Going on from step" in text) == (fatal > 6) or fatal in (5, 6), (fatal, text)
    expected, found = (torch.load(tmp_path / run / "weights.pt") for run in ("whole", "killed"))
    for key, value in expected.items():
        assert torch.equal(found[key], value), (fatal, key)
    same = [
        [[row[key] for key in ("step", "loss", "top1")] for row in rows(tmp_path / run / table)]
        for run in ("whole", "killed")
        for table in ("steps.csv", "epochs.csv")
    ]
    assert same[0] == same[2]
    assert same[1] == same[3]


@pytest.mark.parametrize("name", ["squeezenet1_1", "vit_b_32", "test_vit", "test_byobnet"])
def test_networks_for_one_size_are_built_for_it(name: str) -> None:
    """Of torchvision and of timm."""
    if name.startswith("test_"):
        pytest.importorskip("timm")
    assert build_model(name, 5, 64)(torch.randn(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.slow
def test_the_commands_of_its_page(folder: Path, tmp_path: Path) -> None:
    """Those that make their data as they stand, the others on a small folder and two processes."""
    page = (SCRIPT.parents[1] / "docs" / "imagenet.md").read_text(encoding="utf-8")
    small, whole = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    commands = [shlex.split(line) for line in small.splitlines()]
    assert [words[:2] for words in commands] == [["python", "examples/imagenet.py"]] * 2
    for words in commands:
        finished(start(*words[2:], folder=tmp_path))
    assert len(rows(tmp_path / "imagenet-run" / "epochs.csv")) == 2
    few = [
        "--epochs",
        "1",
        "--size",
        "32",
        "--batch-size",
        "32",
        "--workers",
        "0",
        "--threads",
        "1",
    ]
    for number, line in enumerate(whole.splitlines()):
        program, *words = shlex.split(line.replace("/data/imagenet", str(folder)))
        words = [*words[words.index("examples/imagenet.py") + 1 :], *few]
        words += ["--out", str(tmp_path / str(number))]
        if program == "torchrun":
            launch(str(SCRIPT), 2, *words)
        else:
            finished(start(*words))
        assert len(rows(tmp_path / str(number) / "epochs.csv")) == 1


@pytest.mark.parametrize("kind", ["--ddp", "--fsdp"])
def test_two_processes_under_torchrun(kind: str, folder: Path, tmp_path: Path) -> None:
    """The loss falls, and the weights are those of a network that runs alone."""
    options = [*SMALL, "--data", str(folder), "--epochs", "1", "--batch-size", "8", kind]
    options += ["--structures", "diagonal", "--ema", "0.9", "--accumulate", "2", "--out"]
    text = launch(str(SCRIPT), 2, *options, str(tmp_path), "--grad-worker-fraction", "0.5")
    assert "epoch 1: loss" in text
    assert len(rows(tmp_path / "epochs.csv")) == 1
    model = build_model("resnet18", 4)
    model.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert all(p.isfinite().all() for p in model.parameters())


def test_images_that_cannot_be_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And counted; the next one is taken in their place."""
    make_folder(tmp_path / "data", train=8, val=2)
    broken = tmp_path / "data" / "train" / "class_1" / "0003.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    empty = tmp_path / "data" / "val" / "class_0" / "0000.jpg"
    empty.write_bytes(b"")
    options = ["--data", str(tmp_path / "data"), "--epochs", "1", "--out", str(tmp_path / "run")]
    imagenet.main([*SMALL, *options, "--structures", "diagonal"])
    text = capsys.readouterr().out
    assert f"{broken} cannot be read" in text
    assert f"{empty} cannot be read" in text
    assert "2 images could not be read" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --data FOLDER, or --fake-data"),
        (["--data", "/nowhere"], "/nowhere has no folder 'train'"),
        (["--fake-data", "8", "--batch-size", "16"], "8 images do not fill a batch of 16"),
        (["--fake-data", "--arch", "resnet_of_mine"], "--arch resnet_of_mine"),
        (["--fake-data", "--structures", "dens"], "dens"),
        (["--fake-data", "--ddp"], "for processes that torchrun has started"),
        (["--ddp", "--fsdp"], "choose one"),
        (["--structures", "dense", "dense", "dense"], "one name, or one for inputs"),
        (["--accumulate", "0"], "--accumulate: at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_with_the_arguments_is_said(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        imagenet.main([*SMALL, "--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["singd", "kfac", "sgd", "adamw"])
def test_options_reach_the_optimizer(optimizer: str) -> None:
    argv = ["--fake-data", "--optimizer", optimizer, "--lr", "0.02", "--weight-decay", "0.3"]
    argv += ["--structures", "dense", "diagonal", "--interval", "7", "--damping", "0.1"]
    args = checked(parser(), argv)
    model = build_model("resnet18", 4)
    built: Any = build_optimizer(args, model)
    group = built.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.3)
    if optimizer in ("singd", "kfac"):
        assert group["structures"] == ("dense", "diagonal")
        assert group["damping"] == 0.1
        assert group["kfac_approx"] == "reduce"
        intervals = {"singd": ["T"], "kfac": ["factor_update_steps", "inv_update_steps"]}
        assert {group[name] for name in intervals[optimizer]} == {7}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_batches_of_all_processes_are_the_whole(world: int, seed: int | None) -> None:
    """Each image once; without a seed to the last one, with one in whole batches."""
    every = [Batches(23, 4, rank, world, seed) for rank in range(world)]
    seen = [
        index
        for batches in every
        for number, batch in enumerate(batches)
        for _, index in batch[: batches.real(number)]
    ]
    whole = 23 if seed is None else 23 // (4 * world) * 4 * world
    assert len(seen) == len(set(seen)) == whole


def test_batches_go_on_where_they_were() -> None:
    """And every epoch has an order of its own."""
    batches = Batches(40, 4, 0, 1, 3)
    first = list(batches)
    batches.first = 6
    assert list(batches) == first[6:]
    batches.first, batches.epoch = 0, 1
    assert [i for b in batches for _, i in b] != [i for b in first for _, i in b]


def test_tables_drop_what_is_made_again(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.csv", EPOCHS, 0)
    for step in (2, 4, 6):
        table.add(step=step, epoch=1, loss=0.5, top1=0, top5=0, seconds=1)
    again = Table(tmp_path / "t.csv", EPOCHS, 4)
    assert [row["step"] for row in rows(tmp_path / "t.csv")] == ["2", "4"]
    assert again.column("loss") == [0.5, 0.5]


def test_no_image_at_all(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=1, train=1, val=1)
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"")
    args = checked(parser(), ["--data", str(tmp_path), "--batch-size", "1", "--workers", "0"])
    train, _, _ = imagenet.loaders(args, 0, 1)
    with pytest.raises(MissingDataError, match="None of the images"):
        next(iter(train))
