"""The folder of a Hugging Face model as files: read without trusting it, written as tensors come."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ..dense_layers import SkippedLayer
from ..files import sync
from ..quant_state import KEY
from . import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (
    *_PICKLES, ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".gguf", ".ot",
    ".mlmodel", ".mlpackage", ".npz", ".npy", ".xml",
)  # fmt: skip
_CODE = (".py", ".pyc", ".so", ".sh", ".ipynb", ".dll", ".dylib", ".exe", ".js")
_MAX_JSON, _MAX_COPIED = 64 << 20, 256 << 20
_REOPEN_BYTES = 64 << 20


class Entry(NamedTuple):
    """One tensor of the checkpoint."""

    key: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_json(path: pathlib.Path) -> dict:
    """The object in a file; UserError if it is none or unreasonably large."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise UserError(f"{path}: larger than {_MAX_JSON >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _kind_of_folder(folder: pathlib.Path) -> str:
    """Why there is nothing to read in a folder without safetensors."""
    names = sorted(path.name for path in folder.iterdir())
    for endings, words in (
        ((".gguf",), "a GGUF file, which is quantized already"),
        (_PICKLES, "a pickle, which could run code: save it as safetensors with save_pretrained"),
    ):
        if found := [name for name in names if name.endswith(endings)]:
            return f"expected safetensors, got {found[0]}, {words}"
    return "expected one or many .safetensors files, got none"


class Source:
    """config.json and the tensors of a folder. Files are opened one at a time, tensors read one at a time.

    Raises UserError for a folder that is no dense safetensors model, an index that names files elsewhere,
    and files that are missing, corrupt or disagree with the index.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{folder}: expected the folder of a model on this machine, got none")
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: expected a Hugging Face model, got no config.json")
        self.config = read_json(folder / "config.json")
        self._check_dense()
        self.files, wanted = self._files()
        self.entries: dict[str, Entry] = {}
        for name in self.files:
            for entry in self._entries_of(name):
                if entry.key in self.entries:
                    raise UserError(
                        f"{folder}: {entry.key} is in {self.entries[entry.key].file} and {name}"
                    )
                self.entries[entry.key] = entry
        for key, name in wanted.items():
            if key not in self.entries or self.entries[key].file != name:
                raise UserError(f"{folder / INDEX}: {key} is not in {name}")
        if not self.entries:
            raise UserError(f"{folder}: no tensors")
        if packed := next((k for k in self.entries if f".{KEY}" in k), None):
            raise UserError(f"{folder}: in 4 bits already ({packed})")

    def _check_dense(self) -> None:
        quantization = self.config.get("quantization_config")
        if quantization is None:
            return
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        bits = isinstance(quantization, dict) and quantization.get("load_in_4bit")
        what = "in 4 bits already" if bits else "quantized already"
        raise UserError(f"{self.folder}: {what} (quant_method {method!r} in config.json)")

    def _files(self) -> tuple[list[str], dict[str, str]]:
        """Names of the files, and what the index says: key -> file."""
        if (self.folder / INDEX).is_file():
            wanted = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(wanted, dict) or not wanted:
                raise UserError(f"{self.folder / INDEX}: expected a weight_map")
            for name in wanted.values():
                plain = isinstance(name, str) and re.fullmatch(r"[\w.@+ -]+\.safetensors", name)
                if not plain or name.startswith("."):
                    raise UserError(
                        f"{self.folder / INDEX}: expected names of .safetensors files in the folder, "
                        f"got {name!r}"
                    )
            return sorted(set(wanted.values())), wanted
        if (self.folder / SINGLE).is_file():
            return [SINGLE], {}
        names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not names:
            raise UserError(f"{self.folder}: {_kind_of_folder(self.folder)}")
        parts = [re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", name) for name in names]
        if all(parts) and len(parts) != int(parts[0][3]):
            raise UserError(
                f"{self.folder}: expected {int(parts[0][3])} shards, got {len(parts)}: {names[0]}, ..."
            )
        return names, {}

    def _entries_of(self, name: str) -> Iterator[Entry]:
        with self._opened(name) as file:
            for key in file.keys():  # noqa: SIM118 (no dict)
                part = file.get_slice(key)
                dtype = _BY_NAME.get(part.get_dtype())
                if dtype is None:
                    raise UserError(
                        f"{self.folder / name}: {key} is {part.get_dtype()}, expected one of "
                        f"{', '.join(_BY_NAME)}"
                    )
                yield Entry(key, name, dtype, tuple(part.get_shape()))

    @contextlib.contextmanager
    def _opened(self, name: str):
        """The file; what is wrong with it is a UserError. Sizes are checked against the file's by safetensors."""
        path = self.folder / name
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from None

    def tensors(self, entries: list[Entry]) -> Iterator[tuple[Entry, torch.Tensor]]:
        """Each of ``entries`` with its tensor, in memory of the file as long as it is used."""
        start = 0
        while start < len(entries):
            # What was read of an open file counts as this process's memory, so it is not open for long.
            stop, size, name = start, 0, entries[start].file
            while stop < len(entries) and entries[stop].file == name and size < _REOPEN_BYTES:
                size += entries[stop].nbytes
                stop += 1
            with self._opened(name) as file:
                for entry in entries[start:stop]:
                    yield entry, file.get_tensor(entry.key)
            start = stop

    def matrices(self, entry: Entry) -> Iterator[torch.Tensor]:
        """The matrices of a stack, one at a time."""
        count = entry.shape[0]
        step = max(1, _REOPEN_BYTES * count // max(1, entry.nbytes))
        for start in range(0, count, step):
            with self._opened(entry.file) as file:
                part = file.get_slice(entry.key)
                for number in range(start, min(start + step, count)):
                    yield part[number]

    def fingerprint(self) -> list:
        """What tells that the files are still the same: names, sizes and times of change."""
        stats = [(name, (self.folder / name).stat()) for name in ["config.json", *self.files]]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def other_files(self) -> tuple[list[pathlib.Path], list[SkippedLayer]]:
        """(what goes along, what does not and why): everything but the weights and hidden files, no code.

        Tokenizers, generation config, licences, and the folders of pipelines, with their own safetensors.
        A link may point into the folder, or where the cache of the Hugging Face hub keeps files.
        """
        found, left = [], []
        weights = {"config.json", *self.files}
        for path in sorted(_walk(self.folder)):
            name = str(path.relative_to(self.folder))
            if name in weights or (name.endswith(".safetensors.index.json") and "/" not in name):
                continue
            if why := self._why_left(path):
                left.append(SkippedLayer(name, why))
                continue
            inside = self.folder.resolve(), self.folder.resolve().parent.parent / "blobs"
            if not any(path.resolve().is_relative_to(place) for place in inside):
                raise UserError(f"{path}: a link out of the folder")
            found.append(path)
        return found, left

    def _why_left(self, path: pathlib.Path) -> str | None:
        if path.suffix.lower() in _CODE:
            return "code"
        if path.suffix.lower() in _WEIGHTS or path.name.endswith(".bin.index.json"):
            return "weights in another format"
        if path.suffix == ".safetensors" and path.parent == self.folder:
            return "weights that the index does not name"
        if not path.is_file():
            return "a link to nothing" if path.is_symlink() else "not a file"
        if path.stat().st_size > _MAX_COPIED:
            return f"larger than {_MAX_COPIED >> 20} MiB"
        return None


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """All files below, but for hidden ones; folders that are links are not entered."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory, row by row."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


class Writer:
    """A safetensors file that is written as tensors come: no more than one of them is in memory.

    Room for the header is kept at the start, enough for ``keys``. A tensor whose size is no multiple of 8
    (the small statistics) waits for the end, so that every tensor lies at a multiple of its element's size.
    """

    def __init__(self, file: BinaryIO, keys: list[str]):
        self.file, self.header, self.last = file, {"__metadata__": {"format": "pt"}}, []
        self.room = -(-(64 + sum(len(json.dumps(key)) + 128 for key in keys)) // 8) * 8
        self.offset = 0
        file.seek(8 + self.room)

    def add(self, key: str, tensor: torch.Tensor) -> None:
        if tensor.numel() * tensor.element_size() % 8:
            self.last.append((key, tensor.clone()))
        else:
            self._write(key, tensor)

    def _write(self, key: str, tensor: torch.Tensor) -> None:
        data = bytes_of(tensor)
        offsets = [self.offset, self.offset + len(data)]
        self.header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        self.file.write(data)
        self.offset = offsets[1]

    def finish(self) -> None:
        """Writes what waits, and the header; the file is then on the disk."""
        for key, tensor in sorted(self.last, key=lambda pair: -pair[1].element_size()):
            self._write(key, tensor)
        header = json.dumps(self.header, separators=(",", ":"), ensure_ascii=True).encode()
        assert len(header) <= self.room, "room for the header"
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        sync(self.file)
