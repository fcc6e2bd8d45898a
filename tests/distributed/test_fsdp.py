"""Processes that hold parts of one model with ``fully_shard``, on one machine."""

from pathlib import Path

from distributed.launching import launch, scenarios


def test_all_scenarios_and_checkpoints_for_other_numbers_of_processes(tmp_path: Path) -> None:
    """Each is named in ``sharded.py``; four save for two, then two for four."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    only = "checkpoints_go_on_with_other_shards"
    for world, folder, chosen in (
        (4, first, ()),
        (2, first, ()),
        (2, second, (only,)),
        (4, second, (only,)),
    ):
        text = launch("sharded.py", world, folder, *chosen)
        assert text.count(" holds") == (1 if chosen else scenarios("sharded.py")), text
        assert scenarios("sharded.py") == 5
