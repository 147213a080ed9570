"""`foveate doctor`: what is installed, what can run here, why the rest cannot, what to install.

Every probe is guarded: a broken part of the installation is what this command is there to report.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELP = "what is installed, which backends can run here, and what to install for the rest"

CAN_RUN = "can run"
_MAPS = Path("/proc/self/maps")
_EXTRAS = ("bench", "methods", "test")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit code is 0 whatever it says."""
    report = examine()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0


def _guarded(probe: Callable[..., Any], *args: Any) -> Any:
    """What the probe finds, or "unknown" and the error that stopped it."""
    try:
        return probe(*args)
    except Exception as error:
        text = " ".join(str(error).split())
        return f"unknown ({type(error).__name__}: {text})"


def examine() -> dict[str, Any]:
    """The report as JSON values: versions, platform, devices, isa, threads, backends, ..."""
    report: dict[str, Any] = {
        "versions": {
            "foveate": _guarded(_foveate_version),
            "python": platform.python_version(),
            **{name: _guarded(_version, name) for name in ("torch", "triton", "numpy")},
        },
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical CPUs",
        "devices": _guarded(_devices),
        "isa": _guarded(_isa),
        "threads": _guarded(_threads),
        "backends": _guarded(_backends),
        "extras": {name: _guarded(_missing_packages, name) for name in _EXTRAS},
    }
    report["advice"] = _guarded(_advice, report)
    return report


def _foveate_version() -> str:
    version: str = importlib.import_module("foveate").__version__
    return version


def _version(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"
        return f"{installed}, does not load: {' '.join(str(error).split())}"
    return str(module.__version__)


def _devices() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"cpu": platform.processor() or platform.machine()}
    cuda = _guarded(_cuda_devices)
    found["cuda"] = cuda
    if torch.backends.mps.is_available():
        found["mps"] = "available; foveate runs its reference there"
    return found


def _cuda_devices() -> list[str] | str:
    import torch

    if not torch.cuda.is_available():
        return f"none: {_why_no_cuda_device()}"
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return found


def _why_no_cuda_device() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is a CPU build"
    return "torch is built for GPUs, but sees no device"


def _isa() -> dict[str, Any]:
    module = _native("_cpu")
    return {"used": module.isa(), "available": module.isas()}


def _native(name: str) -> Any:
    from foveate._native import native

    return native(name)


def _threads() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"torch": torch.get_num_threads()}
    found["kernels"] = _guarded(_kernel_threads)
    found["runtime"] = _guarded(_openmp_runtimes)
    return found


def _kernel_threads() -> str:
    return "OpenMP" if _native("_cpu").openmp else "serial"


def _openmp_runtimes() -> str:
    if not _MAPS.exists():
        return "unknown (this system has no /proc/self/maps)"
    pattern = re.compile(r"(/\S*/lib[gi]?omp[0-9]*(?:-[0-9a-f]+)?\.so\S*)$", re.MULTILINE)
    paths = sorted({os.path.realpath(path) for path in pattern.findall(_MAPS.read_text())})
    gomp = [path for path in paths if "libgomp" in Path(path).name]
    count = {0: "no libgomp", 1: "one libgomp", 2: "two libgomp"}.get(len(gomp), "many libgomp")
    return f"{count}: {', '.join(paths)}" if paths else count


def _backends() -> dict[str, Any]:
    """family -> backend -> {"status": ..., "ops": op -> ...}: "can run", or the reason why not."""
    importlib.import_module("foveate")
    from foveate import _dispatch

    return {
        family: {backend: _guarded(_backend, family, backend) for backend in _dispatch.BACKENDS}
        for family in _dispatch.families()
    }


def _backend(family: str, backend: str) -> dict[str, Any]:
    from foveate import _dispatch

    status = _status(_dispatch.missing_kernels, family, backend)
    if status == CAN_RUN:
        status = _status(_dispatch.missing_runtime, backend)
    ops = _dispatch.OPS.get(family, ())
    if status != CAN_RUN:
        return {"status": status, "ops": dict.fromkeys(ops, status)}
    found = {op: _status(_dispatch.missing_kernels, family, backend, op) for op in ops}
    return {"status": status, "ops": found}


