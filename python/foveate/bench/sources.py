"""Hashes of the GPU kernels' sources: a record speaks for a kernel as long as its hash holds."""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path

from foveate.testing import SPECS

GPU_BACKENDS = ("triton", "cuda")

_PACKAGE = Path(__file__).resolve().parents[1]


def checkout() -> Path | None:
    """The root of the source tree: around this package, or the current directory if it is one."""
    for root in (_PACKAGE.parents[1], Path.cwd()):
        if (root / "csrc" / "bindings_cpu.cpp").is_file() and (root / "pyproject.toml").is_file():
            return root
    return None


def _python_text(path: Path) -> str:
    """The code of a module without comments, docstrings and layout."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


_CPP_TOKEN = re.compile(r'("(?:\\.|[^"\\])*")|(?://[^\n]*|/\*.*?\*/|\s+)+', re.DOTALL)


def _cpp_text(path: Path) -> str:
    """C++ without comments, each run of them and of white space one space."""
    text = path.read_text(encoding="utf-8")
    return _CPP_TOKEN.sub(lambda match: match[1] or " ", text).strip()


def _files_of(folder: Path, module: str) -> list[Path]:
    """The sources of a module of a family, `a` or `a.b`: a file, or every file of a package."""
    path = folder.joinpath(*module.split("."))
    if path.with_suffix(".py").is_file():
        return [path.with_suffix(".py")]
    return sorted(path.rglob("*.py")) if path.is_dir() else []


def _imported(path: Path, folder: Path, package: str) -> set[Path]:
    """What a module imports of its family, but the reference and the API."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            module = name.removeprefix(f"{package}.")
            if name != module and module.partition(".")[0] not in ("reference", "api"):
                found.update(_files_of(folder, module))
    return found


def kernel_files(family: str, backend: str, package: Path = _PACKAGE) -> list[Path]:
    """The sources of a family's kernels for one GPU backend, sorted.

    Python: the backend's module or package and what it imports of the family. CUDA: that, and
    `csrc/cuda/<family>*` with the headers that all families share.
    """
    folder = package / "ops" / family
    files = set(_files_of(folder, backend))
    todo = list(files)
    while todo:
        added = _imported(todo.pop(), folder, f"foveate.ops.{family}") - files
        files |= added
        todo += added
    if backend == "cuda" and files:
        inside = package.parents[1]
        root = inside if (inside / "csrc").is_dir() else checkout()
        families = {spec.family for spec in SPECS}
        for file in (root / "csrc" / "cuda").glob("*") if root else ():
            owner = next((f for f in families if file.stem.startswith(f)), None)
            if owner in (family, None) and file.suffix in (".cu", ".cuh", ".h"):
                files.add(file)
    return sorted(files)


def source_hash(family: str, backend: str, package: Path = _PACKAGE) -> str | None:
    """SHA-256 over the code of a family's GPU kernels; None where it has none."""
    digest = hashlib.sha256()
    files = kernel_files(family, backend, package)
    for file in files:
        text = _python_text(file) if file.suffix == ".py" else _cpp_text(file)
        digest.update(f"{file.parent.name}/{file.name}\n{text}\n".encode())
    return digest.hexdigest() if files else None


def source_hashes(package: Path = _PACKAGE) -> dict[str, str]:
    """ "family/backend" -> hash, for every family and GPU backend with kernels."""
    found = {}
    for family in sorted({spec.family for spec in SPECS}):
        for backend in GPU_BACKENDS:
            value = source_hash(family, backend, package)
            if value is not None:
                found[f"{family}/{backend}"] = value
    return found
