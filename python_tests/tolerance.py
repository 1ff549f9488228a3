"""The bound a kernel must keep, element by element; no averages.

    |actual - reference| <= c u_acc magnitude + u_out |reference| + floor

``reference`` is float64 on the same quantized weights. ``magnitude`` is the same formula on absolute
values, so every product that a kernel sums stands in it with its size. For a linear layer that is
``|X| |W|ᵀ + |bias|``. With an adapter it has these terms, named as the errors they bound:

    base     |X| |W|ᵀ                          sums of the frozen matrix
    adapter  |scaling| (|X̃| |A|ᵀ) |B|ᵀ         S is itself a float32 sum, and its error goes through B;
                                               then the sum of S Bᵀ
    bias     |bias|                            one addition

and likewise for the gradients, where dS takes the place of S. No CPU kernel rounds an intermediate to
less than float32, so u_acc is the same for all terms.

Tensor cores multiply 16-bit operands. There the codes of the weight (or the decoded weights), and for many
rows what adapter and bias add to the product, are rounded once to the dtype of x; sums, scales and the
adapter's own products stay float32. So y and dx of 16-bit activations get one more term on a GPU (see
``operands_rounded``): u_x magnitude, u_x the unit roundoff of x's dtype. CPUs with products of bfloat16
round operands likewise where ``lk.backends.products`` says so: those of bfloat16 activations, and under
``torch.set_float32_matmul_precision("medium")`` those of float32 ones, which count as two roundings.
"""

from __future__ import annotations

import contextlib
import functools
import random
import zlib
from typing import NamedTuple

import torch

import cases
import lowrank_kernels as lk
from lowrank_kernels import reference
from lowrank_kernels.arguments import WeightArgs, given

U_ACC = 2.0**-24  # unit roundoff of float32, the dtype of every sum and intermediate

# u_out: one rounding at the end, to nearest.
U_OUT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# Below the normal range a rounding is absolute: half of the smallest subnormal of the output, plus up
# to 2^16 float32 products that each lose 2^-150.
FLOOR = {
    torch.float32: 2.0**-150 + 2.0**-134,
    torch.bfloat16: 2.0**-134 + 2.0**-134,
    torch.float16: 2.0**-25 + 2.0**-134,
}

# c for data of zero mean. A partial sum after k of K terms is about sqrt(k) |t| and each addition rounds
# at u of it, so the whole error of one accumulator is about u |t| K / 2, while magnitude is about
# 2/3 K |t|: some 0.7 u whatever K is, and 4 to 5 standard deviations over the elements of a test. Several
# accumulators only make it smaller. To that come at most 3 u for the roundings of one product
# (scale times code, times x, times 1/(1-p)); the adapter's term has two such sums, each with half of the
# magnitude's growth. 8 holds all this with about a factor of two; a result that lost one term, or
# rounded one intermediate to bfloat16, misses it by orders of magnitude.
C_ZERO_MEAN = 8.0


# float16 products with decoded weights below its normal range: half of its smallest subnormal each.
_SUBNORMAL = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}

_operands_rounded = False
_sums = 1.0

# A tensor core aligns the products of one instruction to the largest and cuts off what sticks out, instead
# of rounding each addition to nearest: errors of one sign, which do not cancel. Over a few hundred
# instructions that is about twice what C_ZERO_MEAN allows for.
HARDWARE_SUMS = 4.0


@contextlib.contextmanager
def operands_rounded(sums: float = 1.0):
    """Within the block y and dx have the term of tensor cores in their bound, and c is ``sums`` times itself."""
    global _operands_rounded, _sums
    _operands_rounded, _sums = True, sums
    try:
        yield
    finally:
        _operands_rounded, _sums = False, 1.0


def c_worst_case(terms: int) -> float:
    """c for any data, of any sign and range: the a-priori bound of a sum of that many terms in float32."""
    return 8.0 + terms


