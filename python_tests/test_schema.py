"""Every operator has all its parts, and every operator keeps what all of them promise.

Numbers are in test_<operator>.py. Here: fakes, ``opcheck``, layouts, the same bits again, on any number
of threads, and in any batch.
"""

import inspect
import pathlib
import re

import numpy
import pytest
import torch

import cases
import conftest
import lowrank_kernels as lk
import tolerance
from lowrank_kernels import reference
from lowrank_kernels import triton as triton_kernels
from lowrank_kernels.arguments import PagesArgs, WeightArgs
from lowrank_kernels.schema import NAMESPACE, OPS, ops

HERE = pathlib.Path(__file__).parent
BY_ROWS = [
    "linear_4bit", "linear_4bit_dx", "lora_linear_4bit", "lora_linear_4bit_backward",
    "lora_linear", "lora_linear_backward", "lora_linear_4bit_group", "lora_linear_4bit_group_backward",
]  # fmt: skip
MANY_ADAPTERS = [
    op for op in OPS if op.startswith("multi_lora")
]  # test_multi_lora*.py has their batches
each_op = pytest.mark.parametrize("op", OPS)


run = cases.run


# -- every operator has all its parts --------------------------------------------------------------


@each_op
def test_op_has_all_its_parts(op):
    assert inspect.isfunction(getattr(reference, op))
    assert inspect.isfunction(OPS[op].fake)
    assert op in cases.MAKE
    test = HERE / f"test_{op}.py"
    assert test.exists() and op in test.read_text(), f"{test.name} is missing or never names {op}"


@each_op
def test_op_is_a_triton_kernel(op):
    module = pathlib.Path(triton_kernels.__file__).with_name(f"{triton_kernels.module_of(op)}.py")
    assert f"\ndef {op}(" in module.read_text(), f"{module.name} does not define {op}"


def test_the_exceptions_among_triton_modules_are_ops():
    assert triton_kernels.EXCEPTIONS.keys() <= OPS.keys()


def test_nothing_but_the_ops_has_cases():
    assert cases.MAKE.keys() == OPS.keys()