def _status(missing: Callable[..., str | None], *args: Any) -> str:
    return _guarded(missing, *args) or CAN_RUN


def _missing_packages(extra: str) -> list[str]:
    """Packages that the extra names for this platform and that are not installed."""
    missing = []
    for requirement in importlib.metadata.requires("foveate") or ():
        text, _, condition = requirement.partition(";")
        name = re.split(r"[\s\[<>=!~(]", text.strip(), maxsplit=1)[0]
        wanted = re.search(r"""extra\s*==\s*["']([^"']+)["']""", condition)
        if name == "foveate" or wanted is None or wanted.group(1) != extra:
            continue
        if "linux" in condition and sys.platform != "linux":
            continue
        if name == "ttsem" and sys.version_info < (3, 12):
            continue
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def _advice(report: dict[str, Any]) -> list[str]:
    """What to install or repair, most important first."""
    from foveate import _dispatch

    advice = []
    if _status(_dispatch.missing_runtime, "cpu") != CAN_RUN:
        advice.append(
            "CPU kernels: reinstall foveate from source with GCC 11, Clang 14 or later on PATH: "
            "pip install --force-reinstall --no-deps ."
        )
    runtime = str(report["threads"])
    if "two libgomp" in runtime or "many libgomp" in runtime:
        advice.append(
            "threads: torch and foveate each brought an OpenMP runtime; reinstall foveate from "
            "source, or from a wheel repaired with auditwheel --exclude libgomp.so.1"
        )
    if report["versions"]["triton"] == "not installed" and sys.platform == "linux":
        advice.append("Triton kernels: pip install 'triton>=3.6'")
    elif "does not load" in report["versions"]["triton"]:
        advice.append("Triton kernels: pip install --force-reinstall triton")
    if "CPU build" in str(report["devices"]):
        advice.append(
            "GPU: install a CUDA build of torch (https://pytorch.org/get-started/locally)"
        )
    elif "sees no device" in str(report["devices"]):
        advice.append("GPU: nothing to install here; with a GPU in this machine, check its driver")
    if "not built" in str(report["backends"]) and "_cuda" in str(report["backends"]):
        advice.append(
            "CUDA C++ kernels: put nvcc on PATH and reinstall from source with FOVEATE_CUDA=ON"
        )
    for extra, missing in report["extras"].items():
        if isinstance(missing, list) and missing:
            advice.append(f"{', '.join(missing)}: pip install 'foveate[{extra}]'")
    return advice


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{name:<10}{version}" for name, version in report["versions"].items()]
    lines.append(f"{'platform':<10}{report['platform']}")
    for title in ("devices", "isa", "threads"):
        lines += ["", title, *_entries(report[title])]
    lines += ["", "backends"]
    if isinstance(report["backends"], str):
        lines.append(f"  {report['backends']}")
    else:
        for family, backends in report["backends"].items():
            lines.append(f"  {family}")
            lines += [line for name, found in backends.items() for line in _ops(name, found)]
    lines += ["", "extras"]
    for extra, missing in report["extras"].items():
        if isinstance(missing, list):
            missing = f"missing: {', '.join(missing)}" if missing else "complete"
        lines.append(f"  {extra:<10}{missing}")
    advice = report["advice"]
    lines += ["", "what to install"]
    lines += [f"  {line}" for line in ([advice] if isinstance(advice, str) else advice)]
    if not advice:
        lines.append("  nothing: everything runs")
    return "\n".join(lines)


def _entries(found: Any) -> list[str]:
    if not isinstance(found, dict):
        return [f"  {found}"]
    return [
        f"  {key:<10}{', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in found.items()
    ]


def _ops(backend: str, found: Any) -> list[str]:
    """One line for the backend, then one for each op that it lacks although it runs."""
    if isinstance(found, str):
        return [f"    {backend:<10}{found}"]
    line = f"    {backend:<10}{found['status']}"
    if found["status"] != CAN_RUN:
        return [line]
    runs = [op for op, status in found["ops"].items() if status == CAN_RUN]
    lines = textwrap.wrap(
        f"{line}: {', '.join(runs)}" if runs else line, 100, subsequent_indent=" " * 14
    )
    lines += [f"      {op}: {status}" for op, status in found["ops"].items() if status != CAN_RUN]
    return lines