def evaluate(op: str, args: tuple) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """(reference outputs, magnitudes), float64, for one of the matrix operators and its arguments."""
    function = getattr(reference, op)
    values = function(*args)
    if "_group" in op:
        return cases.flatten(values), _group_magnitudes(op, args)
    if op.startswith("grouped"):
        start = 3 if op.endswith("backward") else 1
        weight = _absolute_weight(WeightArgs(*args[start : start + 9]))
        others = [_absolute(value) for value in args]
        magnitudes = function(*others[:start], *weight, *others[start + 9 :])
        return cases.flatten(values), cases.flatten(magnitudes)
    # The weight is made dense, so that absolute values can be taken of it.
    if op == "linear_4bit":
        x, bias = args[0].double(), args[-1]
        magnitudes = x.abs() @ reference.dequantize_4bit(*args[1:10]).double().abs().T
        magnitudes = magnitudes if bias is None else magnitudes + bias.double().abs()
    elif op == "linear_4bit_dx":
        magnitudes = args[0].double().abs() @ reference.dequantize_4bit(*args[1:10]).double().abs()
    elif "lora_linear_4bit" in op:
        start = 3 if op.endswith("backward") else 1
        weight = reference.dequantize_4bit(*args[start : start + 9])
        dense = (*args[:start], weight, *args[start + 9 :])
        magnitudes = getattr(reference, op.replace("_4bit", ""))(*map(_absolute, dense))
    else:
        magnitudes = function(*map(_absolute, args))
    if not isinstance(values, tuple):
        values, magnitudes = (values,), (magnitudes,)
    return values, magnitudes


def _group_magnitudes(op: str, args: tuple) -> tuple[torch.Tensor, ...]:
    """Those of each weight by itself; of dx their sum."""
    parts = []
    for i, single in enumerate(cases.of_each_weight(op, args)):
        if single is None:
            parts.append(None)
            continue
        _, magnitudes = evaluate(*single)
        none = magnitudes[0].new_empty(0)
        if single[0] == "linear_4bit":
            magnitudes = *magnitudes, magnitudes[0].new_empty((len(magnitudes[0]), 0))
        elif single[0] == "linear_4bit_dx":
            dbias = single[1][0].double().abs().sum(0) if args[-1][i] else none
            magnitudes = (magnitudes[0] if args[-4] else none), none, none, dbias
        parts.append(magnitudes)
    width = max(len(part) for part in parts if part is not None)
    empty = next(part for part in parts if part is not None)[0].new_empty(0)
    lists = [[empty if part is None else part[i] for part in parts] for i in range(width)]
    if op.endswith("backward"):
        dx = sum(part[0] for part in parts if part is not None)
        return cases.flatten((dx, *lists[1:]))
    return cases.flatten(lists)


def _absolute_weight(w: WeightArgs) -> WeightArgs:
    """|W| as a 4-bit weight."""
    scales = reference.block_scales(w.absmax, w.nested_absmax, w.nested_code, w.nested_offset)
    nothing = dict.fromkeys(("nested_absmax", "nested_code", "nested_offset"))
    return w._replace(code=w.code.abs(), absmax=scales.abs(), **nothing)