@each_op
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_op_is_registered_for(op, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", key)


@each_op
def test_native_kernels_are_in_the_library(op):
    if conftest.ONLY_REFERENCE:
        pytest.skip("LOWRANK_BACKEND=reference: only the reference is tested")
    if conftest.ONLY_TRITON:
        pytest.skip("LOWRANK_BACKEND=triton: the Triton kernels stand above the native ones")
    dump = torch._C._dispatch_dump(f"{NAMESPACE}::{op}")
    places = [line for line in dump.splitlines() if line.startswith("CPU: registered at")]
    assert len(places) == 1 and "csrc/ops/cpu.cpp" in places[0], dump  # not the stand-in for none


@each_op
def test_runs_on_every_backend(op, any_backend):
    run(op, cases.make(op, cases.Case()))


# -- fakes and opcheck -----------------------------------------------------------------------------


@each_op
def test_fake_gives_what_the_kernel_gives(op, any_backend, subtests):
    written = op.endswith("_")  # its first output is an argument, of which the fake knows nothing
    for case in (*cases.FEW, cases.Case(M=0), cases.Case(M=1, N=1, K=1, R=1)):
        with subtests.test(case=str(case)):
            args = cases.make(op, case)
            fakes = OPS[op].fake(*(_to_meta(a) for a in args))
            for real, fake in zip(run(op, args)[written:], cases.flatten(fakes), strict=True):
                of_fake = (fake.shape, fake.dtype, fake.stride())
                assert (real.shape, real.dtype, real.stride()) == of_fake
                assert real.is_contiguous()


def _to_meta(value):
    return cases.each_tensor(value, lambda t: t.to("meta"))


@each_op
@pytest.mark.parametrize("case", [cases.FEW[2], cases.Case(M=0)])
def test_opcheck(op, case):
    """On the best kernels alone: nothing that opcheck looks at differs between instruction sets."""
    result = torch.library.opcheck(getattr(ops, op).default, cases.make(op, case))
    assert set(result.values()) == {"SUCCESS"} and len(result) >= 4


@each_op
def test_opcheck_of_the_reference(op):
    with conftest.entered("reference"):
        torch.library.opcheck(getattr(ops, op).default, cases.make(op, cases.FEW[2]))


FREE = {
    "scaling",
    "need_dx",
    "need_dA",
    "need_dB",
    "need_dbias",
}  # any value of their type is valid
# Tensors of which only the dtype, or only one side, is determined by the other arguments.
ANY_SHAPE = {
    "quantize_4bit": {"weight"},
    "double_quantize": {"absmax"},
    **{op: {"page_ids", "rows"} for op in MANY_ADAPTERS},
}
ANY_HEIGHT = {
    "linear_4bit": "x",
    "linear_4bit_dx": "dy",
    "lora_linear_4bit": "x",
    "lora_linear": "x",
    "lora_linear_4bit_group": "x",
    "grouped_linear_4bit": "x",  # more rows belong to no expert
    "grouped_lora_linear_4bit": "x",
}
SPOILT = {
    "N": [34, -33], "K": [97, -96], "blocksize": [48, 8192], "tile_rows": [7], "max_rank": [-1, 2**24],
    "grad_rank": [-1], "dtype": [torch.int32, torch.float64],
}  # fmt: skip


# The names of what is in a list, as its numbers come: those of WeightArgs and PagesArgs.
IN_LISTS = {
    "weights": WeightArgs._fields[:6], "dims": WeightArgs._fields[6:], "pages": PagesArgs._fields[:5],
}  # fmt: skip


def spoilt(op, name, value):
    """Values of an argument that the others rule out."""
    if isinstance(value, list):
        yield value[:-1]
        yield [*value, value[-1]]
        for i, item in enumerate(value):
            own = IN_LISTS.get(name, (name,))[i % len(IN_LISTS.get(name, (name,)))]
            nothing = (
                isinstance(item, torch.Tensor) and item.numel() == 0
            )  # S without an adapter, too
            nothing = nothing or (name == "dropout_p" and item == 0.0)  # where there is no adapter
            if own in FREE or nothing or isinstance(item, bool):
                continue
            for wrong in spoilt(op, own, item):
                yield [*value[:i], torch.empty(0) if wrong is None else wrong, *value[i + 1 :]]
        return
    yield from _spoilt(op, name, value)


def _spoilt(op, name, value):
    if name in SPOILT:
        return SPOILT[name]
    if isinstance(value, bool):  # N and K of an expert change places
        return [not value]
    if isinstance(value, float):
        return [-0.25, 1.0, float("nan")]
    wrong = [value.to(torch.int16 if value.dtype != torch.int16 else torch.int32)]
    if name == "tiles":
        return [*wrong, value.flatten()[:-1]]
    if name not in ANY_SHAPE.get(op, ()):
        flat = value.reshape(1) if value.dim() == 0 else value
        if ANY_HEIGHT.get(op) != name:
            wrong.append(torch.cat([flat, flat[:1]]))
        if flat.dim() > 1:
            wrong.append(torch.cat([flat, flat[..., :1]], -1))
    if (name in ("nested_code", "nested_offset") and op != "double_quantize") or (
        name == "seed" and op not in MANY_ADAPTERS  # whose dropout rates are in a tensor
    ):
        wrong.append(None)
    return wrong


@each_op
def test_each_wrong_argument_is_refused_by_fakes_as_by_kernels(op, any_backend):
    case = cases.Case(5, 33, 96, "nf4", 32, True, R=3, bias=cases.F32, dropout_p=0.25)
    args = cases.make(op, case)
    names = [argument.name for argument in getattr(ops, op).default._schema.arguments]
    meta = [_to_meta(a) for a in args]
    getattr(ops, op)(*meta)
    for i, name in enumerate(names):
        if name in FREE and not isinstance(args[i], list):
            continue
        for value in spoilt(op, name, args[i]):
            with pytest.raises(RuntimeError):
                run(op, (*args[:i], value, *args[i + 1 :]))
            with pytest.raises(RuntimeError) as refused:
                getattr(ops, op)(*meta[:i], _to_meta(value), *meta[i + 1 :])
            named = re.sub(r"\[\d+\].*", "", str(refused.value).partition(": expected")[0])
            assert named in (*names, "page_rank"), f"{name} = {value}: {refused.value}"


def _only_tensors(args):
    found = []
    cases.each_tensor(list(args), lambda t: found.append(t) or t)
    return found


@each_op
def test_fakes_refuse_tensors_on_another_device(op):
    args = cases.make(op, cases.Case())
    count = len(_only_tensors(args))
    left = iter(range(count))  # the last of them is somewhere else

    def to_meta_but_the_last(t):
        return t.to("meta") if next(left) < count - 1 else torch.empty_like(t)

    args = cases.each_tensor(list(args), to_meta_but_the_last)
    with pytest.raises(RuntimeError, match="expected a tensor on meta, got cpu"):
        getattr(ops, op)(*args)


@pytest.mark.parametrize("op", BY_ROWS)
def test_checks_of_fakes_hold_for_sizes_that_are_not_known(op):
    """A number of rows that a tensor's values decide: the graph is whole, and the kernel runs on any of them."""
    case = cases.Case(8, 33, 96, "nf4", 32, True, R=3, bias=cases.F32, dropout_p=0.25)
    args = cases.make(op, case)

    def some_rows(keep, *args):
        return getattr(ops, op)(*cases.with_rows(args, case, lambda a: a[keep.nonzero()[:, 0]]))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(some_rows, fullgraph=True, backend="aot_eager")
        for count in (5, 0, 8):
            keep = torch.arange(8) < count
            outputs, expected = compiled(keep, *args), some_rows(keep, *args)
            tolerance.assert_same_bits(op, cases.flatten(outputs), cases.flatten(expected))


def check_same(name, op, args, outputs, expected, backend):
    """Bit for bit; on a GPU, where the layout has a say in which kernel family runs, within the bound."""
    if backend in ("emulator", "cuda") and op in (*BY_ROWS, *MANY_ADAPTERS):
        tolerance.check(op, args, outputs)
    else:
        tolerance.assert_same_bits(name, outputs, expected)


# -- layouts ---------------------------------------------------------------------------------------


def _padded(t, rows=1, columns=7):
    """The same values inside a wider buffer of NaNs: rows apart, and not aligned to anything."""
    if t.dim() != 2:
        return t
    wide = torch.full((t.shape[0] + rows, t.shape[1] + columns), torch.nan, dtype=t.dtype)
    wide[: t.shape[0], 3 : 3 + t.shape[1]] = t
    return wide[: t.shape[0], 3 : 3 + t.shape[1]]


def _every_second(t):
    return t.repeat_interleave(2, -1)[..., ::2]


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() == 2 else t,
    "rows_apart": _padded,
    "columns_apart": _every_second,
    "negated_view": lambda t: torch._neg_view(-t),
    "requires_grad": lambda t: t.clone().requires_grad_(),
}


