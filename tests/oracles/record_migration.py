"""Print the last loss of each loop in ``tests/data/migration`` whose package is installed.

Run by hand, if the loops change, for the numbers in ``tests/test_migration.py``::

    PYTHONPATH=tests python tests/oracles/record_migration.py
"""

from oracles.migration_task import LOOPS, train


def main() -> None:
    """Run all loops."""
    for path in sorted(LOOPS.glob("*.py")):
        try:
            losses, _ = train(path.read_text(encoding="utf-8"), path.name)
        except ImportError as error:
            print(f"{path.name:24}{error}")
        else:
            print(f"{path.name:24}{losses[0]!r:24}{losses[-1]!r}")


if __name__ == "__main__":
    main()