def _absolute(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double().abs()
    return abs(value) if type(value) is float else value


OUTPUTS = {
    "lora_linear_4bit": ("y", "s"),
    "lora_linear": ("y", "s"),
    "lora_linear_4bit_backward": ("dx", "dA", "dB", "dbias"),
    "lora_linear_backward": ("dx", "dA", "dB", "dbias"),
    "multi_lora_": ("y", "s"),
    "multi_lora_backward": ("dx", "dA", "dB"),
    "multi_lora_linear_4bit": ("y", "s"),
    "multi_lora_linear_4bit_backward": ("dx", "dA", "dB", "dbias"),
    "grouped_lora_linear_4bit": ("y", "s"),
    "grouped_lora_linear_4bit_backward": ("dx", "dA", "dB"),
}


class Problem(NamedTuple):
    """Arguments of an operator, and what ``evaluate`` says of them."""

    op: str
    args: tuple
    values: tuple[torch.Tensor, ...]
    magnitudes: tuple[torch.Tensor, ...]

    def check(self) -> tuple[torch.Tensor, ...]:
        """Runs the operator and asserts that its outputs, which it returns, keep the bound."""
        outputs = cases.run(self.op, self.args)
        _check(self.op, self.args, outputs, self.values, self.magnitudes, C_ZERO_MEAN)
        return outputs


@functools.lru_cache(maxsize=4)
def problem(op: str, case: cases.Case) -> Problem:
    """Random arguments for this case, the same for every backend and in every run, and their reference.

    Nobody may write to them: the next backend gets the same tensors.
    """
    torch.manual_seed(zlib.crc32(f"{op} {case}".encode()))
    random.seed(f"{op} {case}")
    args = cases.make(op, case)
    return Problem(op, args, *evaluate(op, args))


def check(op: str, args: tuple, outputs, c: float = C_ZERO_MEAN) -> None:
    """Asserts that the outputs of ``op(*args)`` keep the bound."""
    _check(op, args, outputs, *evaluate(op, args), c)


def _check(op, args, outputs, values, magnitudes, c) -> None:
    outputs = cases.flatten(outputs)
    assert len(outputs) == len(values), f"{op}: {len(outputs)} outputs, expected {len(values)}"
    names = OUTPUTS.get(op, ("output",))
    rows = args[0]
    if "_group" in op:
        names, rows = _group_names(op, len(values)), _group_rows(args[0])
    for name, actual, value, magnitude in zip(names, outputs, values, magnitudes, strict=True):
        product = name in ("output", "y", "dx")
        extra = operand_rounding(rows, magnitude) if product else 0.0
        assert_close(f"{op}: {name}", actual, value, magnitude, c, extra)


def _group_names(op: str, outputs: int) -> tuple[str, ...]:
    """OUTPUTS of the operator on one weight, for each weight of a group; dx is one."""
    names = OUTPUTS[op.replace("_group", "")]
    shared = names[:1] if names[0] == "dx" else ()
    each = names[len(shared) :]
    count = (outputs - len(shared)) // len(each)
    return *shared, *(name for name in each for _ in range(count))


def _group_rows(first) -> torch.Tensor:
    """x, or the dy of all weights side by side: what a rounded operand is a part of."""
    if isinstance(first, torch.Tensor):
        return first
    return torch.cat([t for t in first if given(t) is not None], 1)


def operand_rounding(rows: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor | float:
    """What the bound of ``rows`` times the weight (y of x, dx of dy) has more where operands are rounded."""
    on_cpu = rows.device.type == "cpu" and lk.backends.active() == "cpu"
    if on_cpu and lk.backends.products(rows.dtype) == torch.bfloat16:
        rounded, roundings = torch.bfloat16, 1 if rows.dtype == torch.bfloat16 else 2
    elif _operands_rounded and rows.dtype != torch.float32:
        rounded, roundings = rows.dtype, 1
    else:
        return 0.0
    below = _SUBNORMAL[rounded] * rows.double().abs().sum(1, keepdim=True)
    return roundings * U_OUT[rounded] * magnitude + below


def assert_close(
    name: str,
    actual: torch.Tensor,
    value: torch.Tensor,
    magnitude: torch.Tensor,
    c: float = C_ZERO_MEAN,
    extra: torch.Tensor | float = 0.0,
) -> None:
    """Asserts the bound, plus ``extra``; a failure prints the worst element.

    Where the reference is NaN or infinite, or overflows the output's dtype, the same must come.
    """
    assert actual.shape == value.shape, f"{name}: shape {tuple(actual.shape)}, not {value.shape}"
    if value.numel() == 0:
        return
    a = actual.detach().double()
    bound = (
        _sums * c * U_ACC * magnitude
        + U_OUT[actual.dtype] * value.abs()
        + FLOOR[actual.dtype]
        + extra
    )
    rounded = value.to(actual.dtype).double()
    same = (a == rounded) | (a.isnan() & rounded.isnan())
    error = (a - value).abs()
    wrong = ~(same | (error <= bound))
    if not wrong.any():
        return
    ratio = torch.where(wrong, error / bound, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    index = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    raise AssertionError(
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements exceed the bound; worst at {index}: "
        f"expected {value[index].item():.9g}, got {a[index].item():.9g}, "
        f"error {error[index].item():.3g}, bound {bound[index].item():.3g}, "
        f"ratio {ratio[index].item():.3g}"
    )


def assert_same_bits(name: str, actual, expected) -> None:
    """Asserts equal dtype, shape and bytes (so -0.0 is not 0.0, and NaNs of equal bits are equal)."""
    if isinstance(expected, tuple | list):
        assert len(actual) == len(expected), f"{name}: {len(actual)} outputs, not {len(expected)}"
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(f"{name}[{i}]", a, e)
        return
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    # A copy: strides of a single element may be anything, and it counts as contiguous.
    copies = (t.detach().clone(memory_format=torch.contiguous_format) for t in (actual, expected))
    a, e = (t.flatten().view(torch.uint8) for t in copies)
    if torch.equal(a, e):
        return
    size = actual.element_size()
    differ = (a.view(-1, size) != e.view(-1, size)).any(1)
    flat = int(differ.nonzero()[0])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), actual.shape))
    raise AssertionError(
        f"{name}: {int(differ.sum())} of {differ.numel()} elements differ in their bits; first at "
        f"{index}: expected {expected[index].item()!r}, got {actual[index].item()!r}"
    )
