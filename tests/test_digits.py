"""The main job runs, and every layer that is called as a module is captured."""

import argparse
import csv
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tnkfac

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits.py"


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """One, as the example's `main` sets for the whole process, and back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_one_epoch_writes_table_picture_and_curves(
    digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert digits.main(["--epochs", "1", "--out", str(tmp_path), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    names = ("SINGD diagonal", "SINGD dense", "SGD", "AdamW")
    for word in (*names, "accuracy", "ms / step", "state MiB", "ConvTranspose2d"):
        assert word in text
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    with (tmp_path / "digits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 23 * len(names)
    assert {row["optimizer"] for row in rows} == set(names)


def test_all_structures_are_compared(
    digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--structures", "all", "--epochs", "1", "--out", str(tmp_path), "--device", "cpu"]
    assert digits.main(arguments) == 0
    text = capsys.readouterr().out
    with (tmp_path / "digits.csv").open(newline="") as file:
        last = {row["optimizer"]: float(row["loss"]) for row in csv.DictReader(file)}
    assert set(last) == set(digits.OPTIMIZERS)
    assert len(last) == 12
    for name, loss in last.items():
        assert name in text
        assert loss < 1.5, name


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("index", range(10))
def test_every_structure_learns_the_digits(digits: ModuleType, index: int, seed: int) -> None:
    name = f"SINGD {digits.STRUCTURES[index]}"
    curve, _ = digits.train(name, argparse.Namespace(seed=seed, epochs=15, device="cpu"))
    assert curve.accuracy >= 0.97
    assert curve.final_loss < 1e-4


def test_the_curves_keep_small_losses(digits: ModuleType, tmp_path: Path) -> None:
    losses = [2.5, 1.25e-9]
    curve = digits.Curve(losses=losses, seconds=[0.5, 1.0])
    digits.write_csv({"SINGD": curve}, tmp_path / "digits.csv")
    with (tmp_path / "digits.csv").open(newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == losses


@pytest.mark.parametrize("name", ["SINGD diagonal", "SINGD dense"])
def test_singd_reaches_97_percent(digits: ModuleType, name: str) -> None:
    curve, _ = digits.train(name, argparse.Namespace(seed=1, epochs=15, device="cpu"))
    assert curve.accuracy >= 0.97
    assert curve.final_loss < 1e-4


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--epochs", "0"], "at least 1"),
        (["--epochs", "x"], "--epochs"),
        (["--device", "nowhere"], "cannot use 'nowhere'"),
        (["--device", "meta"], "cannot use 'meta'"),
        (["--out", __file__], "--out"),
        (["--speed", "1"], "--speed"),
        (["--structures", "sparse"], "got 'sparse'. Supported: all, dense"),
        (["--structures", ""], "got ''"),
    ],
)
def test_bad_arguments_are_refused(
    digits: ModuleType,
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        digits.main(arguments)
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


def one_step(model: nn.Module, x: torch.Tensor) -> tnkfac.SINGD:
    optimizer = tnkfac.SINGD(model.parameters(), structures="diagonal", kfac_approx="reduce")
    F.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
    optimizer.step()
    return optimizer


def check(optimizer: tnkfac.SINGD, model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Exactly the parameters of ``kinds`` are captured and updated; batch norms fall back."""
    wanted = {
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for attribute, _ in module.named_parameters(recurse=False)
    }
    rows = optimizer.report()
    assert {row.name for row in rows if row.last_update == 0} == wanted
    rest = {row.name: row.reason for row in rows if row.name not in wanted}
    norms = {
        f"{name}.{attribute}": f"{type(module).__name__} is not a supported layer"
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for attribute in ("weight", "bias")
    }
    assert rest == norms
    assert {row.name for row in rows} == {name for name, _ in model.named_parameters()}


def test_report_on_the_digits_network(digits: ModuleType) -> None:
    model = digits.DigitsNet()
    optimizer = one_step(model, torch.randn(8, 1, 8, 8))
    check(optimizer, model, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))


def test_report_on_resnet18() -> None:
    torchvision = pytest.importorskip("torchvision")
    make: Callable[..., nn.Module] = torchvision.models.resnet18
    model = make(num_classes=10)
    before = {name: param.clone() for name, param in model.named_parameters()}
    optimizer = one_step(model, torch.randn(4, 3, 64, 64))
    check(optimizer, model, (nn.Conv2d, nn.Linear))
    assert all(not torch.equal(param, before[name]) for name, param in model.named_parameters())
