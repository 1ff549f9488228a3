"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import BinaryIO


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
    """As :func:`written`; one object, indented."""
    with written(path) as file:
        file.write((json.dumps(document, indent=2) + "\n").encode())


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
