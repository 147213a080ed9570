"""What the compiled modules are made of."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import foveate
from foveate._native import can_run_cuda, load_native

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
CPU = load_native("_cpu")


def _nm(*arguments: object) -> str:
    command = ["nm", "-C", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_cpu_module_needs_no_symbol_of_torch():
    symbols = _nm("-D", "--undefined-only", CPU.__file__)
    assert "Py" in symbols
    assert not [line for line in symbols.splitlines() if "torch" in line or "c10::" in line]


def test_avx2_objects_have_no_weak_symbol():
    builds = sorted(
        (ROOT / "build").glob("*/CMakeFiles/kernels_avx2.dir"), key=lambda p: p.stat().st_mtime
    )
    if not builds:
        pytest.skip("no object files under build/: not built in this tree, or not x86-64")
    found = [builds[-1] / "csrc" / "cpu" / f"{source.name}.o" for source in SOURCES]
    objects = [path for path in found if path.exists()]
    assert objects
    for path in objects:
        weak = [line for line in _nm(path).splitlines() if " W " in line]
        assert not weak, f"{path.name}: {weak}"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("order", ["torch first", "kernels first"])
def test_one_openmp_runtime_is_live_in_both_import_orders(order):
    load = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_cpu", {CPU.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
    steps = ["import torch", load] if order == "torch first" else [load, "import torch"]
    code = "\n".join([*steps, "import foveate, re", "import foveate._cpu",
        "maps = open('/proc/self/maps').read()",
        "found = set(re.findall(r'/\\S*libgomp\\S*', maps))",
        "assert len(found) == 1, found"])  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def cuda_module():
    module = load_native("_cuda")
    if isinstance(module, str) and "was not built" in module:
        pytest.skip("no nvcc")
    assert not isinstance(module, str), module
    return module


def test_the_cuda_module_imports_without_a_driver(cuda_module):
    assert importlib.import_module("foveate._cuda") is cuda_module


def test_that_cuda_is_built_and_that_it_can_run_are_told_apart(cuda_module):
    reason = cuda_module.missing_device()
    assert can_run_cuda() == reason
    if not torch.cuda.is_available():
        assert "CUDA runtime" in reason
        assert "not built" not in reason


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_cuda_module_brings_its_runtime_and_exports_only_its_entry(cuda_module):
    libraries = subprocess.run(
        ["readelf", "-d", cuda_module.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "libc.so" in libraries
    assert not [line for line in libraries.splitlines() if "cuda" in line and "NEEDED" in line]
    exported = _nm("-D", "--defined-only", cuda_module.__file__).splitlines()
    assert [line.split()[-1] for line in exported if " T " in line] == ["PyInit__cuda"]
    needed = _nm("-D", "--undefined-only", cuda_module.__file__)
    assert not [line for line in needed.splitlines() if "torch" in line or "c10::" in line]


def test_every_instruction_set_can_be_called_and_others_are_refused():
    ids = torch.arange(257)
    before = CPU.isa()
    assert before in CPU.isas()
    try:
        for isa in CPU.isas():
            CPU.set_isa(isa)
            assert CPU.isa() == isa
            bits = foveate.bits_encode(ids, 9, backend="cpu")
            assert torch.equal(foveate.bits_decode(bits, backend="cpu"), ids)
        with pytest.raises(ValueError, match=r"isa must be 'baseline'.*got 'mmx'"):
            CPU.set_isa("mmx")
    finally:
        CPU.set_isa(before)


def test_kernels_release_the_gil():
    """While a kernel runs in a thread, this one is never held up for most of its time."""
    ids = torch.zeros(1 << 20, dtype=torch.int64)
    foveate.bits_encode(ids, 32, backend="cpu")
    shares = []
    for _ in range(5):
        span = []

        def work(span=span):
            start = time.perf_counter()
            foveate.bits_encode(ids, 32, backend="cpu")
            span.append(time.perf_counter() - start)

        thread = threading.Thread(target=work)
        thread.start()
        last, longest = time.perf_counter(), 0.0
        while not span:
            moment = time.perf_counter()
            longest, last = max(longest, moment - last), moment
        thread.join()
        shares.append(longest / span[0])
    assert min(shares) < 0.6, shares


ARM_MAIN = """
#include "cpu/dtypes.h"
int main() {
  for (unsigned b = 0; b < 65536; ++b) {
    const foveate::f16 h{static_cast<std::uint16_t>(b)};
    const float x = foveate::to_float(h);
    if (x == x && foveate::from_float<foveate::f16>(x).bits != h.bits) return 1;
    const foveate::bf16 t{static_cast<std::uint16_t>(b)};
    const float y = foveate::to_float(t);
    if (y == y && foveate::from_float<foveate::bf16>(y).bits != t.bits) return 2;
  }
  return 0;
}
"""


def test_kernels_build_for_arm64_and_its_16_bit_floats_round_trip(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-g++ and qemu-aarch64")
    (tmp_path / "main.cpp").write_text(ARM_MAIN)
    program = tmp_path / "main"
    subprocess.run(
        [
            compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Wshadow", "-Wconversion",
            "-Werror", "-Wno-unknown-pragmas", "-fno-math-errno", "-fno-trapping-math",
            "-ffp-contract=off",
            "-fopenmp", "-static", "-DFOVEATE_ISA=baseline", "-I", str(ROOT / "csrc"),
            *map(str, SOURCES), str(tmp_path / "main.cpp"), "-o", str(program),
        ],
        check=True,
    )  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run([emulator, str(program)], check=True, env=environment)
