"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import BinaryIO

_MAX_REPORT = 64 << 20


def sync(file: BinaryIO) -> None:
    """What was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: pathlib.Path) -> None:
    """So are the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file for ``path`` that takes that name once it is whole and on the disk; removed if something fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with open(temporary, "wb") as file:
            yield file
            sync(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(document: dict, path: pathlib.Path) -> None:
    """As :func:`written`; one object, indented. A pipe or device stays what it is and is written to."""
    data = (json.dumps(document, indent=2) + "\n").encode()
    if is_stream(path):
        with open(path, "wb") as file:
            file.write(data)
        return
    with written(path) as file:
        file.write(data)


def is_stream(path: pathlib.Path) -> bool:
    """Whether there is a pipe, a terminal or another device of that name."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_writable(path: pathlib.Path) -> None:
    """Raises ValueError unless a file may be written to ``path``, now."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{path}: expected an existing folder {folder}")
    if path.is_dir():
        raise ValueError(f"{path}: expected the name of a file, got a folder")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{path}: not writable")


def check_replaceable(path: pathlib.Path, keys: Iterable[str]) -> None:
    """Raises ValueError unless a JSON file with ``keys`` may be written to ``path``, now.

    There may be nothing of that name, a pipe or a device, an empty file, or an earlier file of the same kind.
    """
    check_writable(path)
    if path.is_file() and path.stat().st_size and not _is_json_with(path, keys):
        raise ValueError(f"{path}: exists already and is no such report, not replaced")


def _is_json_with(path: pathlib.Path, keys: Iterable[str]) -> bool:
    try:
        document = json.loads(path.read_bytes()) if path.stat().st_size < _MAX_REPORT else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.keys() >= set(keys)


def publish(new: pathlib.Path, folder: pathlib.Path) -> None:
    """``new`` takes the name ``folder``, at once; a folder of that name is exchanged with it and deleted.

    Where the file system cannot exchange two names, there is an instant in which neither is there.
    """
    if not folder.exists():
        os.rename(new, folder)
        sync_folder(folder.parent)
        return
    old = new
    if not _exchange(new, folder):
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        os.rename(folder, old)
        os.rename(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old)


def _exchange(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE; False where there is none, or not on this file system."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
