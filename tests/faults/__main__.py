"""Do the tests notice? Plant one fault after the other, and run the default suite until it fails.

    python tests/faults --list
    python tests/faults --only curvature/moments --jobs 2 --output faults.csv

A fault is caught if a test fails. It is missed if all pass, *broken* if the suite cannot even be
collected, and *hung* if nothing fails in time; the latter two tell nothing about the tests, so such
a row wants another text. Package and tests are copied to a temporary folder; the checkout is left
alone. Tests of the same part run first (table :data:`NEAR`), then those of its room, then all.

The tables are in the modules beside this file, a row per fault. ``--control`` runs the suite
without a fault: it has to pass. ``--rooms`` stops short of all tests, which takes minutes for every
fault that is missed.
"""

from __future__ import annotations

import argparse
import csv
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import curvature_faults
import einsum_faults
import optim_faults
import uses_faults
from fault import Fault

ROOT = Path(__file__).resolve().parents[2]
FAULTS: tuple[Fault, ...] = (
    *einsum_faults.FAULTS,
    *curvature_faults.FAULTS,
    *optim_faults.FAULTS,
    *uses_faults.FAULTS,
)
LEFT_BEHIND = (".git", ".venv*", "__pycache__", ".*_cache", "*.egg-info", "site")

NEAR: dict[str, tuple[str, ...]] = {
    "einsum/geometry.py": ("einsum/test_geometry.py", "einsum/test_operations.py"),
    "einsum/rules.py": ("einsum/test_rules.py", "einsum/test_random_networks.py"),
    "einsum/network.py": ("einsum/test_transformations.py",),
    "einsum/plans.py": ("einsum/test_plans.py", "einsum/test_random_networks.py"),
    "einsum/program.py": ("einsum/test_plans.py", "einsum/test_random_networks.py"),
    "einsum/crs": ("einsum/test_crs.py",),
    "einsum/drawing": ("einsum/test_draw.py",),
    "einsum/operations": ("einsum/test_operations.py",),
    "einsum/operations/derivatives.py": ("einsum/test_derivatives.py",),
    "einsum/operations/ggn.py": ("einsum/test_second_order.py",),
    "einsum/operations/hessian.py": ("einsum/test_second_order.py",),
    "curvature/uses": ("optim/uses",),
    "curvature/capture/calls.py": ("optim/uses",),
    "curvature/capture/rehearsal.py": ("optim/uses",),
    "optim/params": ("optim/uses",),
    "curvature/moments": (
        "curvature/test_factors.py",
        "curvature/test_plain_twin.py",
        "curvature/test_routes.py",
    ),
    "curvature/moments/one_hot.py": ("curvature/test_embeddings.py",),
    "curvature/moments/per_sample.py": ("curvature/test_diagonals.py",),
    "curvature/moments/position_sums.py": (
        "curvature/test_factors.py",
        "curvature/test_squares.py",
    ),
    "curvature/moments/triton_sums.py": ("curvature/test_triton.py",),
    "curvature/structures": ("curvature/test_structures.py",),
    "curvature/structures/linalg.py": ("optim/test_kept_squares.py", "optim/test_kfac_parity.py"),
    "curvature/structures/ragged_diagonal.py": ("optim/test_fast_path.py",),
    "curvature/structures/toeplitz.py": (
        "curvature/test_structures.py",
        "optim/test_every_structure.py",
    ),
    "curvature/preconditioner.py": ("optim/test_theory.py", "optim/test_first_batch.py"),
    "curvature/layers": ("curvature/test_factors.py", "curvature/test_embeddings.py"),
    "curvature/layers/layer.py": ("optim/test_kfac_parity.py", "optim/test_fast_path.py"),
    "curvature/layers/convolution.py": (
        "curvature/test_plain_twin.py",
        "optim/test_changed_inputs.py",
    ),
    "curvature/layers/stock_forward.py": ("optim/test_changed_layers.py",),
    "curvature/estimators": ("curvature/test_kfac.py", "curvature/test_diagonals.py"),
    "curvature/estimators/jacobian_rows.py": (
        "curvature/test_diagonals.py",
        "curvature/test_without_layers.py",
    ),
    "curvature/estimators/ntk.py": ("curvature/test_kernels.py",),
    "curvature/estimators/kronecker.py": ("curvature/test_kronecker.py",),
    "curvature/estimators/hesscale.py": ("curvature/test_recursions.py",),
    "curvature/backpack.py": ("curvature/test_backpack.py",),
    "curvature/eigenbasis.py": ("curvature/test_eigenbasis.py",),
    "curvature/capture": (
        "optim/test_kfac_parity.py",
        "optim/test_parity.py",
        "optim/test_capture.py",
    ),
    "curvature/capture/statistics.py": (
        "optim/test_kfac_parity.py",
        "optim/test_amp.py",
        "optim/test_resets.py",
        "optim/test_fisher_draws.py",
        "optim/test_modes.py",
        "optim/uses/test_experts.py",
        "distributed/test_ddp.py",
    ),
    "curvature/capture/tap.py": (
        "optim/test_capture.py",
        "optim/test_changed_layers.py",
        "optim/test_changed_inputs.py",
    ),
    "curvature/structures/structure.py": (
        "curvature/test_structures.py",
        "optim/test_kept_squares.py",
    ),
    "curvature/structures/block_diagonal.py": (
        "curvature/test_structures.py",
        "optim/test_kept_squares.py",
    ),
    "curvature/capture/owners.py": ("optim/test_choice_of_layers.py",),
    "curvature/capture/graph.py": ("optim/test_changed_layers.py",),
    "curvature/capture/resets.py": ("optim/test_resets.py", "optim/uses/test_contexts.py"),
    "curvature/capture/hooks.py": ("optim/uses/test_compiled_checkpoints.py",),
    "curvature/capture/recording.py": ("curvature/test_kfac.py",),
    "optim/rules/singd_rule.py": (
        "optim/test_kept_squares.py",
        "optim/test_theory.py",
        "optim/test_parity.py",
        "optim/test_first_batch.py",
        "optim/test_state.py",
    ),
    "optim/rules/singd_start.py": ("optim/test_theory.py", "optim/test_first_batch.py"),
    "optim/rules/kfac_rule.py": ("optim/test_kfac_parity.py",),
    "optim/rules/decompositions.py": ("optim/test_kfac_parity.py", "optim/test_scale_free.py"),
    "optim/rules/normalization.py": ("optim/test_kfac_pytorch.py",),
    "optim/rules/levenberg_marquardt.py": ("optim/test_kfac.py",),
    "optim/rules/sampled_fisher.py": ("optim/test_fisher_draws.py",),
    "optim/rules/refreshing.py": ("optim/test_kfac.py", "optim/test_marks.py"),
    "optim/rules/runner.py": ("optim/test_first_batch.py", "optim/test_kfac.py"),
    "optim/step": ("optim/test_fast_path.py", "optim/test_grafting.py"),
    "optim/step/fallback.py": ("optim/test_construction.py",),
    "optim/finite.py": ("optim/test_device_path.py",),
    "optim/params/state.py": ("optim/test_device_path.py",),
    "optim/params/batches.py": ("optim/test_stacks.py", "optim/test_kept_squares.py"),
    "optim/options.py": ("optim/test_errors.py", "optim/test_state.py"),
    "optim/params/auto_structure.py": ("optim/test_budget.py",),
    "optim/params/registry.py": ("optim/test_construction.py", "optim/test_lifecycle.py"),
    "optim/checkpoint.py": ("optim/test_state.py", "optim/test_kfac.py"),
    "optim/saved_state.py": ("optim/test_loads.py",),
    "optim/distributed/assignment.py": ("optim/test_placement.py",),
    "optim/base.py": ("optim/test_parity.py", "optim/test_report.py"),
}
"""Tests to begin with, by the longest beginning of the path of a fault."""


