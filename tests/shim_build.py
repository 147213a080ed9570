"""Builds and calls the host shim: CUDA kernel text compiled by g++, a fibre for each thread."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDERS = {"ascending": 0, "descending": 1, "random": 2}


@functools.cache
def shim() -> ctypes.CDLL:
    """The shim's library; skips the test where it cannot be built."""
    compiler = os.environ.get("CXX", "g++")
    if sys.platform != "linux" or shutil.which(compiler) is None:
        pytest.skip("the shim needs Linux and g++")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "shim.so"
        subprocess.run(
            [
                compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wshadow",
                "-Wconversion", "-Werror", "-U_FORTIFY_SOURCE", "-DFOVEATE_SHIM",
                "-I", str(ROOT / "csrc"), "-I", str(ROOT / "tests" / "shim"),
                *map(str, sorted((ROOT / "tests" / "shim").glob("*.cpp"))), "-o", str(library),
            ],
            check=True,
        )  # fmt: skip
        loaded = ctypes.CDLL(str(library))
    loaded.faults_shim.restype = loaded.ncut_shim.restype = ctypes.c_char_p
    loaded.ncut_shim_scratch.restype = ctypes.c_int64
    return loaded
