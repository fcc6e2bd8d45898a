"""`python -m tnkfac`: what it prints, what it refuses."""

import re
from pathlib import Path

import pytest

from tnkfac import __main__ as command_line


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command_line.main(arguments) == 0
    return capsys.readouterr().out


def test_report_counts_the_state_of_every_structure(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand for AlexNet: diagonal K and C, and momentum of the parameters."""
    text = ran(capsys, "report", "alexnet", "--structures", "diagonal", "dense", "--layers")
    dims = [(3 * 121, 64), (64 * 25, 192), (192 * 9, 384), (384 * 9, 256), (256 * 9, 256)]
    dims += [(9216, 4096), (4096, 4096), (4096, 1000)]
    weights = sum((D + 1) * out for D, out in dims)
    state = 4 * weights + sum(4 * (D + 1 + out) for D, out in dims)
    found = dict(re.findall(r"^(\w+) +([\d.]+) +[\d.]+$", text, re.M))
    assert float(found["diagonal"]) == pytest.approx(state / 2**20, abs=0.06)
    dense = 4 * weights + sum(4 * ((D + 1) ** 2 + out**2) for D, out in dims)
    assert float(found["dense"]) == pytest.approx(dense / 2**20, abs=0.06)
    assert f"{weights:,} parameters in 16 tensors" in text
    assert "classifier.6.weight" in text


def test_report_costs_more_for_more_structure(capsys: pytest.CaptureFixture[str]) -> None:
    text = ran(capsys, "report", "resnet18", "--batch", "8", "--size", "64", "--interval", "1")
    ratios = dict(re.findall(r"^(\w+) +[\d.]+ +([\d.]+)$", text, re.M))
    assert 1 <= float(ratios["diagonal"]) < float(ratios["block32diagonal"])
    assert float(ratios["block32diagonal"]) < float(ratios["auto"]) < float(ratios["dense"])


@pytest.mark.parametrize(
    ("model", "share", "left"),
    [
        ("resnet18", 100.0, []),
        ("vit_b_16", 99.8, ["encoder.pos_embedding"]),
        ("swin_t", 99.9, ["relative_position_bias_table"]),
        ("gpt2", 68.3, ["transformer.wte.weight, 38,597,376: it is shared by", "wpe"]),
        ("mixtral", 99.7, ["model.embed_tokens.weight"]),
        ("timm/nothing", None, []),
    ],
)
def test_report_tells_the_share_of_the_matrices(
    model: str, share: float | None, left: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As counted by hand: what is left is looked up, added, or shared with what is."""
    if model in ("gpt2", "mixtral"):
        pytest.importorskip("transformers")
    arguments = ["report", model, "--structures", "diagonal", "--batch", "2", "--tokens", "16"]
    if share is None:
        assert command_line.main(arguments) == 2
        return
    text = ran(capsys, *arguments)
    assert f" in matrices: {share}% of these are preconditioned (as" in text
    assert all(words in text for words in left)


def test_explain_takes_a_layer_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    text = ran(capsys, "explain", "nn.Conv2d(64, 64, 3, padding=1)", "8x64x56x56")
    assert "lags" in text
    assert "<- chosen" in text
    text = ran(capsys, "explain", "Linear(5, 3)", "8,5", "--structure", "diagonal")
    assert "Linear, input (8, 5), expand, diagonal" in text


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_draw_writes_a_diagram(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"factor{suffix}"
    arguments = ["x=8,16,32,32", "kernel_size=3", "padding=1", "--out", str(path)]
    text = ran(capsys, "draw", "kfac_reduce_factor", *arguments)
    assert "-> g (ci k1 k2) (ci' k1' k2')" in text
    assert path.stat().st_size > 3000


def test_bench_prints_a_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["squeezenet1_1", "--batch", "2", "--size", "32", "--rounds", "1"]
    text = ran(capsys, "bench", *arguments, "--structures", "diagonal", "dense")
    for name in ("diagonal", "dense"):
        assert re.search(rf"^SINGD {name} +[\d.]+ +[\d.]+$", text, re.M)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "resnet_of_mine"], "model: got 'resnet_of_mine'"),
        (["report", "resnet18", "--structures", "dens"], "dens"),
        (["explain", "Conv2d(64, 64", "8,64,56,56"], r"layer: got 'Conv2d\(64, 64'"),
        (["explain", "__import__('os').system('true')", "8"], "layer: got"),
        (["explain", "Conv2d(64, 64, 3)", "8,a"], "shape: got '8,a'"),
        (["explain", "Conv2d(64, 64, 3)", "8,3,56,56"], "64"),
        (["explain", "ReLU()", "8,3"], "ReLU"),
        (["draw", "no_such"], "operation: got 'no_such'.*kfac_reduce_factor"),
        (["draw", "conv", "x"], "arguments: got 'x'"),
        (["draw", "conv", "x=1,2,3,3"], r"conv\(x"),
        (["draw", "kfc_factor", "x=8,16,32,32", "kernel_size=3", "--out", "a.txt"], "a.txt"),
        (["bench", "resnet18", "--rounds", "0"], "--rounds: at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, with exit code 2."""
    assert command_line.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error, re.S), error
    assert "Traceback" not in error


def test_the_examples_of_the_help_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ *python -m tnkfac (.*)", command_line.EXAMPLES + readme, re.M)
    assert len(lines) == 11
    for line in lines:
        words = [a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', line)]
        if words[0] == "bench":
            words += ["--rounds", "1", "--batch", "2", "--size", "32"]
        assert command_line.main(words) == 0
    assert (tmp_path / "factor.svg").exists()