@dataclass(frozen=True)
class Found:
    """What became of a fault.

    Attributes:
        verdict: ``"caught"``, ``"missed"``, ``"broken"`` or ``"hung"``.
        test: The test that failed first.
        seconds: How long it took.
    """

    verdict: str
    test: str
    seconds: float


_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", re.MULTILINE)
"""A test that failed, or its setup did; of a module that cannot be collected, no test is named."""


class Copy:
    """A checkout of its own, in which faults are planted."""

    _clock = count(int(time.time()))

    def __init__(self, folder: Path) -> None:
        self.root = folder
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "1",
        }
        where = "import tnkfac; print(tnkfac.__file__)"
        seen = self._run([sys.executable, "-c", where], 600).stdout.strip()
        if not seen.startswith(str(folder)):
            raise RuntimeError(f"The copy in {folder} is not what is imported, but {seen}.")

    def judge(self, fault: Fault, limit: float, rooms: bool) -> Found:
        """Plant a fault, run the tests, or those of its room only, and take it out again."""
        path, began = self.root / fault.path, time.monotonic()
        source = path.read_text()
        self._write(path, fault.planted(source))
        try:
            for tests in stages(fault)[: -1 if rooms else None]:
                verdict, test = self.tested(tests, limit)
                if verdict != "missed":
                    break
        finally:
            self._write(path, source)
        return Found(verdict, test, time.monotonic() - began)

    def tested(self, tests: Sequence[str], limit: float) -> tuple[str, str]:
        """Run some tests until one fails: what that says of a fault, and which it was."""
        # One process: with several, whichever test fails first stops the others only later.
        flags = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
        try:
            done = self._run([sys.executable, "-m", "pytest", *flags, *tests], limit)
        except subprocess.TimeoutExpired:
            return "hung", ""
        failed = _FAILED.search(done.stdout)
        if failed:
            return "caught", failed[1]
        if done.returncode:
            return "broken", done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        return "missed", ""

    def _run(self, command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.root,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=limit,
            check=False,
        )

    def _write(self, path: Path, source: str) -> None:
        """Write a file with a time of its own, by which Python tells whether to compile it anew."""
        path.write_text(source)
        moment = next(self._clock)
        os.utime(path, (moment, moment))


