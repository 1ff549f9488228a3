"""What the kernels are made of: codes and scales of a weight, dropout, products."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter of triton multiplies the bits of bfloat16 as if they were integers.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32 accuracy: products of two operands of one 16-bit type are exact on tensor cores, others
    are made in float32 as ``PRECISION`` says (launch.precision_of)."""
    if a.dtype == b.dtype and a.dtype != tl.float32 and not INTERPRETED:
        acc = tl.dot(a, b, acc)
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts off
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(value != value, (bits >> 16) | 0x40, nearest)
        result = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def split_pairs(pair, dtype: tl.constexpr):
    """The even and the odd elements of what was read two at a time (unpack.pairs)."""
    if dtype == tl.float32:
        even, odd = pair.to(tl.int32), (pair >> 32).to(tl.int32)
    else:
        even, odd = pair.to(tl.int16), (pair >> 16).to(tl.int16)
    return even.to(dtype, bitcast=True), odd.to(dtype, bitcast=True)


# -- a weight in 4 bits ----------------------------------------------------------------------------


@triton.jit
def block_scale(w, block, mask):
    """The float32 scale of each block: product, then sum, each rounded (launches turn fusion off)."""
    if w.nested_absmax is None:
        scale = tl.load(w.absmax + block, mask, 0.0)
    else:
        index = tl.load(w.absmax + block, mask, 0).to(tl.int32)
        nested = tl.load(w.nested_absmax + (block >> 8), mask, 0.0)
        scale = tl.load(w.nested_code + index) * nested + tl.load(w.nested_offset)
    return scale


@triton.jit
def weight_elements(w, i, mask, SHIFT: tl.constexpr):
    """Elements i (64 bits) of any weight in float32; 0 where not ``mask``."""
    byte = tl.load(w.packed + (i >> 1), mask, 0).to(tl.int32)
    nibble = tl.where((i & 1) == 0, byte >> 4, byte & 15)
    value = tl.load(w.code + nibble) * block_scale(w, i >> SHIFT, mask)
    return tl.where(mask, value, 0.0)


@triton.jit
def code_words(code, dtype: tl.constexpr):
    """The 16 codes in a 16-bit type as 8 words for ``prmt``: four of low bytes, then four of high bytes."""
    words = ()
    for plane in tl.static_range(2):
        for word in tl.static_range(4):
            bits = tl.full((), 0, tl.uint32)
            for i in tl.static_range(4):
                value = rounded(tl.load(code + (4 * word + i)), dtype).to(tl.uint16, bitcast=True)
                bits |= ((value.to(tl.uint32) >> (8 * plane)) & 0xFF) << (8 * i)
            words = words + (bits,)
    return words


# Four packed bytes $4 = | b3 | b2 | b1 | b0 |, each | even: high nibble | odd: low nibble |, to four even
# codes ($0, $1) and four odd ones ($2, $3). A prmt looks up the low three bits of four nibbles among 8 bytes;
# a third one chooses by the nibble's highest bit between the codes 0-7 and 8-15. Two bytes at a time this
# gives | b1 even | b1 odd | b0 even | b0 odd |, once of the codes' low bytes and once of the high bytes.
# Each word of the table is an operand four times, one for each element; the first stands for all.
LOOKUP_ASM = tl.constexpr("""{
.reg .b32 s, m, a, b, l, h;
and.b32 s, $4, 0x77777777;
and.b32 m, $4, 0x88888888;
shr.b32 m, m, 1;
or.b32 m, m, 0x32103210;
prmt.b32 a, $5, $9, s;
prmt.b32 b, $13, $17, s;
prmt.b32 l, a, b, m;
prmt.b32 a, $21, $25, s;
prmt.b32 b, $29, $33, s;
prmt.b32 h, a, b, m;
prmt.b32 $0, l, h, 0x7351;
prmt.b32 $2, l, h, 0x6240;
shr.b32 s, s, 16;
shr.b32 m, m, 16;
prmt.b32 a, $5, $9, s;
prmt.b32 b, $13, $17, s;
prmt.b32 l, a, b, m;
prmt.b32 a, $21, $25, s;
prmt.b32 b, $29, $33, s;
prmt.b32 h, a, b, m;
prmt.b32 $1, l, h, 0x7351;
prmt.b32 $3, l, h, 0x6240;
}""")
LOOKUP_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 33)


@triton.jit
def code_pairs(packed, code, words, dtype: tl.constexpr, PRMT: tl.constexpr):
    """The codes of the high and of the low nibbles of packed bytes, rounded to ``dtype``.

    With ``PRMT`` (NVIDIA, 16-bit types) from ``words`` in registers, else from memory, that is from the
    first-level cache.
    """
    if PRMT:
        even, odd = tl.inline_asm_elementwise(
            LOOKUP_ASM,
            LOOKUP_CONSTRAINTS,
            [
                packed,
                words[0],
                words[1],
                words[2],
                words[3],
                words[4],
                words[5],
                words[6],
                words[7],
            ],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=4,
        )
        even, odd = even.to(dtype, bitcast=True), odd.to(dtype, bitcast=True)
    else:
        even = rounded(tl.load(code + (packed >> 4)), dtype)
        odd = rounded(tl.load(code + (packed & 15)), dtype)
    return even, odd


# -- dropout ---------------------------------------------------------------------------------------


@triton.jit
def kept(seed, threshold, m, k0, COLUMNS: tl.constexpr):
    """[rows m, columns k0 .. k0 + COLUMNS): whether dropout keeps the element; k0 is a multiple of 4.

    ``threshold`` is a number, or a column of one for each row.
    """
    rows: tl.constexpr = m.shape[0]
    row = m.to(tl.uint32)[:, None] + tl.zeros((rows, COLUMNS // 4), tl.uint32)
    group = (k0 // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)[None, :] + tl.zeros_like(row)
    zero = tl.zeros_like(row)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), group, row, zero, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows, COLUMNS))
    return words >= tl.cast(threshold, tl.uint32)
