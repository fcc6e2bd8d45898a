"""Processes that hold parts of one model with ``fully_shard``, on one machine."""

from pathlib import Path

from distributed.launching import HERE, python, scenarios


def test_all_scenarios_and_checkpoints_for_other_numbers_of_processes(tmp_path: Path) -> None:
    """Each is named in ``sharded.py``; two processes save for four, and these for two."""
    text = python(str(HERE / "sharded.py"), str(tmp_path), "2", "4", "2")
    assert scenarios("sharded.py") == 6
    assert text.count(" holds") == 2 * 6 + 1, text
