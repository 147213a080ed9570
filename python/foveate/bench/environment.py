"""What a record needs beside its rows: machine, versions, commit, hashes of the GPU sources."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import subprocess
from typing import Any

import torch

import foveate
from foveate._native import load_native
from foveate.bench.roofline import Ceilings
from foveate.bench.sources import checkout, source_hashes


def commit() -> str | None:
    """The commit of the checkout, "-dirty" if files differ from it; None outside a checkout."""
    root = checkout()
    if root is None or not (root / ".git").exists():
        return None

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):  # no git here, or a tree it does not trust
        return None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The installed version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(ceilings: dict[str, Ceilings]) -> dict[str, Any]:
    """The first record of a file. Its device is the GPU if rows ran there, else the CPU."""
    module = load_native("_cpu")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "record": "environment",
        "device": gpu if "cuda" in ceilings else cpu_model(),
        "cpu": cpu_model(),
        "gpu": gpu,
        "isa": None if isinstance(module, str) else module.isa(),
        "threads": torch.get_num_threads(),
        "ceilings": {device: measured._asdict() for device, measured in ceilings.items()},
        "foveate": foveate.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "sources": source_hashes(),
    }
