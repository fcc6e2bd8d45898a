"""How many processes abort at their end: threads of gloo are delayed, and cores are busy.

    python benchmarks/ending.py --runs 100                      # fully_shard, then leave()
    python benchmarks/ending.py --runs 10 --end destroy         # destroy_process_group() alone
    python benchmarks/ending.py --runs 100 --what example       # examples/imagenet.py, torchrun

Each run has two processes. The exit status is 1 if one of them aborted or failed. Needs Linux and a
C compiler.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # here, so that children need not
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tnkfac import SINGD
from tnkfac.optim.distributed import leave

HERE = Path(__file__).resolve()
WORLD = 2
ABORT = "terminate called"
FOLDER = "ENDING_FOLDER"
"""Environment variable of the process that has slow threads: where it may write."""
ENDS: dict[str, Callable[[], None]] = {"leave": leave, "destroy": dist.destroy_process_group}
SMALL = ["--fake-data", "32", "--arch", "squeezenet1_1", "--size", "32", "--batch-size", "8"]
SMALL += ["--epochs", "1", "--workers", "0", "--threads", "1", "--device", "cpu"]


def options() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, add_help=True)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument("--runs", type=int, default=10)
    found.add_argument("--what", choices=("sharded", "ddp", "example"), default="sharded")
    found.add_argument("--end", choices=tuple(ENDS), default="leave")
    found.add_argument("--optimizer", choices=("adamw", "singd"), default="adamw")
    found.add_argument("--linger", type=int, default=40, help="milliseconds at most")
    found.add_argument("--busy", type=int, default=2, help="processes that do nothing but count")
    return found


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Other processes that want the cores, too."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def train(what: str, optimizer: str) -> None:
    """Some steps of a small network in this process."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    if what == "sharded":
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    else:
        model = DistributedDataParallel(model)
    built = {"adamw": torch.optim.AdamW, "singd": SINGD}[optimizer](model.parameters(), lr=1e-3)
    for _ in range(3):
        built.zero_grad()
        model(torch.randn(4, 8)).square().mean().backward()
        built.step()
    for param in model.parameters():
        getattr(param, "full_tensor", lambda: None)()


def end(how: str) -> None:
    """The end of training; from here on the main thread gives others no turn of its own accord."""
    sys.setswitchinterval(1)
    ENDS[how]()


def in_children(args: argparse.Namespace, folder: Path) -> list[int] | None:
    """Exit statuses of processes that share what is imported; None in these, which are to end."""
    store = folder / f"store-{time.monotonic_ns()}"
    children = []
    for rank in range(WORLD):
        if child := os.fork():
            children.append(child)
            continue
        os.dup2(os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=WORLD)
        train(args.what, args.optimizer)
        end(args.end)
        return None
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def under_torchrun(args: argparse.Namespace, folder: Path) -> list[int]:
    """The exit status of torchrun, and one for each process that was started again."""
    out = folder / f"out-{time.monotonic_ns()}"
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    command += ["--max-restarts=1", "--monitor-interval=0.1", str(HERE), "--as-example", args.end]
    command += [*SMALL, "--fsdp", "--optimizer", args.optimizer, "--out", str(out)]
    done = subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        timeout=300,
        check=False,
    )
    (folder / "said.txt").open("a", encoding="utf-8").write(done.stdout)
    aborts = done.stdout.count(ABORT)
    if done.returncode and not aborts:
        print(done.stdout[-3000:], flush=True)
    return [done.returncode] + [-signal.SIGABRT] * aborts


def as_example(how: str, arguments: list[str]) -> int:
    """The example, which may end in another way than its own."""
    sys.path.insert(0, str(HERE.parents[1] / "examples"))
    import imagenet

    imagenet.leave = partial(end, how)
    return imagenet.main(arguments)


def measure(args: argparse.Namespace, folder: Path) -> int:
    """All runs; 1 if a process did not end well."""
    run = under_torchrun if args.what == "example" else in_children
    bad = aborted = 0
    started = time.perf_counter()
    for _ in range(args.runs):
        found = run(args, folder)
        if found is None:
            return 0
        bad += any(found)
        aborted += sum(status == -signal.SIGABRT for status in found)
    print(
        f"{args.what}, {args.optimizer}, {args.end}: {args.runs} runs of {WORLD} processes, "
        f"threads delayed by up to {args.linger} ms: {aborted} processes aborted, "
        f"{bad} runs did not end well ({time.perf_counter() - started:.0f} s)",
        flush=True,
    )
    return int(bad > 0)


def with_slow_threads(args: argparse.Namespace) -> int:
    """Run this script in an environment that delays them, and return its exit status."""
    with tempfile.TemporaryDirectory() as folder, busy(args.busy):
        library = Path(folder) / "linger.so"
        source = HERE.with_name("linger.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        added = {"LD_PRELOAD": str(library), "LINGER_MS": str(args.linger), FOLDER: folder}
        env = {**os.environ, "OMP_NUM_THREADS": "1", **added}
        return subprocess.run([sys.executable, *sys.argv], env=env, check=False).returncode


def main() -> int:
    """Run the script."""
    if sys.argv[1:2] == ["--as-example"]:
        return as_example(sys.argv[2], sys.argv[3:])
    args = options().parse_args()
    if FOLDER not in os.environ:
        return with_slow_threads(args)
    torch.set_num_threads(1)
    return measure(args, Path(os.environ[FOLDER]))


if __name__ == "__main__":
    sys.exit(main())