@each_op
def test_strides_do_not_matter(op, backend, subtests):
    contiguous = _contiguous_by_contract(op)
    for case in (cases.FEW[2], cases.FEW[3], cases.Case(M=1, N=1, K=64)):
        args = cases.make(op, case)
        expected = run(op, args)
        for layout, view in LAYOUTS.items():
            with subtests.test(case=str(case), layout=layout):
                strided = [
                    a
                    if i in contiguous
                    else cases.each_tensor(a, lambda t: view(t) if t.is_floating_point() else t)  # noqa: B023
                    for i, a in enumerate(args)
                ]
                check_same(f"{op}, {layout}", op, args, run(op, strided), expected, backend)


@each_op
def test_alignment_does_not_matter(op, backend, subtests):
    """A checkpoint's tensors lie at any byte of its file."""
    for case in (cases.FEW[1], cases.FEW[2]):
        with subtests.test(case=str(case)):
            args = cases.make(op, case)
            expected = run(op, args)
            shifted = cases.each_tensor(list(args), _unaligned)
            check_same(op, op, args, run(op, shifted), expected, backend)


def _unaligned(t):
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype)
    buffer[1:] = t.flatten()
    return buffer[1:].view(t.shape)


@pytest.mark.parametrize("op", BY_ROWS)
@pytest.mark.parametrize("case", [cases.FEW[1], cases.FEW[2]])
def test_rows_expanded_from_one(op, case, backend):
    """Stride 0, as the gradient of a sum has it."""
    args = cases.make(op, case)
    expanded = cases.with_rows(args, case, lambda a: a[:1].expand(a.shape))
    assert any(0 in t.stride() for t in _only_tensors(expanded))
    dense = cases.each_tensor(expanded, lambda t: t.contiguous())
    tolerance.assert_same_bits(op, run(op, expanded), run(op, dense))


def _contiguous_by_contract(op):
    """The positions of the 4-bit weight's nine arguments, and of pages and their tables."""
    names = [a.name for a in getattr(ops, op).default._schema.arguments]
    exact = {
        "code", "absmax", "nested_code", "A_pages", "B_pages", "scalings", "dropout_p", "weights", "pages",
    }  # fmt: skip
    contiguous = {i for i, name in enumerate(names) if name in exact}
    if "packed" in names:
        start = names.index("packed")
        contiguous |= set(range(start, start + 9))
    return contiguous


# -- the same bits ---------------------------------------------------------------------------------

BITS = [*cases.FEW, cases.Case(64, 130, 300, R=16, bias=cases.F32, dropout_p=0.1)]