def stages(fault: Fault) -> list[list[str]]:
    """Tests to run, those first that are about the same thing."""
    keys = [key for key in NEAR if fault.file.startswith(key)]
    near = [f"tests/{name}" for name in NEAR[max(keys, key=len)]] if keys else []
    found = [near, [f"tests/{fault.room}"], []]
    return [tests for tests in found[:2] if tests] + [[]]


def judged(
    faults: Sequence[Fault], jobs: int, limit: float, rooms: bool, output: Path
) -> list[Found]:
    """Verdicts of all faults, printed and written as they come."""
    found: dict[Fault, Found] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, output.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "what", "verdict", "test", "seconds"))
        copies: queue.Queue[Copy] = queue.Queue()
        for job in range(min(jobs, len(faults))):
            copies.put(Copy(Path(folder) / str(job)))

        def run(fault: Fault) -> tuple[Fault, Found]:
            copy = copies.get()
            try:
                return fault, copy.judge(fault, limit, rooms)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            for done in as_completed([pool.submit(run, fault) for fault in faults]):
                fault, verdict = done.result()
                found[fault] = verdict
                seconds = round(verdict.seconds)
                writer.writerow((fault.file, fault.what, verdict.verdict, verdict.test, seconds))
                file.flush()
                print(f"{verdict.verdict:7}{seconds:5} s  {fault.file}: {fault.what}", flush=True)
                if verdict.test:
                    print(f"{'':15}{verdict.test}", flush=True)
    return [found[fault] for fault in faults]


def control(limit: float) -> int:
    """Run the suite without a fault; zero if it passes."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        verdict, test = Copy(Path(folder) / "0").tested([], limit)
    print("passes without a fault" if verdict == "missed" else f"fails without a fault: {test}")
    return int(verdict != "missed")


def main() -> int:
    """Judge what is asked for; the exit status tells whether everything was caught."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="beginning of the paths, as curvature/moments")
    parser.add_argument("--match", default="", help="regular expression for path: description")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rooms", action="store_true", help="leave out tests of other rooms")
    parser.add_argument("--list", action="store_true", help="check that all can be planted")
    parser.add_argument("--control", action="store_true", help="run without a fault")
    parser.add_argument("--output", type=Path, default=Path("faults.csv"))
    parser.add_argument("--limit", type=float, default=1800, help="seconds of a run of pytest")
    args = parser.parse_args()
    chosen = [
        fault
        for fault in FAULTS
        if fault.file.startswith(args.only) and re.search(args.match, f"{fault.file}: {fault.what}")
    ]
    for fault in chosen:
        fault.planted((ROOT / fault.path).read_text())
        if args.list:
            print(f"{fault.file}: {fault.what}")
    if args.list:
        print(f"{len(chosen)} faults")
        return 0
    if args.control:
        return control(args.limit)
    found = judged(chosen, args.jobs, args.limit, args.rooms, args.output)
    caught = sum(verdict.verdict == "caught" for verdict in found)
    print(f"{caught} of {len(found)} caught")
    return int(caught < len(found))


if __name__ == "__main__":
    sys.exit(main())
