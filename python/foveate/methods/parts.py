"""A job over many images that survives being killed, in shards that need not know each other.

Each shard owns one file `OUT.parts/<i>-of-<n>.jsonl`: a line of settings, then one flushed line
per image. A kill can tear only the last line, which readers ignore and a resuming owner cuts off.
When the parts together hold a line for every image, whoever sees it first writes OUT.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

Record = dict[str, Any]  # {"file_name", "width", "height", "masks"} or {"file_name", "error"}


class Shard(NamedTuple):
    """This process takes every `world`-th image, from the `rank`-th."""

    rank: int
    world: int


class Place(NamedTuple):
    """Where an image's line stands."""

    path: Path
    offset: int
    failed: bool


def folder_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.parts")


def failures_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.failed.tsv")


def _own(out: Path, shard: Shard) -> Path:
    return folder_of(out) / f"{shard.rank}-of-{shard.world}.jsonl"


def _parts(out: Path) -> list[Path]:
    return sorted(folder_of(out).glob("*-of-*.jsonl"))


def _lines(path: Path) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of each whole line; a torn last line ends the iteration."""
    with path.open("rb") as file:
        start = 0
        torn: str | None = None
        for line in file:
            if torn is not None:
                raise ValueError(f"the parts must hold JSON lines, got {torn}")
            end = start + len(line)
            try:
                value = json.loads(line)
            except ValueError:
                torn = f"something else in {path} at byte {start}"
            else:
                if line.endswith(b"\n") and isinstance(value, dict):
                    yield start, end, value
                else:
                    torn = f"something else in {path} at byte {start}"
            start = end


def _settings(path: Path) -> Any:
    first = next(_lines(path), None)
    return None if first is None else first[2].get("settings")


def _of_other_shardings(out: Path, shard: Shard) -> list[Path]:
    return [path for path in _parts(out) if not path.stem.endswith(f"-of-{shard.world}")]


def check(
    out: Path, shard: Shard, settings: dict[str, Any], *, resume: bool, overwrite: bool
) -> None:
    """Refuse a job that would mix with or replace what exists; touches nothing.

    Raises:
        FileExistsError: OUT, the own part or a part of another sharding exists, and neither
            `resume` nor `overwrite` is given.
        ValueError: parts that would be merged with this one have other settings.
        OSError: OUT is not a file in an existing folder.
    """
    if out.name == "" or out.is_dir() or not out.parent.is_dir():
        raise NotADirectoryError(f"out must be a file in an existing folder, got {out}")
    if overwrite:
        return
    if not resume:
        for path in (out, _own(out, shard), *_of_other_shardings(out, shard)):
            if path.exists():
                raise FileExistsError(f"{path} exists: pass resume or overwrite")
    for path in _parts(out):
        _same_settings(path, settings)


def open_part(out: Path, shard: Shard, settings: dict[str, Any], *, overwrite: bool) -> BinaryIO:
    """This shard's part, ready for lines: begun, continued, or with `overwrite` cleared.

    Raises:
        FileExistsError: a running process has it open.
        OSError: it cannot be written.
    """
    own = _own(out, shard)
    folder_of(out).mkdir(exist_ok=True)
    file = own.open("r+b" if own.exists() else "x+b", buffering=0)
    try:
        _lock(file, own)
        if overwrite:
            for path in (out, failures_of(out), *_of_other_shardings(out, shard)):
                path.unlink(missing_ok=True)
            file.truncate(0)
        else:
            ends = [end for _, end, _ in _lines(own)]
            file.truncate(ends[-1] if ends else 0)
        if file.seek(0, os.SEEK_END) == 0:
            append(file, {"settings": settings})
    except BaseException:
        file.close()
        raise
    return file


def _same_settings(path: Path, settings: dict[str, Any]) -> None:
    theirs = _settings(path)
    if theirs is None or theirs == settings:
        return
    keys = [key for key in {**settings, **theirs} if settings.get(key) != theirs.get(key)]
    listing = "; ".join(f"{key} {theirs.get(key)!r}, not {settings.get(key)!r}" for key in keys)
    raise ValueError(f"settings must be those of {path}: {listing}")


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FileExistsError(f"{path} belongs to a running process") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise  # a file system without locks cannot guard against a second process


def append(file: BinaryIO, record: Record) -> None:
    """One line, handed to the operating system before this returns."""
    line = json.dumps(record).encode() + b"\n"
    while line:
        line = line[file.write(line) :]


def places(out: Path, settings: dict[str, Any]) -> dict[str, Place]:
    """Each image's line in the parts with these settings: a success before a failure."""
    found: dict[str, Place] = {}
    for path in _parts(out):
        if _settings(path) != settings:
            continue
        for start, _, record in _lines(path):
            name = record.get("file_name")
            if name is not None and (name not in found or found[name].failed):
                found[name] = Place(path, start, "error" in record)
    return found


def records(found: dict[str, Place], names: list[str]) -> Iterator[tuple[str, Record]]:
    """The lines of `names`, in that order, read one at a time."""
    files: dict[Path, BinaryIO] = {}
    try:
        for name in names:
            place = found[name]
            if place.path not in files:
                files[place.path] = place.path.open("rb")
            files[place.path].seek(place.offset)
            yield name, json.loads(files[place.path].readline())
    finally:
        for file in files.values():
            file.close()


def replace_file(out: Path, target: Path, write: Callable[[TextIO], None]) -> None:
    """`target` with what `write` wrote, by a rename: readers see the old file or the whole new."""
    draft = folder_of(out) / f"{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        with draft.open("x", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