@each_op
def test_same_bits_again_and_arguments_untouched(op, backend, subtests):
    for case in BITS:
        with subtests.test(case=str(case)):
            args = cases.make(op, case)
            before = [t.clone() for t in _only_tensors(args)]
            expected = run(op, args)
            for _ in range(3):
                tolerance.assert_same_bits(op, run(op, args), expected)
            tolerance.assert_same_bits(f"{op}: arguments", _only_tensors(args), before)


@each_op
@pytest.mark.parametrize("isa", conftest.ISAS)
def test_same_bits_on_any_number_of_threads(op, isa, set_threads, subtests):
    for case in (*BITS, cases.Case(4, 1031, 1024), cases.Case(300, 70, 64)):
        with subtests.test(case=str(case)), conftest.entered(f"cpu-{isa}"):
            args = cases.make(op, case)
            set_threads(1)
            expected = run(op, args)
            for threads in (2, 3, 7):
                set_threads(threads)
                tolerance.assert_same_bits(f"{op}, {threads} threads", run(op, args), expected)


# Every height of a register tile and of a task, on both sides.
HEIGHTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 33, 64, 65, 130)
BATCH = [
    cases.Case(130, 33, 96, "nf4", 32, bias=cases.F32, R=12),
    cases.Case(130, 70, 65, "fp4", 64, True, cases.BF16, cases.BF16, 20, cases.BF16),
    cases.Case(130, 17, 256, "nf4", 256, True, cases.F16, None, 3),
    cases.Case(600, 48, 128, "nf4", 64, True, cases.BF16, cases.F32, 16),
    cases.Case(65, 131, 1088, "nf4", 64, True, cases.F32, cases.F32, 16),  # sums in several stages
]


@pytest.mark.parametrize("op", BY_ROWS)
@pytest.mark.parametrize("case", BATCH)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_row_has_the_same_bits_in_any_batch(op, case, place, backend, monkeypatch):
    """Among equal kernel families, see cases.family.

    Triton's interpreter multiplies tiles with ``numpy.matmul``, whose bits depend on some CPUs on a row's place in its
    tile, as a GPU's do not; ``numpy.einsum`` adds every element in one order.
    """
    if backend == "triton" and not conftest.ON_GPU:
        monkeypatch.setattr(
            numpy, "matmul", lambda a, b, dtype: numpy.einsum("ij,jk->ik", a, b, dtype=dtype)
        )
    args = cases.make(op, case)
    per_row = 1 if op.endswith("backward") else None  # dA, dB and dbias are sums over the rows
    expected = {}
    for height in (*HEIGHTS[::-1], case.M):
        rows = slice(0, height) if place == "first" else slice(case.M - height, case.M)
        outputs = run(op, cases.with_rows(args, case, lambda a, rows=rows: a[rows]))[:per_row]
        family = cases.family(op, case._replace(M=height), backend)
        tallest = expected.setdefault(family, outputs)
        for name, (out, tall) in enumerate(zip(outputs, tallest)):
            same = tall[:height] if place == "first" else tall[tall.shape[0] - height :]
            if height <= tall.shape[0]:
                tolerance.assert_same_bits(
                    f"{op}, output {name}, {height} rows, {family}", out, same
                )


@pytest.mark.parametrize("op", ["lora_linear_4bit", "lora_linear"])
@pytest.mark.parametrize("case", BATCH)
def test_the_adapters_own_product_is_of_one_family(op, case, backend):
    """S has the same bits in every batch, gemv or gemm; on a GPU in every batch of more than 64 rows."""
    args = cases.make(op, case)
    s = run(op, args)[1]
    heights = (65, 66, 100) if backend in ("emulator", "cuda", "triton") else (1, 3, 4, 5)
    for height in heights:
        tolerance.assert_same_bits(op, run(op, (args[0][:height], *args[1:]))[1], s[:height])


def test_the_cases_reach_every_family():
    batches = [c._replace(M=height) for c in BATCH for height in (*HEIGHTS, c.M)]

    def families(backend, problems):
        return {cases.family("linear_4bit", c, backend).partition(" ")[0] for c in problems}

    for problems in (batches, [*cases.SHARED, *cases.LARGE]):
        assert families("cpu", problems) == {"gemv", "gemm"}
        assert families("emulator", problems) == {"gemv", "mma", "matmul", "simt"}


def test_errors_name_the_schema(any_backend):
    with pytest.raises(RuntimeError, match="linear_4bit"):
        ops.linear_4bit(torch.zeros(1, 64))
    assert lk.backends.active() == any_backend.partition("-")[0]
