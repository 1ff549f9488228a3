"""``quantize``: a folder of a Hugging Face model becomes one in 4 bits that bitsandbytes' loaders read.

Tensor by tensor, shard by shard, in a folder beside the destination that takes its name at the end. What a shard
holds depends on the source and the options alone, so a run that goes on after an interruption writes the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterable, Iterator

import torch
from tqdm import tqdm

from .. import __version__, files
from ..codebooks import BLOCKSIZES, DTYPES, STORAGES
from ..formats import Weight4bit, quantize_4bit
from ..pieces import quantize_pieces
from ..quant_state import KEYS
from ..schema import FLOAT_DTYPES
from . import UserError, layers
from .checkpoint import INDEX, SINGLE, Entry, Source, Writer, read_json
from .quantize_config import config_of
from .quantize_report import MIB, QuantizedLayer, Report
from .stacks import Stack

STATE = ".quantize.json"  # in the partial folder: options, source, finished shards
_BLOB_BYTES = 512  # room for a quant state's JSON, in sizes that are told beforehand


@dataclasses.dataclass(frozen=True)
class Options:
    """What the bytes of the result depend on, beside the source."""

    quant_type: str
    blocksize: int
    double_quant: bool
    quant_storage: str
    dtype: str | None
    exclude: list[str]
    target_modules: list[str] | None
    max_shard_size: int
    errors: bool

    @property
    def quant(self) -> tuple:
        """The arguments of quantize_4bit after the weight."""
        storage = STORAGES[self.quant_storage]
        return self.quant_type, self.blocksize, self.double_quant, storage

    def stored(self, entry: Entry, plan: layers.Plan) -> torch.dtype:
        """The dtype that a tensor has before it is quantized, or in the result."""
        casts = self.dtype and entry.dtype in FLOAT_DTYPES and entry.key not in plan.uncast
        return DTYPES[self.dtype] if casts else entry.dtype

    def nbytes(self, unit: Entry | Stack, plan: layers.Plan) -> int:
        """Bytes in the result, nearly."""
        dtype = self.stored(_first(unit), plan)
        if isinstance(unit, Entry) and unit.key not in plan.quantized:
            return torch.Size(unit.shape).numel() * dtype.itemsize
        shape = torch.empty(unit.shape, dtype=dtype, device="meta")
        return quantize_4bit(shape, *self.quant).nbytes + _BLOB_BYTES


def _first(unit: Entry | Stack) -> Entry:
    return unit.entries[0] if isinstance(unit, Stack) else unit


def run(args: argparse.Namespace) -> int:
    """The whole command; 0, or UserError with OUT as it was."""
    start = time.perf_counter()
    options = Options(
        quant_type=args.quant_type,
        blocksize=args.blocksize,
        double_quant=not args.no_double_quant,
        quant_storage=args.quant_storage,
        dtype=args.dtype,
        exclude=args.exclude,
        target_modules=args.target_modules,
        max_shard_size=args.max_shard_size,
        errors=args.report is not None,
    )
    out = pathlib.Path(os.path.abspath(args.out))
    if not out.name:
        raise UserError(f"OUT {args.out}: expected the name of a folder to make")
    partial = out.with_name(f"{out.name}.partial")
    with _readable(out):
        if args.resume and (out / STATE).exists():  # ended between the last two steps
            (out / STATE).unlink()
            if not args.quiet:
                print(f"{out}: complete")
            return 0
        source = Source(args.model)
        _check_places(source, out, partial, args)
        plan = layers.plan(
            layers.meta_model(source), source.entries, options.target_modules, options.exclude
        )
        if plan.warning:
            print(f"warning: {plan.warning}", file=sys.stderr)
        run = _Run(source, plan, options, partial, quiet=args.quiet)
        run.check_space()
        with run.locked(resume=args.resume):
            rows = run.shards()
            run.finish()
            files.publish(partial, out)
        (out / STATE).unlink()
        before = sum(entry.nbytes for entry in source.entries.values())
        after = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        seconds = time.perf_counter() - start
        report = Report(rows, plan.skipped, run.left, before, after, seconds)
        if args.report is not None:
            files.write_json(
                {"options": dataclasses.asdict(options)} | report.document(), args.report
            )
    if not args.quiet:
        print(f"{report}\n\n{args.out}: {report.summary()}")
    return 0


@contextlib.contextmanager
def _readable(out: pathlib.Path) -> Iterator[None]:
    """What the system refuses is a UserError; a full disk with a hint."""
    try:
        yield
    except OSError as error:
        hint = "; make room and go on with --resume" if error.errno == errno.ENOSPC else ""
        raise UserError(f"{error.filename or out}: {error.strerror or error}{hint}") from None


def _check_places(
    source: Source, out: pathlib.Path, partial: pathlib.Path, args: argparse.Namespace
) -> None:
    """OUT is free, or --force replaces a model; it is not, nor holds, what is read."""
    model = source.folder.resolve()
    if model.is_relative_to(out.resolve()) or out.resolve().is_relative_to(model):
        raise UserError(f"OUT {out}: expected a folder apart from MODEL {source.folder}")
    if os.path.lexists(out):
        if not args.force:
            raise UserError(f"OUT {out}: exists already; --force replaces it")
        if not out.is_dir() or out.is_symlink():
            raise UserError(f"OUT {out}: not a folder, not replaced")
        if any(out.iterdir()) and not (out / "config.json").is_file():
            raise UserError(f"OUT {out}: not the folder of a model (no config.json), not replaced")
    if partial.exists() and not (args.resume or args.force):
        raise UserError(
            f"{partial}: left by a run that was interrupted; --resume goes on, --force starts again"
        )
    if not out.parent.is_dir():
        raise UserError(f"{out}: expected an existing folder {out.parent}")
    if args.report:
        _check_report(args.report, source, (out, partial))


def _check_report(report: pathlib.Path, source: Source, folders: tuple[pathlib.Path, ...]) -> None:
    """The report can be written, and is no file of a model."""
    place = report.resolve()
    for folder in (source.folder, *folders):
        if place.is_relative_to(folder.resolve()):
            raise UserError(f"--report {report}: expected a file outside of {folder}")
    if report.is_file() and any(report.samefile(source.folder / name) for name in source.files):
        raise UserError(f"--report {report}: is a file of {source.folder}")
    try:
        files.check_replaceable(report, ("options", "quantized"))
    except ValueError as error:
        raise UserError(f"--report {error}") from None


class _Run:
    """The partial folder and what goes into it."""

    def __init__(
        self, source: Source, plan: layers.Plan, options: Options, folder: pathlib.Path, quiet: bool
    ):
        self.source, self.plan, self.options, self.folder = source, plan, options, folder
        self.quiet = quiet
        self.names = self._split()
        self.small, self.left = source.other_files()
        self.state = {
            "version": __version__,
            "options": dataclasses.asdict(options),
            "source": source.fingerprint(),
            "shards": {},
        }

    def _split(self) -> dict[str, list[Entry | Stack]]:
        """What each shard of the result holds, in the source's order; a stack is where its first part was."""
        shards: list[list[Entry | Stack]] = [[]]
        size = 0
        units = (self.plan.stacks.get(e.key, e) for e in self.source.entries.values())
        for unit in {unit.key: unit for unit in units}.values():
            nbytes = self.options.nbytes(unit, self.plan)
            if shards[-1] and size + nbytes > self.options.max_shard_size:
                shards.append([])
                size = 0
            shards[-1].append(unit)
            size += nbytes
        if len(shards) == 1:
            return {SINGLE: shards[0]}
        count = len(shards)
        return {
            f"model-{number:05}-of-{count:05}.safetensors": shard
            for number, shard in enumerate(shards, 1)
        }

    def check_space(self) -> None:
        units = itertools.chain(*self.names.values())
        needed = sum(self.options.nbytes(unit, self.plan) for unit in units)
        there = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        free = shutil.disk_usage(self.folder.parent).free
        if needed - there > free:
            raise UserError(
                f"{self.folder.parent}: {(needed - there) / MIB:.0f} MiB are needed, {free / MIB:.0f} "
                "MiB are free"
            )

    @contextlib.contextmanager
    def locked(self, resume: bool) -> Iterator[None]:
        """The folder is there and this process's alone; with the finished shards of an earlier run, or empty."""
        self.folder.mkdir(exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder}: another process is writing it") from None
            if resume and (self.folder / STATE).exists():
                self._load()
            for path in self.folder.iterdir():
                if path.name not in (STATE, *self.state["shards"]):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield
        finally:
            os.close(descriptor)

    def _load(self) -> None:
        before = read_json(self.folder / STATE)
        for what in ("version", "options", "source"):
            if before.get(what) != json.loads(json.dumps(self.state[what])):
                raise UserError(
                    f"{self.folder}: was begun with another {what}; --force starts again"
                )
        self.state["shards"] = {
            name: done
            for name, done in before["shards"].items()
            if (self.folder / name).is_file()
            and (self.folder / name).stat().st_size == done["bytes"]
        }

    def shards(self) -> list[QuantizedLayer]:
        """Writes what is missing; the layers of all shards."""
        total = sum(entry.nbytes for entry in self.source.entries.values())
        bar = tqdm(
            total=total, desc="Quantizing", unit="B", unit_scale=True, disable=self.quiet or None
        )
        with bar:
            for name, units in self.names.items():
                if name in self.state["shards"]:
                    bar.update(sum(unit.nbytes for unit in units))
                    continue
                self._write_shard(name, units, bar)
        rows = [row for name in self.names for row in self.state["shards"][name]["layers"]]
        return [QuantizedLayer(**row | {"shape": tuple(row["shape"])}) for row in rows]

    def _write_shard(self, name: str, units: list[Entry | Stack], bar: tqdm) -> None:
        rows, keys = [], []
        room = [unit.key for unit in units]
        # A quantized weight becomes up to six tensors.
        room += [f"{unit.key}.{max(KEYS, key=len)}" for unit in units for _ in range(5)]
        with files.written(self.folder / name) as file:
            writer = Writer(file, room)
            for unit, found in self._results(units, bar):
                if isinstance(found, torch.Tensor):
                    writer.add(unit.key, found)
                    keys.append(unit.key)
                    continue
                weight, row = found
                rows.append(row)
                for key, part in weight.to_bitsandbytes(unit.key).items():
                    writer.add(key, part)
                    keys.append(key)
            writer.finish()
        self.state["shards"][name] = {
            "bytes": (self.folder / name).stat().st_size,
            "data": writer.offset,
            "keys": keys,
            "layers": [dataclasses.asdict(row) for row in rows],
        }
        files.write_json(self.state, self.folder / STATE)

    def _results(self, units: list[Entry | Stack], bar: tqdm) -> Iterator[tuple]:
        """Each of ``units`` with the tensor that it stays, or its 4-bit weight and the row of that in the report."""
        for stacked, run in itertools.groupby(units, lambda unit: isinstance(unit, Stack)):
            if stacked:
                for stack in run:
                    bar.set_postfix_str(stack.name[-40:], refresh=False)
                    yield stack, self._quantize_stack(stack, bar)
                continue
            for entry, tensor in self.source.tensors(list(run)):
                bar.set_postfix_str(entry.key[-40:], refresh=False)
                tensor = tensor.to(self.options.stored(entry, self.plan))
                if entry.key in self.plan.quantized:
                    yield entry, self._quantize(entry, tensor)
                else:
                    yield entry, tensor
                bar.update(entry.nbytes)

    def _quantize(self, entry: Entry, tensor: torch.Tensor) -> tuple[Weight4bit, QuantizedLayer]:
        try:
            weight = quantize_4bit(tensor, *self.options.quant)
        except ValueError as error:
            raise UserError(f"{self.source.folder / entry.file}: {entry.key}: {error}") from None
        error = None
        if self.options.errors:
            error = _error([tensor], [weight.dequantize(torch.float32)])
        return weight, self._row(self.plan.quantized[entry.key], entry, weight, error)

    def _quantize_stack(self, stack: Stack, bar: tqdm) -> tuple[Weight4bit, QuantizedLayer]:
        """Expert by expert: of the dense stack one is in memory, of the 4-bit one all."""
        first = stack.entries[0]
        dtype = self.options.stored(first, self.plan)
        try:
            pieces = stack.pieces(self.source, dtype, bar.update)
            weight = quantize_pieces(pieces, stack.shape, dtype, *self.options.quant)
        except ValueError as error:
            raise UserError(f"{self.source.folder / first.file}: {stack.name}: {error}") from None
        error = None
        if self.options.errors:
            again = stack.pieces(self.source, dtype, lambda _: None)
            error = _error(again, _experts(weight))
        return weight, self._row(stack.name, stack, weight, error)

    def _row(self, name: str, unit: Entry | Stack, weight: Weight4bit, error) -> QuantizedLayer:
        return QuantizedLayer(
            name=name,
            shape=tuple(unit.shape),
            bytes_before=unit.nbytes,
            bytes_after=sum(
                t.numel() * t.element_size() for t in weight.to_bitsandbytes().values()
            ),
            bits_per_weight=weight.bits_per_weight,
            error=error,
        )

    def finish(self) -> None:
        """The index, config.json, and the small files of the source."""
        done = self.state["shards"]
        if len(self.names) > 1:
            total = sum(done[name]["data"] for name in self.names)
            weight_map = {key: name for name in self.names for key in done[name]["keys"]}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            files.write_json(index, self.folder / INDEX)
        for path in self.small:
            target = self.folder / path.relative_to(self.source.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.written(target) as file, open(path, "rb") as original:
                shutil.copyfileobj(original, file)
        files.write_json(
            config_of(self.source, self.plan, self.options), self.folder / "config.json"
        )


def _error(exact: Iterable[torch.Tensor], found: Iterable[torch.Tensor]) -> float:
    """|W - W4| / |W|, of matrices that come one after the other."""
    difference = norm = 0.0
    for a, b in zip(exact, found):
        a = a.float()
        difference += float((b - a).norm()) ** 2
        norm += float(a.norm()) ** 2
    return math.sqrt(difference / norm) if norm else 0.0


def _experts(weight: Weight4bit) -> Iterable[torch.Tensor]:
    """The matrices of a stack, dense: one at a time, but where blocks cross from one to the next."""
    E, N, K = weight.shape
    if N * K % BLOCKSIZES[0]:
        return weight.dequantize(torch.float32)
    return (weight.narrow(0, e, 1).dequantize(torch.float32)[0] for e in range(E))
