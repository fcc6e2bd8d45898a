"""The optimizer inside of trainers: they learn, and go on as if they had not stopped."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples" / "trainers"
TRAINERS = ("lightning", "accelerate", "transformers")


def weights(saved: Path) -> dict[str, Any]:
    """Of the model in a checkpoint."""
    if saved.is_file():
        found: dict[str, Any] = torch.load(saved, weights_only=True)["state_dict"]
        return found
    from safetensors.torch import load_file

    return dict(load_file(next(saved.glob("*.safetensors"))))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_resumed_run_equals_an_undisturbed_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs, or two and one; with accumulation, clipping and bfloat16."""
    pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(f"with_{name}")
    whole, loss = script.main(["--epochs", "3", "--out", str(tmp_path / "whole")])
    assert loss < 1.0
    first, _ = script.main(["--epochs", "2", "--out", str(tmp_path / "parts")])
    again = ["--epochs", "3", "--out", str(tmp_path / "more"), "--resume", str(first)]
    second, resumed = script.main(again)
    assert resumed == pytest.approx(loss, rel=1e-5)
    expected, found = weights(whole), weights(second)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    sys.modules.pop("task", None)
