"""The 4-bit weight, in the bytes of bitsandbytes: quantize, dequantize, load, save. docs/format.md draws it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping

import torch

from .schema import FLOAT_DTYPES, NESTED_BLOCKSIZE, ceil_div, check_float, ops

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# NF4: quantiles of the normal distribution, scaled to [-1, 1] (QLoRA, Dettmers et al. 2023, appendix E).
# FP4: sign, 2 exponent bits, 1 mantissa bit; bitsandbytes' values, largest = 1.
CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(v / 12.0 for v in (
        0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0,
    )),
}  # fmt: skip
DTYPES = {str(d).removeprefix("torch."): d for d in FLOAT_DTYPES}
STORAGES = {"uint8": torch.uint8, **DTYPES}
_STORAGE_DTYPES = tuple(STORAGES.values())
_ENTRIES = {"code": "quant_map", "nested_code": "nested_quant_map"}  # bitsandbytes' names of ours


def code_of(quant_type: str, device: torch.device | str | None = None) -> torch.Tensor:
    """The 16 float32 values of "nf4" or "fp4"."""
    if not isinstance(quant_type, str) or quant_type not in CODES:
        raise ValueError(f"quant_type: expected 'nf4' or 'fp4', got {quant_type!r}")
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


def dynamic_code(device: torch.device | str | None = None) -> torch.Tensor:
    """The 256 sorted float32 values of the signed dynamic 8-bit type (Dettmers et al., arXiv 1511.04561, 2110.02861).

    Seven decades 10^-6 .. 10^0; decade i holds 2^i fractions, the midpoints of equal steps of [0.1, 1],
    with both signs; then 0 and 1.
    """
    return torch.tensor(_dynamic_values(), dtype=torch.float32, device=device)


@functools.cache
def _dynamic_values() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        for sign in (1, -1):
            values += (sign * 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
    return tuple(sorted(values))


def check_blocksize(blocksize: object) -> None:
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: expected one of {BLOCKSIZES}, got {blocksize!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class Weight4bit:
    """A matrix ``W [N, K]`` in 4 bits: ``W[n, k] = code[nibble_i] * scale[i // blocksize]``, ``i = n*K + k``.

    ``scale = absmax`` (float32), or with double quantization
    ``scale[j] = nested_code[absmax[j]] * nested_absmax[j // 256] + nested_offset`` (product, then sum, each
    rounded to float32). Made by :func:`quantize_4bit` or :meth:`from_bitsandbytes`, which validate; the
    constructor only stores. ``packed`` keeps the storage dtype and orientation it came with.
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

    def op_args(self) -> tuple:
        """The nine flat arguments of a 4-bit weight in an operator's schema (see ``schema.WEIGHT``)."""
        return (
            self.packed, self.absmax, self.code,
            self.nested_absmax, self.nested_code, self.nested_offset,
            self.shape[0], self.shape[1], self.blocksize,
        )  # fmt: skip

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that exist, by field name."""
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
        """W dense, ``[N, K]``: float32 products, rounded once to ``dtype`` (default: ``self.dtype``)."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
        return ops.dequantize_4bit(*self.op_args(), dtype)

    def to(self, device: torch.device | str | int) -> Weight4bit:
        """The same weight on another device."""
        return dataclasses.replace(self, **{n: t.to(device) for n, t in self.tensors().items()})

    def narrow(self, dim: int, start: int, length: int) -> Weight4bit:
        """Rows (``dim`` 0) or columns (1) ``start : start + length`` as a weight of their own; its bytes are copies.

        Nothing is quantized again: ``w.narrow(...).dequantize()`` has the bits of ``w.dequantize().narrow(...)``.
        Where a cut goes through blocks the slice has smaller ones, down to 32 elements. Scales stay
        double-quantized for rows that begin with a nested block (256 whole blocks), and become float32 elsewhere.

        Raises TypeError for what is no integer, IndexError outside of the matrix, and ValueError naming the
        multiple that is needed where blocks of 32 do not fit either.
        """
        from .slices import narrow  # which imports this module

        return narrow(self, dim, start, length)

    def __repr__(self) -> str:
        return (
            f"Weight4bit({self.quant_type}, shape={tuple(self.shape)}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}, dtype={self.dtype}, device={self.device}, "
            f"{self.bits_per_weight:.3f} bits/weight)"
        )

    # -- bitsandbytes' serialized form -----------------------------------------------------------------------

    def to_bitsandbytes(self, prefix: str = "weight") -> dict[str, torch.Tensor]:
        """The entries bitsandbytes 0.43+ writes for this weight: ``prefix`` and ``prefix.<name>``, byte for byte."""
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
        entries[f".quant_state.bitsandbytes__{self.quant_type}"] = torch.frombuffer(
            blob, dtype=torch.uint8
        )
        return {prefix + suffix: tensor for suffix, tensor in entries.items()}

    @classmethod
    def from_bitsandbytes(
        cls, state_dict: Mapping[str, torch.Tensor], prefix: str = "weight"
    ) -> Weight4bit:
        """The weight under ``prefix`` of a checkpoint that bitsandbytes wrote; tensors are used as they are.

        The checkpoint is not trusted: sizes, dtypes and the quant state are checked against each other.
        Raises ValueError naming the key, what was expected and what came.
        """

        def entry(suffix: str) -> torch.Tensor:
            key = prefix + suffix
            if not isinstance(state_dict.get(key), torch.Tensor):
                raise ValueError(
                    f"state_dict[{key!r}]: expected a tensor, got {_kind(state_dict.get(key))}"
                )
            return state_dict[key]

        blob_prefix = f"{prefix}.quant_state.bitsandbytes__"
        blobs = [key for key in state_dict if key.startswith(blob_prefix)]
        if len(blobs) != 1:
            raise ValueError(f"state_dict: expected one key {blob_prefix}<nf4|fp4>, got {blobs}")
        state = _read_quant_state(blobs[0], entry(blobs[0].removeprefix(prefix)))
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
        return weight

    def validate(self, name: str = "weight") -> None:
        """Raises ValueError unless every tensor has the dtype, size and layout that shape and blocksize ask for."""
        numel = math.prod(self.shape)
        blocks = ceil_div(numel, self.blocksize)
        size = ceil_div(numel, 2)
        packed = self.packed
        if packed.dtype not in _STORAGE_DTYPES:
            raise ValueError(
                f"{name}: expected packed data in one of {_STORAGE_DTYPES}, got {packed.dtype}"
            )
        held = packed.numel() * packed.element_size()
        padded = ceil_div(size, packed.element_size()) * packed.element_size()
        if held != padded or not packed.is_contiguous():
            raise ValueError(
                f"{name}: expected {padded} contiguous bytes for shape {tuple(self.shape)}, got {held}"
                f"{'' if packed.is_contiguous() else ' not contiguous'}"
            )
        absmax_dtype = torch.uint8 if self.double_quant else torch.float32
        expected = {"absmax": ((blocks,), absmax_dtype), "code": ((16,), torch.float32)}
        if self.double_quant:
            expected["nested_absmax"] = ((ceil_div(blocks, NESTED_BLOCKSIZE),), torch.float32)
            expected["nested_code"] = ((256,), torch.float32)
        for field, (shape, dtype) in expected.items():
            tensor = getattr(self, field)
            if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}.{_ENTRIES.get(field, field)}: expected contiguous {dtype} of shape {shape}, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        devices = {field: tensor.device for field, tensor in self.tensors().items()}
        if len(set(devices.values())) > 1:
            raise ValueError(f"{name}: expected all tensors on one device, got {devices}")


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _read_quant_state(key: str, blob: torch.Tensor) -> dict:
    """The quant state's JSON, each field checked."""
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() > 4096 or blob.is_meta:
        came = f"{blob.dtype} {tuple(blob.shape)} on {blob.device}"
        raise ValueError(f"{key}: expected at most 4096 uint8 values, got {came}")
    try:
        state = json.loads(bytes(blob.tolist()).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{key}: expected JSON, got {bytes(blob[:40].tolist())!r}: {error}"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{key}: expected a JSON object, got {type(state).__name__}")

    def is_dim(value: object) -> bool:
        return type(value) is int and 0 <= value < 2**48

    def is_shape(value: object) -> bool:
        return (
            isinstance(value, list)
            and len(value) == 2
            and all(map(is_dim, value))
            and math.prod(value) < 2**62
        )

    nested = any(field.startswith("nested_") for field in state)
    fields = {
        "quant_type": (lambda v: v in ("nf4", "fp4"), "'nf4' or 'fp4'"),
        "blocksize": (lambda v: type(v) is int and v in BLOCKSIZES, f"one of {BLOCKSIZES}"),
        "dtype": (lambda v: isinstance(v, str) and v in DTYPES, f"one of {tuple(DTYPES)}"),
        "shape": (is_shape, "two sizes [N, K]"),
    }
    if nested:
        fields |= {
            "nested_blocksize": (lambda v: v == NESTED_BLOCKSIZE, str(NESTED_BLOCKSIZE)),
            "nested_dtype": (lambda v: v == "float32", "'float32'"),
            "nested_offset": (
                lambda v: type(v) in (int, float) and abs(v) < 3.4e38,  # False for a NaN
                "a finite float32",
            ),
        }
    for field, (valid, words) in fields.items():
        if field not in state or not valid(state[field]):
            raise ValueError(f"{key}: {field}: expected {words}, got {state.get(field)!r}")
    if unknown := state.keys() - fields:
        raise ValueError(f"{key}: unknown fields {sorted(unknown)}")
    return state


