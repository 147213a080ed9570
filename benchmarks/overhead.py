"""Overhead: what a call costs beside its kernel, what an import costs beside torch, wheel size.

    python benchmarks/overhead.py [--wheel FILE | --no-wheel]

Without --wheel the wheel is built, which takes a minute or two and PyPI. A call's time is the
processor time of its thread, the shortest of many rounds: overhead is a floor, and what a shared
machine adds to it is not ours.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate._dispatch import load_backend

ROOT = Path(__file__).resolve().parents[1]

_IMPORTS = """
import time
start = time.perf_counter()
import torch
between = time.perf_counter()
import foveate
print(between - start, time.perf_counter() - between)
"""


def shortest(run: Callable[[], Any], rounds: int, calls: int = 100) -> float:
    """Microseconds a call, of the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            run()
        best = min(best, time.thread_time() - start)
    return 1e6 * best / calls


def calls(rounds: int) -> dict[str, float]:
    """bits_encode of 16 ids to 8 bits at each layer, inference on the CPU."""
    x = torch.arange(16)
    ids, out = x.unsqueeze(-1), torch.empty(16, 8)
    launcher = load_backend("analog_bits", "cpu")
    if isinstance(launcher, str):
        raise SystemExit(f"no CPU kernels here: {launcher}")
    arguments = ((8,), 1.0, -1.0, False, 1, torch.float32, True)
    layers = {
        "torch.empty(16, 8), for scale": lambda: torch.empty(16, 8),
        "x.unsqueeze(-1), for scale": lambda: x.unsqueeze(-1),
        "launcher: allocation and kernel": lambda: launcher.bits_encode(ids, *arguments),
        "foveate.bits_encode(x, 8)": lambda: foveate.bits_encode(x, 8),
        "foveate.bits_encode(x, 8, backend='cpu')": lambda: foveate.bits_encode(
            x, 8, backend="cpu"
        ),
        "foveate.bits_decode(bits)": lambda: foveate.bits_decode(out),
    }
    out.copy_(foveate.bits_encode(x, 8))
    for run in layers.values():
        shortest(run, 3)
    return {name: shortest(run, rounds) for name, run in layers.items()}


def imports(rounds: int) -> tuple[float, float]:
    """Seconds to import torch, and foveate after it: the shortest of several fresh processes."""
    found = []
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True
        )
        found.append([float(value) for value in done.stdout.split()])
    return min(t for t, _ in found), min(f for _, f in found)


def wheel_bytes(wheel: Path | None) -> int:
    """Size of the given wheel, or of one built for this."""
    if wheel is not None:
        return wheel.stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder,
             "-C", f"build-dir={folder}/build", str(ROOT)],
            check=True,
        )  # fmt: skip
        (built,) = Path(folder).glob("foveate-*.whl")
        return built.stat().st_size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, help="a wheel that is already there")
    parser.add_argument("--no-wheel", action="store_true", help="leave the wheel out")
    parser.add_argument("--rounds", type=int, default=300, help="of 100 calls each")
    args = parser.parse_args(argv)
    lines = [("a call", f"{us:.1f} us", name) for name, us in calls(args.rounds).items()]
    torch_seconds, own_seconds = imports(max(1, min(5, args.rounds)))
    lines.append(("import", f"{torch_seconds:.2f} s", "torch"))
    lines.append(("import", f"{own_seconds:.2f} s", "foveate, after torch"))
    if not args.no_wheel:
        lines.append(("wheel", f"{wheel_bytes(args.wheel) / 1024:.0f} KiB", "compressed"))
    print("| what | floor | of |\n| --- | --- | --- |")
    for line in lines:
        print("| " + " | ".join(line) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
