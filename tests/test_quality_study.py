"""The study of quality: what it runs next, what it reports, and that its tasks are as described."""

import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ablation
import quality
import quality_time
from quality_report import bars, summary
from quality_tasks import TASKS, held_out_loss

TIMES = {("tones", "AdamW"): 2.0}
GRID, SEEDS = quality.STUDY["grid"], quality.STUDY["seeds"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The study sets the number of threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row(lr: float, seed: int = 0, steps: Any = "", final: Any = "1.0", **more: Any) -> Any:
    found = {"task": "tones", "optimizer": "AdamW", "lr": str(lr), "seed": str(seed)}
    return {**found, "steps": str(steps), "ms": "2.0", "final": final, "held_out": "1.0", **more}


def test_the_study_names_its_tasks() -> None:
    assert set(quality.STUDY["targets"]) == set(TASKS)
    assert len(TASKS) >= 6
    assert quality.STUDY["tuning_seed"] not in SEEDS
    assert len(SEEDS) >= 3
    assert not set(quality.STUDY["pilot_seeds"]) & {*SEEDS, quality.STUDY["tuning_seed"]}


def test_the_best_rate_reaches_the_target_first() -> None:
    rows = [row(1e-3, final="0.1"), row(1e-2, steps=90, final="0.5"), row(1e-1, steps=80)]
    assert quality.best_lr(rows) == 1e-1
    assert quality.best_lr([*rows[:1], row(3e-3, final="0.05"), row(1.0, final="")]) == 3e-3


def test_the_grid_comes_before_the_seeds() -> None:
    jobs = list(quality.missing([], ["tones"], ["AdamW"]))
    assert jobs == [("tones", "AdamW", lr, 0) for lr in GRID]
    half = [row(lr) for lr in GRID[:3]]
    assert [job[2] for job in quality.missing(half, ["tones"], ["AdamW"])] == GRID[3:]
    grid = [row(lr, steps=100 if lr == GRID[2] else "") for lr in GRID]
    jobs = list(quality.missing(grid, ["tones"], ["AdamW"]))
    assert jobs == [("tones", "AdamW", GRID[2], seed) for seed in SEEDS]
    done = grid + [row(GRID[2], seed) for seed in SEEDS]
    assert not list(quality.missing(done, ["tones"], ["AdamW"]))


def test_the_summary_leaves_the_tuning_seed_out() -> None:
    rows = [row(lr, steps=10 if lr == GRID[1] else "") for lr in GRID]
    rows += [row(GRID[1], seed, steps=40 + seed) for seed in SEEDS]
    found = summary(rows, TIMES, quality.STUDY, quality.best_lr)["tones", "AdamW"]
    assert found["steps"] == 40 + sum(SEEDS) / len(SEEDS)
    assert found["seconds"] == pytest.approx(found["steps"] * 2e-3)
    assert found["share"] == 1 / len(GRID)
    missed = [row(lr, steps=10 if lr == GRID[1] else "") for lr in GRID]
    missed += [row(GRID[1], seed, steps=50 if seed == SEEDS[0] else "") for seed in SEEDS]
    found = summary(missed, TIMES, quality.STUDY, quality.best_lr)["tones", "AdamW"]
    assert found["reached"] == 1 / len(SEEDS)
    assert found["steps"] == (50 + (len(SEEDS) - 1) * quality.STUDY["steps"]) / len(SEEDS)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_repeat_themselves_and_train(name: str) -> None:
    task = TASKS[name]
    x, y = task.draw(torch.Generator().manual_seed(3), 8, False)
    again, _ = task.draw(torch.Generator().manual_seed(3), 8, False)
    assert torch.equal(x, again)
    torch.manual_seed(0)
    model = task.build()
    loss = task.loss(model(x), y)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert math.isfinite(held_out_loss(task, model))


@pytest.mark.slow
def test_quick_run(capsys: pytest.CaptureFixture[str]) -> None:
    quality.main(["--quick"])
    assert "seconds to target" in capsys.readouterr().out


def test_times_are_those_of_the_steps() -> None:
    """An optimizer that sleeps is slower by what it sleeps; the first step is shared out."""

    class Sleeps(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            time.sleep(0.5 if not self.state else 0.02)
            super().step(closure)

    builds: Any = {
        "base": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9),
        "late": lambda m, lr: Sleeps(m.parameters(), lr=lr, momentum=0.9),
    }
    found = quality_time.step_times(TASKS["deep autoencoder"], builds, 100, "base")
    assert found["late"] > 15 + 4  # 20 ms a step, 5 for the first


def test_a_second_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted by its time, then finished: no run twice, none left out."""
    monkeypatch.setitem(quality.STUDY, "steps", 2)
    monkeypatch.setitem(quality.STUDY, "grid", GRID[:2])
    out = tmp_path / "quality.csv"
    chosen = ["--tasks", "tones", "--optimizers", "AdamW", "--out", str(out)]
    quality.main([*chosen, "--minutes", "0"])
    quality.main(chosen)
    quality.main(chosen)
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({(r["lr"], r["seed"]) for r in rows}) == 2 + len(SEEDS)
    assert out.with_suffix(".png").exists()


def test_shards_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each does its own pairs, sees what the others did, and the report makes one file of them."""
    monkeypatch.setitem(quality.STUDY, "steps", 2)
    monkeypatch.setitem(quality.STUDY, "grid", GRID[:2])
    out = tmp_path / "quality.csv"
    chosen = ["--tasks", "tones", "--optimizers", "AdamW", "SGD", "--out", str(out)]
    for shard in ("0/2", "1/2", "0/2"):
        quality.main([*chosen, "--shard", shard])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quality.0.csv", "quality.1.csv"]
    quality.main([*chosen, "--report"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quality.csv", "quality.png"]
    rows = quality.read(out)
    assert len(rows) == 2 * (2 + len(SEEDS))
    assert not list(quality.missing(rows, ["tones"], ["AdamW", "SGD"]))


def test_what_is_committed_can_be_reported(capsys: pytest.CaptureFixture[str]) -> None:
    rows = quality.read(quality.RESULTS)
    times = quality_time.read(quality.RESULTS.with_name("quality_time.csv"))
    assert {(task, name) for task in TASKS for name in quality.OPTIMIZERS} == times.keys()
    found = summary(rows, times, quality.STUDY, quality.best_lr)
    assert {task for task, _ in found} == set(TASKS)
    assert bars(found, list(TASKS), quality.STUDY) in (0, 1)
    assert capsys.readouterr().out


def test_the_ablation_changes_one_thing_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two variants in two shards; the table has those that are complete."""
    monkeypatch.setitem(quality.STUDY, "steps", 2)
    monkeypatch.setattr(ablation, "LRS", (1e-3,))
    monkeypatch.setattr(ablation, "CHOSEN", ["deep autoencoder", "tones"])
    chosen = {name: ablation.VARIANTS[name] for name in ("T=1", f"batches of {ablation.TINY}")}
    monkeypatch.setattr(ablation, "VARIANTS", {"AdamW": ablation.VARIANTS["AdamW"], **chosen})
    out = ["--out", str(tmp_path / "ablation.csv")]
    for shard in ("0/2", "1/2"):
        ablation.main([*out, "--shard", shard])
    ablation.main(out)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| AdamW", "| T=1", "| batches of 8"]
    assert TASKS["tones"].batch_size == 64
    assert [p.name for p in tmp_path.iterdir()] == ["ablation.csv"]


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_every_variant_can_be_built(name: str) -> None:
    torch.manual_seed(0)
    assert ablation.VARIANTS[name](TASKS["tones"].build(), 1e-3).param_groups
