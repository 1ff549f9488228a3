"""The 4-bit weight, in the bytes of bitsandbytes: quantize, dequantize, load, save. docs/format.md draws it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping

import torch

from .arguments import FLOAT_DTYPES, NESTED_BLOCKSIZE, WeightArgs, ceil_div
from .codebooks import (
    BLOCKSIZES,
    DTYPES,
    STORAGE_DTYPES,
    check_blocksize,
    check_quant_type,
    code_of,
    dynamic_code,
)
from .quant_state import KEY, KEYS_IN_WORDS, kind_of, read_quant_state
from .reference import block_scales
from .schema import check_float, ops

_ENTRIES = {"code": "quant_map", "nested_code": "nested_quant_map"}  # bitsandbytes' names of ours
_ANY_SHAPE = ("packed", "nested_offset")  # of which only the number of elements matters


@dataclasses.dataclass(frozen=True, eq=False)
class Weight4bit:
    """A matrix ``W [N, K]`` in 4 bits: ``W[n, k] = code[nibble_i] * scale[i // blocksize]``, ``i = n*K + k``.

    Or a stack of E matrices ``[E, N, K]``, as experts have them: then ``i = (e*N + n)*K + k``.

    ``scale = absmax`` (float32), or with double quantization
    ``scale[j] = nested_code[absmax[j]] * nested_absmax[j // 256] + nested_offset`` (product, then sum, each
    rounded to float32). Made by :func:`quantize_4bit` or :meth:`from_bitsandbytes`, which validate; the
    constructor only stores. ``packed`` keeps the storage dtype and orientation it came with. Fields: the tensors
    of :class:`arguments.WeightArgs`, ``shape`` [N, K] or [E, N, K], ``dtype`` (that of W before it was quantized),
    ``quant_type`` and ``blocksize``. Source: QLoRA (Dettmers et al. 2023).

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> w = lk.quantize_4bit(torch.randn(256, 512))
        >>> w.shape, w.double_quant, round(w.bits_per_weight, 1)
        (torch.Size([256, 512]), True, 4.1)
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None

    def op_args(self) -> WeightArgs:
        """The nine flat arguments of a 4-bit weight in an operator's schema, a tuple in its order.

        A stack [E, N, K] gives those of the matrix [E*N, K] that its rows are.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> w = lk.quantize_4bit(torch.randn(32, 64))
            >>> torch.ops.lowrank_kernels.linear_4bit(torch.randn(2, 64), *w.op_args(), None).shape
            torch.Size([2, 32])
        """
        return WeightArgs(
            self.packed, self.absmax, self.code,
            self.nested_absmax, self.nested_code, self.nested_offset,
            math.prod(self.shape[:-1]), self.shape[-1], self.blocksize,
        )  # fmt: skip

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that exist, by field name.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> list(lk.quantize_4bit(torch.randn(8, 64), double_quant=False).tensors())
            ['packed', 'absmax', 'code']
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes held: packed values and scales (the shared code tables count too)."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of ``packed`` and the scales per element of W, constant tables not counted."""
        stats = [self.packed, self.absmax, self.nested_absmax, self.nested_offset]
        size = sum(t.numel() * t.element_size() for t in stats if t is not None)
        return 8.0 * size / max(1, math.prod(self.shape))

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W dense, of this shape: products of code and scale in float32, rounded once to ``dtype`` (default: its own).

        Raises TypeError for a dtype other than float32, bfloat16 and float16.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> lk.quantize_4bit(torch.eye(64)).dequantize(torch.bfloat16).dtype
            torch.bfloat16
        """
        dtype = self.dtype if dtype is None else dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        return ops.dequantize_4bit(*self.op_args(), dtype).view(self.shape)

    def to(self, device: torch.device | str | int) -> Weight4bit:
        """The same weight on another device; tensors that are there already are shared.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> lk.quantize_4bit(torch.randn(8, 64)).to("meta").device
            device(type='meta')
        """
        return dataclasses.replace(self, **{n: t.to(device) for n, t in self.tensors().items()})

    def narrow(self, dim: int, start: int, length: int) -> Weight4bit:
        """Rows (``dim`` 0) or columns (1) ``start : start + length`` as a weight of their own; its bytes are copies.

        Of a stack: experts (``dim`` 0), rows (1) or columns (2) of each.

        Nothing is quantized again: ``w.narrow(...).dequantize()`` has the bits of ``w.dequantize().narrow(...)``.
        Where a cut goes through blocks the slice has smaller ones, down to 32 elements. Scales stay
        double-quantized for rows that begin with a nested block (256 whole blocks), and become float32 elsewhere.

        Raises TypeError for what is no integer, IndexError outside of the matrix, and ValueError naming the
        multiple that is needed where blocks of 32 do not fit either.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> w = lk.quantize_4bit(torch.randn(256, 512))
            >>> columns = w.narrow(1, 128, 256)
            >>> torch.equal(columns.dequantize(), w.dequantize()[:, 128:384])
            True
        """
        return _narrow(self, dim, start, length)

    def __repr__(self) -> str:
        return (
            f"Weight4bit({self.quant_type}, shape={tuple(self.shape)}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}, dtype={self.dtype}, device={self.device}, "
            f"{self.bits_per_weight:.3f} bits/weight)"
        )

    # -- bitsandbytes' serialized form -----------------------------------------------------------------------

    def to_bitsandbytes(self, prefix: str = "weight") -> dict[str, torch.Tensor]:
        """The entries bitsandbytes 0.43+ writes for this weight: ``prefix`` and ``prefix.<name>``, byte for byte.

        docs/format.md lists keys, dtypes and shapes. The tensors are this weight's own, not copies. bitsandbytes
        does not know "int4": such entries are of the same form, and :meth:`from_bitsandbytes` reads them.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> w = lk.quantize_4bit(torch.randn(8, 64), "int4", double_quant=False)
            >>> for key in w.to_bitsandbytes("up.weight"):
            ...     print(key)
            up.weight
            up.weight.absmax
            up.weight.quant_map
            up.weight.quant_state.bitsandbytes__int4
        """
        state = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        entries = {"": self.packed, ".absmax": self.absmax, ".quant_map": self.code}
        if self.double_quant:
            entries[".nested_absmax"] = self.nested_absmax
            entries[".nested_quant_map"] = self.nested_code
            state["nested_blocksize"] = NESTED_BLOCKSIZE
            state["nested_dtype"] = "float32"
            state["nested_offset"] = self.nested_offset.item()
        blob = bytearray(json.dumps(state).encode())
        entries[f".{KEY}{self.quant_type}"] = torch.frombuffer(blob, dtype=torch.uint8)
        return {prefix + suffix: tensor for suffix, tensor in entries.items()}

    @classmethod
    def from_bitsandbytes(
        cls, state_dict: Mapping[str, torch.Tensor], prefix: str = "weight"
    ) -> Weight4bit:
        """The weight under ``prefix`` of a checkpoint that bitsandbytes wrote; tensors are used as they are.

        The checkpoint is not trusted: sizes, dtypes and the quant state are checked against each other, scales
        and tables must be finite, and the tables those of the quant_type.
        Raises ValueError naming the key, what was expected and what came.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> w = lk.quantize_4bit(torch.randn(8, 64))
            >>> again = lk.Weight4bit.from_bitsandbytes(w.to_bitsandbytes("up.weight"), "up.weight")
            >>> torch.equal(again.dequantize(), w.dequantize())
            True
        """

        def entry(suffix: str) -> torch.Tensor:
            key = prefix + suffix
            if not isinstance(state_dict.get(key), torch.Tensor):
                raise ValueError(
                    f"state_dict[{key!r}]: expected a tensor, got {kind_of(state_dict.get(key))}"
                )
            return state_dict[key]

        blob_prefix = f"{prefix}.{KEY}"
        blobs = [key for key in state_dict if key.startswith(blob_prefix)]
        if len(blobs) != 1:
            raise ValueError(f"state_dict: expected one key {prefix}.{KEYS_IN_WORDS}, got {blobs}")
        state = read_quant_state(blobs[0], entry(blobs[0].removeprefix(prefix)))
        if blobs[0] != blob_prefix + state["quant_type"]:
            raise ValueError(f"{blobs[0]}: quant_type inside is {state['quant_type']!r}")
        names = ("absmax", "quant_map")
        if "nested_offset" in state:
            names += ("nested_absmax", "nested_quant_map")
        known = {blobs[0], *(f"{prefix}.{name}" for name in names)}
        if extra := [k for k in state_dict if k.startswith(prefix + ".") and k not in known]:
            raise ValueError(
                f"state_dict: expected only {sorted(known)} under {prefix}, got {extra}"
            )
        nested = {}
        if "nested_offset" in state:
            nested["nested_absmax"] = entry(".nested_absmax")
            nested["nested_code"] = entry(".nested_quant_map")
            nested["nested_offset"] = torch.tensor(
                state["nested_offset"], dtype=torch.float32, device=nested["nested_absmax"].device
            )
        weight = cls(
            packed=entry(""),
            absmax=entry(".absmax"),
            code=entry(".quant_map"),
            shape=torch.Size(state["shape"]),
            dtype=DTYPES[state["dtype"]],
            quant_type=state["quant_type"],
            blocksize=state["blocksize"],
            **nested,
        )
        weight.validate(prefix)
        weight._check_values(prefix)
        return weight

    @classmethod
    def from_mxfp4(
        cls, blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.bfloat16
    ) -> Weight4bit:
        """A weight of an MXFP4 checkpoint (GPT-OSS's experts), exactly: nothing is quantized again.

        ``W[..., n, 32 b + i] = code(blocks[..., n, b, i // 2]) * 2 ** (scales[..., n, b] - 127)``, the low nibble
        first.

        Args:
            blocks: uint8 ``[N, K/32, 16]``, or of a stack ``[E, N, K/32, 16]``.
            scales: uint8 ``[N, K/32]`` or ``[E, N, K/32]``.
            dtype: that W counts as: float32, bfloat16 or float16.

        Raises TypeError for other dtypes; ValueError for shapes that do not fit, a scale of 255, which stands for
        NaN, or values of 2 ** 128 and more, which float32 does not hold.
        Source: OCP Microscaling Formats (MX) 1.0, 2023.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> blocks = torch.full((1, 1, 16), 0x72, dtype=torch.uint8)
            >>> w = lk.Weight4bit.from_mxfp4(blocks, torch.full((1, 1), 128, dtype=torch.uint8))
            >>> w.dequantize()[0, :4]
            tensor([ 2., 12.,  2., 12.], dtype=torch.bfloat16)
        """
        for name, tensor in {"blocks": blocks, "scales": scales}.items():
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.uint8:
                raise TypeError(
                    f"{name}: expected a uint8 tensor, got {getattr(tensor, 'dtype', tensor)}"
                )
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        if scales.dim() not in (2, 3) or tuple(blocks.shape) != (*scales.shape, 16):
            raise ValueError(
                "blocks, scales: expected shapes [N, K/32, 16] and [N, K/32], or those of a stack, got "
                f"{tuple(blocks.shape)} and {tuple(scales.shape)}"
            )
        if not scales.is_meta:
            _check_mxfp4(blocks, scales)
        packed = ((blocks << 4) | (blocks >> 4)).reshape(-1, 1)
        exponent = scales.flatten().to(torch.int32)
        bits = torch.where(exponent > 0, exponent << 23, 1 << 22)  # of 2 ** (exponent - 127)
        absmax = bits.view(torch.float32)
        shape = torch.Size((*scales.shape[:-1], scales.shape[-1] * 32))
        return cls(packed, absmax, code_of("mxfp4", blocks.device), shape, dtype, "mxfp4", 32)

    def validate(self, name: str = "weight") -> None:
        """Raises ValueError unless every tensor has the dtype, size and layout that shape and blocksize ask for.

        ``name`` is what messages call the weight. Values are not looked at; :meth:`from_bitsandbytes` does that.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> lk.quantize_4bit(torch.randn(8, 64)).validate()
        """
        check_blocksize(self.blocksize)
        if self.packed.dtype not in STORAGE_DTYPES:
            raise ValueError(
                f"{name}: expected packed data in one of {STORAGE_DTYPES}, got {self.packed.dtype}"
            )
        for field, (dtype, numel) in self.op_args().expected().items():
            key = name if field == "packed" else f"{name}.{_ENTRIES.get(field, field)}"
            tensor = getattr(self, field)
            if tensor is None:
                raise ValueError(f"{key}: expected a tensor beside {name}.nested_absmax, got None")
            fits = tensor.numel() == numel and (field in _ANY_SHAPE or tensor.dim() == 1)
            if not fits or tensor.dtype != dtype or not tensor.is_contiguous():
                size = f"contiguous {dtype} of shape {(numel,)}"
                if field == "packed":
                    size = f"{numel * dtype.itemsize} contiguous bytes"
                layout = "" if tensor.is_contiguous() else ", not contiguous"
                raise ValueError(
                    f"{key}: expected {size} for W of shape {tuple(self.shape)}, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}{layout}"
                )
        devices = {field: tensor.device for field, tensor in self.tensors().items()}
        if len(set(devices.values())) > 1:
            raise ValueError(f"{name}: expected all tensors on one device, got {devices}")

    def _check_values(self, name: str) -> None:
        """Statistics of a file: finite, and the tables those of the quant_type, which every writer rounds alike."""
        tables = {"code": code_of(self.quant_type), "nested_code": dynamic_code()}
        for field, tensor in self.tensors().items():
            if tensor.is_meta or field == "packed" or not tensor.is_floating_point():
                continue
            key = f"{name}.{_ENTRIES.get(field, field)}"
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{key}: expected finite values, got a NaN or an infinity")
            table = tables.get(field)
            if table is not None and not torch.allclose(tensor.cpu(), table, rtol=0.0, atol=1e-6):
                raise ValueError(
                    f"{key}: expected the table of {self.quant_type}, got other values"
                )


# -- quantization --------------------------------------------------------------------------------------------


def quantize_4bit(
    weight: torch.Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    quant_storage: torch.dtype = torch.uint8,
) -> Weight4bit:
    """Quantize ``weight [N, K]`` (float32, bfloat16 or float16) to 4 bits, one absmax per ``blocksize`` elements.

    A stack ``[E, N, K]`` is quantized as the matrix ``[E*N, K]``, as bitsandbytes does.

    ``absmax_b = max |w|`` over block b of the flat weight; each element becomes the nearest code to
    ``w / absmax_b`` (ties to the lower code) of the 16 values of ``quant_type``: "nf4", "fp4" or "int4", see
    docs/format.md. With ``double_quant`` the absmax, less their mean, become 8-bit
    dynamic values in blocks of 256 (QLoRA, Dettmers et al. 2023, section 3). ``quant_storage`` is the dtype
    the packed bytes are presented in.

    Raises ValueError for a NaN or infinity in ``weight`` (naming the first index), an unknown quant_type or
    blocksize, or a weight that is neither a matrix nor a stack; TypeError for other dtypes.

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> weight = torch.randn(256, 512)
        >>> w = lk.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        >>> bool((w.dequantize() - weight).abs().max() < 0.16 * weight.abs().max())
        True
    """
    check_float("weight", weight)
    if weight.dim() not in (2, 3):
        raise ValueError(
            f"weight: expected a matrix [N, K] or a stack [E, N, K], got shape {tuple(weight.shape)}"
        )
    code = check_quantization(quant_type, blocksize, quant_storage, weight.device)
    packed, absmax = packed_and_absmax(weight, code, blocksize, weight.shape)
    args = weight.shape, weight.dtype, quant_type, blocksize
    return finished(packed, absmax, code, *args, double_quant, quant_storage)


def check_quantization(
    quant_type: str, blocksize: int, quant_storage: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """The code of ``quant_type``. Raises ValueError for settings that nothing can be quantized with."""
    check_blocksize(blocksize)
    if quant_storage not in STORAGE_DTYPES:
        raise ValueError(f"quant_storage: expected one of {STORAGE_DTYPES}, got {quant_storage}")
    check_quant_type(quant_type)
    return code_of(quant_type, device)


def finished(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    shape: torch.Size,
    dtype: torch.dtype,
    quant_type: str,
    blocksize: int,
    double_quant: bool,
    quant_storage: torch.dtype,
) -> Weight4bit:
    """The weight of packed bytes and float32 absmax, which are double-quantized where that is wanted."""
    if quant_storage.itemsize > 1:
        flat = torch.nn.functional.pad(
            packed.flatten(), (0, -packed.numel() % quant_storage.itemsize)
        )
        packed = flat.view(quant_storage)[:, None]
    nested = {}
    if double_quant:
        nested_code = dynamic_code(absmax.device)
        absmax, nested_absmax, offset = ops.double_quantize(absmax, nested_code)
        nested = {
            "nested_absmax": nested_absmax,
            "nested_code": nested_code,
            "nested_offset": offset,
        }
    return Weight4bit(packed, absmax, code, shape, dtype, quant_type, blocksize, **nested)


def packed_and_absmax(
    weight: torch.Tensor, code: torch.Tensor, blocksize: int, shape: torch.Size, before: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of ``weight``: elements of a tensor of ``shape``, from the one on that ``before`` others precede.

    Raises ValueError for a NaN or infinity, naming its index in the whole.
    """
    weight = weight.detach()
    packed, absmax = ops.quantize_4bit(weight, code, blocksize)
    if not weight.is_meta:
        _check_finite(weight, absmax, blocksize, shape, before)
    return packed, absmax


def _check_finite(
    weight: torch.Tensor, absmax: torch.Tensor, blocksize: int, shape: torch.Size, before: int
) -> None:
    """The quantizer carries a NaN or infinity of a block into its absmax, so only the absmax need be read."""
    bad = (~torch.isfinite(absmax)).nonzero()
    if bad.numel():
        start = int(bad[0]) * blocksize
        block = weight.flatten()[start : start + blocksize]
        inside = int((~torch.isfinite(block)).nonzero()[0])
        flat = torch.tensor(before + start + inside)
        index = tuple(int(i) for i in torch.unravel_index(flat, shape))
        raise ValueError(
            f"weight: expected finite values, got {float(block[inside])} at index {index}"
        )


def _check_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> None:
    """That every value is finite in float32. Only blocks under the largest scales have others."""
    if bool((scales == 255).any()):
        raise ValueError("scales: expected exponents up to 254, got 255, which stands for NaN")
    for exponent, least in (
        (253, 6),
        (254, 4),
    ):  # the magnitude from which on 2 ** 128 is reached: 4 and 2
        found = blocks[scales == exponent]
        if bool((((found & 7) >= least) | ((found >> 4 & 7) >= least)).any()):
            raise ValueError(
                f"scales: expected values below 2 ** 128, got larger ones under the exponent {exponent}"
            )


# -- slices --------------------------------------------------------------------------------------------------

_LEAST = BLOCKSIZES[0]  # elements that must stay together


def _narrow(w: Weight4bit, dim: int, start: int, length: int) -> Weight4bit:
    """See :meth:`Weight4bit.narrow`.

    The slice is ``runs`` equal runs of the flat weight, ``run`` elements each, the first at ``first``, one every
    ``pitch``. Each run begins with a block, which so must begin within the blocks of the whole.
    """
    _check_slice(w, dim, start, length)
    shape = (*w.shape[:dim], length, *w.shape[dim + 1 :])
    inner = math.prod(w.shape[dim + 1 :])
    runs, run, first, pitch = math.prod(w.shape[:dim]), length * inner, start * inner, 0
    if runs > 1 and length < w.shape[dim]:
        pitch = w.shape[dim] * inner
    else:  # one after the other
        runs, run = 1, runs * run
    fits = [b for b in BLOCKSIZES if first % b == pitch % b == (run % b if pitch else 0) == 0]
    fits = [b for b in fits if b <= w.blocksize]
    if not fits:
        raise ValueError(_misaligned(w.shape, dim, start, length))
    blocksize = fits[-1]

    data, size = w.packed.reshape(-1).view(torch.uint8), ceil_div(run, 2)
    data = data.as_strided(
        (runs, size), (pitch // 2, 1), data.storage_offset() + first // 2
    ).flatten()
    starts = torch.arange(runs, device=w.device)[:, None] * pitch + first
    steps = torch.arange(ceil_div(run, blocksize), device=w.device) * blocksize
    blocks = (starts + steps).flatten() // w.blocksize
    first_block = first // w.blocksize
    if (
        w.double_quant
        and blocksize == w.blocksize
        and runs == 1
        and first_block % NESTED_BLOCKSIZE == 0
    ):
        nested = blocks[::NESTED_BLOCKSIZE] // NESTED_BLOCKSIZE
        scales = {"absmax": w.absmax[blocks], "nested_absmax": w.nested_absmax[nested]}
    else:
        absmax = block_scales(w.absmax, w.nested_absmax, w.nested_code, w.nested_offset)[blocks]
        nothing = dict.fromkeys(("nested_absmax", "nested_code", "nested_offset"))
        scales = {"absmax": absmax, **nothing}
    packed = stored_like(w.packed, data)
    return dataclasses.replace(
        w, packed=packed, shape=torch.Size(shape), blocksize=blocksize, **scales
    )


def _check_slice(w: Weight4bit, dim: object, start: object, length: object) -> None:
    if any(type(value) is not int for value in (dim, start, length)):
        raise TypeError(f"dim, start, length: expected integers, got {(dim, start, length)!r}")
    if dim not in range(len(w.shape)):
        which = ("rows", "columns") if len(w.shape) == 2 else ("experts", "rows", "columns")
        words = ", ".join(f"{i} ({name})" for i, name in enumerate(which[:-1]))
        raise IndexError(f"dim: expected {words} or {len(which) - 1} ({which[-1]}), got {dim}")
    if start < 0 or length < 0 or start + length > w.shape[dim]:
        which = ("experts", "rows", "columns")[dim - len(w.shape)]
        raise IndexError(
            f"start, length: expected a part of {w.shape[dim]} {which}, got {length} from {start} on"
        )


def _misaligned(shape: torch.Size, dim: int, start: int, length: int) -> str:
    K, inner, size = shape[-1], math.prod(shape[dim + 1 :]), shape[dim]
    multiple = _LEAST // math.gcd(inner, _LEAST)
    what = {1: "columns", 2: f"rows of {K} columns"}.get(
        len(shape) - dim, f"experts of {inner} elements"
    )
    if math.prod(shape[:dim]) == 1:
        return f"start: expected a multiple of {multiple} for {what}, got {start}"
    if size * inner % _LEAST:
        cut, of = ("columns", "K") if dim == len(shape) - 1 else ("rows of a stack", "N*K")
        return (
            f"dim: expected {'0' if len(shape) == 2 or dim == 1 else '0 or 1'}, since {cut} can be cut only where "
            f"{of} is a multiple of {_LEAST}, got {dim} for {of} = {size * inner}"
        )
    return f"start, length: expected multiples of {multiple} for {what}, got {start}, {length}"


def stored_like(packed: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """``data`` in the storage dtype and the orientation of ``packed``."""
    padded = data.new_zeros(ceil_div(data.numel(), packed.itemsize) * packed.itemsize)
    padded[: data.numel()] = data  # a copy, also of rows, which were a view
    data = padded.view(packed.dtype)
    row = packed.dim() == 2 and packed.shape[0] == 1 and packed.shape[1] > 1
    return data[None, :] if row else data[:, None]
