"""Processes that hold parts of one model with ``fully_shard``, on one machine."""

from pathlib import Path

from distributed.launching import launch, scenarios


def test_all_scenarios_and_checkpoints_for_other_numbers_of_processes(tmp_path: Path) -> None:
    """Each is named in ``sharded.py``; two processes save for four, and these for two."""
    only = "checkpoints_go_on_with_other_shards"
    for world, chosen in ((2, ()), (4, ()), (2, (only,))):
        text = launch("sharded.py", world, str(tmp_path), *chosen)
        assert text.count(" holds") == (1 if chosen else scenarios("sharded.py")), text
        assert scenarios("sharded.py") == 5