# -- quantization --------------------------------------------------------------------------------------------


def quantize_4bit(
    weight: torch.Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    quant_storage: torch.dtype = torch.uint8,
) -> Weight4bit:
    """Quantize ``weight [N, K]`` (float32, bfloat16 or float16) to 4 bits, one absmax per ``blocksize`` elements.

    ``absmax_b = max |w|`` over block b of the flat weight; each element becomes the nearest code to
    ``w / absmax_b`` (ties to the lower code). With ``double_quant`` the absmax, less their mean, become 8-bit
    dynamic values in blocks of 256 (QLoRA, Dettmers et al. 2023, section 3). ``quant_storage`` is the dtype
    the packed bytes are presented in.

    Raises ValueError for a NaN or infinity in ``weight`` (naming the first index), an unknown quant_type or
    blocksize, or a weight that is not a matrix; TypeError for other dtypes.
    """
    check_float("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected a matrix [N, K], got shape {tuple(weight.shape)}")
    check_blocksize(blocksize)
    if quant_storage not in _STORAGE_DTYPES:
        raise ValueError(f"quant_storage: expected one of {_STORAGE_DTYPES}, got {quant_storage}")
    code = code_of(quant_type, weight.device)
    weight = weight.detach()
    packed, absmax = ops.quantize_4bit(weight, code, blocksize)
    if not weight.is_meta:
        _check_finite(weight, absmax, blocksize)
    if quant_storage.itemsize > 1:
        flat = torch.nn.functional.pad(
            packed.flatten(), (0, -packed.numel() % quant_storage.itemsize)
        )
        packed = flat.view(quant_storage)[:, None]
    nested = {}
    if double_quant:
        nested_code = dynamic_code(weight.device)
        absmax, nested_absmax, offset = ops.double_quantize(absmax, nested_code)
        nested = {
            "nested_absmax": nested_absmax,
            "nested_code": nested_code,
            "nested_offset": offset,
        }
    return Weight4bit(
        packed, absmax, code, weight.shape, weight.dtype, quant_type, blocksize, **nested
    )


def _check_finite(weight: torch.Tensor, absmax: torch.Tensor, blocksize: int) -> None:
    """The quantizer carries a NaN or infinity of a block into its absmax, so only the absmax need be read."""
    bad = (~torch.isfinite(absmax)).nonzero()
    if bad.numel():
        start = int(bad[0]) * blocksize
        block = weight.flatten()[start : start + blocksize]
        flat = start + int((~torch.isfinite(block)).nonzero()[0])
        index = (flat // weight.shape[1], flat % weight.shape[1])
        raise ValueError(
            f"weight: expected finite values, got {float(weight[index])} at index {index}"
        )
