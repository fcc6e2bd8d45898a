"""Processes that die, and checkpoints that are damaged."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Checkpoints, DamagedCheckpointError, check
from torch import nn

from distributed.launching import HERE, launch, python
from tnkfac import KFAC, SINGD


def run(folder: Path, kind: str, name: str, fatal: int) -> tuple[dict[int, float], Any]:
    """Losses by step, those of later attempts in the place of earlier ones; final weights."""
    folder.mkdir()
    launch("drill.py", 2, str(folder), kind, name, str(fatal), restarts=int(fatal >= 0))
    lines = (folder / "losses.txt").read_text(encoding="utf-8").splitlines()
    losses = {int(step): float(value) for step, value in map(str.split, lines)}
    assert len(lines) == len(losses) + (1 if fatal >= 0 else 0)  # one step was done again
    return losses, torch.load(folder / "weights.pt")


@pytest.mark.parametrize(("kind", "name"), [("ddp", "KFAC"), ("fsdp", "SINGD")])
def test_a_killed_process_changes_nothing(kind: str, name: str, tmp_path: Path) -> None:
    """kill -9 during the sixth step; torchrun goes on from the checkpoint of the fourth."""
    losses, weights = run(tmp_path / "undisturbed", kind, name, -1)
    found, after = run(tmp_path / "killed", kind, name, 5)
    assert found.keys() == losses.keys()
    for step, value in losses.items():
        assert found[step] == pytest.approx(value, rel=1e-11, abs=0), step
    for key, value in weights.items():
        torch.testing.assert_close(after[key], value, rtol=1e-11, atol=1e-13)


def model_and_optimizer(cls: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double()
    return model, cls(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 2, 4, 4, generator=generator, dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def cut(path: Path) -> None:
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = next(path.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))


def remove(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def spoil_sums(path: Path) -> None:
    (path / "sums.json").write_text("{", encoding="utf-8")


def change_sums(path: Path) -> None:
    sums = json.loads((path / "sums.json").read_text(encoding="utf-8"))
    sums[".metadata"]["sha256"] = "0" * 64
    (path / "sums.json").write_text(json.dumps(sums), encoding="utf-8")


DAMAGES = {
    "truncated": (cut, r"__0_0.distcp has \d+ bytes, but \d+ were saved"),
    "one bit": (flip, r"__0_0.distcp is not what was saved"),
    "a file is gone": (remove, r"__0_0.distcp is missing"),
    "sums": (spoil_sums, r"sums.json cannot be read"),
    "metadata": (change_sums, r".metadata is not what was saved"),
}


@pytest.mark.parametrize("cls", [SINGD, KFAC])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_loads(
    damage: str, cls: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what was to be restored is as it was."""
    checkpoints = Checkpoints(tmp_path)
    model, optimizer = model_and_optimizer(cls)
    for seed in range(4):
        step(model, optimizer, seed)
        if seed % 2:
            checkpoints.save(seed + 1, model, optimizer, step=seed + 1)
        if seed == 1:
            expected = [p.detach().clone() for p in model.parameters()]
    before, newest = checkpoints.found()
    spoil, message = DAMAGES[damage]
    spoil(newest)
    twin, other = model_and_optimizer(cls)
    start = [p.detach().clone() for p in twin.parameters()]
    with pytest.raises(DamagedCheckpointError, match=message):
        checkpoints.load(newest, twin, other, step=0)
    for p, q in zip(start, twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert checkpoints.newest() == before
    assert "Going on with the one before" in capsys.readouterr().out
    assert checkpoints.load(before, twin, other, step=0) == {"step": 2}
    for p, q in zip(expected, twin.parameters(), strict=True):
        assert torch.equal(p, q)
    for seed in (2, 3):
        step(twin, other, seed)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_one_that_was_being_written_does_not_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    model, optimizer = model_and_optimizer(SINGD)
    step(model, optimizer, 0)
    whole = checkpoints.save(1, model, optimizer)
    shutil.copytree(whole, tmp_path / "step_000000002.partial")
    assert checkpoints.newest() == whole
    check(checkpoints.save(2, model, optimizer))
    assert not list(tmp_path.glob("*.partial"))


def test_old_ones_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    model, optimizer = model_and_optimizer(SINGD)
    for seed in range(5):
        step(model, optimizer, seed)
        checkpoints.save(seed, model, optimizer)
    assert [path.name[-1] for path in checkpoints.found()] == ["2", "3", "4"]
    with pytest.raises(ValueError, match="keep: got 1"):
        Checkpoints(tmp_path, keep=1)


def test_a_signal_at_any_time_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    """SIGTERM before every look at the folder; the same save goes through afterwards."""
    text = python("-W", "ignore", str(HERE / "terminated.py"), str(tmp_path))
    assert re.search(r"ended at \d\d places: \d+ before and \d+ after", text), text


def test_a_run_that_is_begun_anew_keeps_its_own(tmp_path: Path) -> None:
    """And not those of later steps, which are of the run before, or damaged."""
    checkpoints = Checkpoints(tmp_path)
    model, optimizer = model_and_optimizer(SINGD)
    step(model, optimizer, 0)
    for number, expected in ((4, "4"), (6, "46"), (2, "2"), (3, "23"), (3, "23"), (9, "39")):
        checkpoints.save(number, model, optimizer)
        assert "".join(path.name[-1] for path in sorted(tmp_path.iterdir())) == expected
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.name[-1] == "9"
