"""The bytes of a checkpoint: golden ones, bitsandbytes' own, round trips, and what is refused."""

import ast
import contextlib
import copy
import dataclasses
import doctest
import hashlib
import itertools
import json
import math
import pathlib
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import lowrank_kernels as lk
import tolerance
from lowrank_kernels.codebooks import BITSANDBYTES_CODES, CODES, QUANT_TYPES, code_of, dynamic_code

FORMATS = list(itertools.product(QUANT_TYPES, (False, True)))
THEIR_FORMATS = list(itertools.product(BITSANDBYTES_CODES, (False, True)))


def bnb_functional():
    reason = "bitsandbytes, the format's oracle, is not installed"
    return pytest.importorskip("bitsandbytes", reason=reason).functional


def bytes_of(tensor):
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def same_entries(actual, expected):
    """Same keys in the same order, dtypes, shapes and bytes."""
    assert list(actual) == list(expected)
    for key in expected:
        tolerance.assert_same_bits(key, actual[key], expected[key])


# -- golden bytes ----------------------------------------------------------------------------------
# Written by bitsandbytes 0.50.2 for GOLDEN_WEIGHT in blocks of 32: two whole ones and one of two elements. It has no
# int4, whose bytes are those of its formula in float64 (test_quantize_4bit.py).

GOLDEN_WEIGHT = ((((torch.arange(66) * 37) % 101 - 50) / 16).view(3, 22)).bfloat16()
GOLDEN_PACKED = {
    "nf4": "04c16e29f3b05d17e29f3c05d18e2af4c16e19f3b05d17e29f3b05d18e2af4c05f",
    "fp4": "bf5a92a63c4be5a02d63c4be2a12d73f5b92a63d4bf5a92d63c4be2a12d73c5be3",
    "int4": "06b28d49e5a17c38d49f6b27c38e5af6b27d49e5a16c38d49f5b27c38e4af6b27f",
}
GOLDEN_ABSMAX = {False: "000048400000444000000040", True: "ded800"}
GOLDEN_NESTED_ABSMAX = "acaa3a3f"
GOLDEN_STATE = '{"quant_type": "%s", "blocksize": 32, "dtype": "bfloat16", "shape": [3, 22]}'
GOLDEN_NESTED = (
    ', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.7291667461395264}'
)
GOLDEN_DENSE = {  # bfloat16, from double-quantized scales
    "nf4": (
        "48c064bfb03f0bc092be1140d2bf013f48409ebf873f48c014bfe13f0bc000001140d2bf013f48409ebfb03f48c0"
        "14bfe13f0bc07f3e1140d2bf453f484064bfad3f09c08fbe0e4009c0fc3e44409bbf853f44c011bfdd3f09c00000"
        "0e40cebffc3e44409bbf853f44c011bfdd3f09c07a3e0e40cebf413f44405fbfad3f44c0bebe0040"
    ),
    "fp4": (
        "48c048bfc83f05c085bc054005c0053f484085bf853f48c005bfc83f05c000000540c8bf053f484085bf853f48c0"
        "05bf054005c0853c0540c8bf483f484048bfc43f44c083bc034003c0033f4440c4bf833f44c044bfc43f03c083bc"
        "0340c4bf033f444083bf833f44c003bf034003c0833c0340c4bf443f444083bfc43f44c0abbe0040"
    ),
    "int4": (
        "48c065bfab3f2bc000000f40e5bfe53e2b40abbf653f48c0e5bee53f0fc000000f40e5bfe53e484065bfab3f2bc0"
        "e5bee53f0fc000002b40abbf653f484065bfa83f28c0e0be0c40e0bfe03e2840a8bf603f44c060bfe03f0cc00000"
        "0c40e0bfe03e4440a8bfa83f28c0e0bee03f0cc000002840e0bf603f444060bfa83f28c093be0040"
    ),
}
SHA256 = {
    "nf4": "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a",
    "fp4": "b830bcf8857895e5676b8e2ce608a60bb8af9b3ce6270073e9de34814196f09c",
    "int4": "7dc9bca5ac943fefd8835d1d08b1e81e8afc2b63f14d10d960ff5515dc7b4122",
    "dynamic": "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
}


def test_golden_code_tables():
    tables = {name: code_of(name) for name in QUANT_TYPES} | {"dynamic": dynamic_code()}
    assert {k: hashlib.sha256(bytes_of(t)).hexdigest() for k, t in tables.items()} == SHA256


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_golden_bytes(quant_type, double_quant, backend):
    w = lk.quantize_4bit(GOLDEN_WEIGHT, quant_type, 32, double_quant)
    entries = w.to_bitsandbytes("layer.weight")
    key = f"layer.weight.quant_state.bitsandbytes__{quant_type}"
    state = GOLDEN_STATE % quant_type
    assert bytes_of(entries["layer.weight"]).hex() == GOLDEN_PACKED[quant_type]
    assert bytes_of(entries["layer.weight.absmax"]).hex() == GOLDEN_ABSMAX[double_quant]
    assert bytes_of(entries[key]).decode() == state[:-1] + (GOLDEN_NESTED if double_quant else "}")
    table = hashlib.sha256(bytes_of(entries["layer.weight.quant_map"]))
    assert table.hexdigest() == SHA256[quant_type]
    if double_quant:
        assert bytes_of(entries["layer.weight.nested_absmax"]).hex() == GOLDEN_NESTED_ABSMAX
        assert bytes_of(w.dequantize()).hex() == GOLDEN_DENSE[quant_type]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_golden_entries_load(quant_type, backend):
    hexes = {"": GOLDEN_PACKED[quant_type], ".absmax": GOLDEN_ABSMAX[True]}
    entries = {
        f"w{k}": torch.tensor(list(bytes.fromhex(v)), dtype=torch.uint8) for k, v in hexes.items()
    }
    nested = torch.tensor(list(bytes.fromhex(GOLDEN_NESTED_ABSMAX)), dtype=torch.uint8)
    entries["w.quant_map"], entries["w.nested_quant_map"] = code_of(quant_type), dynamic_code()
    entries["w.nested_absmax"] = nested.view(torch.float32)
    text = (GOLDEN_STATE % quant_type)[:-1] + GOLDEN_NESTED
    entries[f"w.quant_state.bitsandbytes__{quant_type}"] = blob_of(text)
    w = lk.Weight4bit.from_bitsandbytes(entries, "w")
    assert (w.shape, w.dtype, w.blocksize) == (torch.Size((3, 22)), torch.bfloat16, 32)
    assert bytes_of(w.dequantize()).hex() == GOLDEN_DENSE[quant_type]


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_model_of_each_code_saves_what_loads(quant_type):
    """Into a layer of any settings: they come from the file."""
    dense = torch.nn.Sequential(torch.nn.Linear(96, 40), torch.nn.Linear(40, 8, bias=False))
    model, other = copy.deepcopy(dense), copy.deepcopy(dense)
    lk.replace_linear(model, quant_type=quant_type, r=4, progress=False)
    lk.replace_linear(other, quant_type="nf4", r=4, blocksize=32, progress=False)
    state = model.state_dict()
    assert f"0.weight.quant_state.bitsandbytes__{quant_type}" in state
    other.load_state_dict(state)
    x = torch.randn(3, 96)
    assert torch.equal(other(x), model(x)) and other[0].quant_type == quant_type
    same_entries(other.state_dict(), state)
    expected = lk.quantize_4bit(dense[0].weight, quant_type).dequantize()
    assert torch.equal(other[0].dequantize(), expected)


def test_examples_of_docstrings_run():
    result = doctest.testmod(lk.formats)
    assert result.failed == 0 and result.attempted > 20


def test_codes_are_spelt_in_one_file():
    """A new code is an entry of CODES: nothing else in the library names one, but for defaults."""
    package = pathlib.Path(lk.__file__).parent
    spelt = re.compile(rf"\b_*({'|'.join(QUANT_TYPES)})\b")
    for file in package.rglob("*.py"):
        if file.name == "codebooks.py" or "benchmark" in file.parts:
            continue
        nodes = list(ast.walk(ast.parse(file.read_text())))
        text = [node.value for node in nodes if isinstance(node, ast.Expr)]  # docstrings
        defaults = [
            d for n in nodes if isinstance(n, ast.arguments) for d in (*n.defaults, *n.kw_defaults)
        ]
        defaults += [
            n.value for n in nodes if isinstance(n, ast.keyword) and n.arg in ("default", "epilog")
        ]
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = spelt.search(node.value) and node not in (*text, *defaults)
                assert not named, f"{file.name}:{node.lineno}: {node.value!r}"
    assert all(max(map(abs, code)) == 1.0 and len(code) == 16 for code in CODES.values())


# -- bitsandbytes' own -----------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_type", "double_quant"), THEIR_FORMATS)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 64), (32, 33), (8, 1000)])
@pytest.mark.parametrize("orientation", ["[n, 1]", "[1, n]"])
def test_round_trip_of_what_bitsandbytes_wrote(
    quant_type, double_quant, storage, shape, orientation, tmp_path
):
    """Load, save: every byte, JSON included; in memory and through a safetensors file; and back into it."""
    bnb = bnb_functional()
    dtype = cases.FACTORS["dtype"][shape[0] // 8 % 3]
    packed, state = bnb.quantize_4bit(
        torch.randn(shape).to(dtype), blocksize=64, quant_type=quant_type,
        compress_statistics=double_quant, quant_storage=storage,
    )  # fmt: skip
    packed = packed if orientation == "[n, 1]" else packed.t()
    written = {f"m.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    written = {"m.weight": packed, **written}

    w = lk.Weight4bit.from_bitsandbytes(written, "m.weight")
    assert w.packed is packed and w.absmax is written["m.weight.absmax"]  # the only copy
    assert (w.dtype, w.quant_type, w.double_quant) == (dtype, quant_type, double_quant)
    entries = w.to_bitsandbytes("m.weight")
    same_entries(entries, written)

    save_file({k: v.contiguous() for k, v in entries.items()}, tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors")
    again = lk.Weight4bit.from_bitsandbytes(loaded, "m.weight")
    same_entries(again.to_bitsandbytes("m.weight"), written)
    tolerance.assert_same_bits("W", again.dequantize(), w.dequantize())

    stripped = {k.removeprefix("m.weight."): v for k, v in entries.items() if k != "m.weight"}
    theirs = bnb.QuantState.from_dict(stripped, torch.device("cpu"))
    assert theirs == state and theirs.shape == state.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_default_dtype_does_not_show(dtype):
    """bitsandbytes' own loader rounds the offset to torch's default dtype."""
    w = lk.quantize_4bit(torch.randn(64, 64))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        loaded = lk.Weight4bit.from_bitsandbytes(w.to_bitsandbytes())
        quantized = lk.quantize_4bit(w.dequantize(torch.float32))
    finally:
        torch.set_default_dtype(before)
    tolerance.assert_same_bits("offset", loaded.nested_offset, w.nested_offset)
    assert {t.dtype for t in quantized.tensors().values()} == {torch.uint8, torch.float32}


def test_two_weights_share_no_memory():
    """safetensors refuses shared tensors, so the tables of each weight are its own."""
    state = {}
    for name in ("a", "b"):
        state |= lk.quantize_4bit(torch.randn(4, 64)).to_bitsandbytes(name)
    assert len({t.data_ptr() for t in state.values()}) == len(state)


# -- the class -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_what_a_weight_says_about_itself(quant_type, double_quant):
    weight = torch.randn(32, 128, dtype=torch.bfloat16)
    w = lk.quantize_4bit(weight, quant_type, 128, double_quant)
    assert (w.shape, w.dtype, w.device) == (weight.shape, torch.bfloat16, weight.device)
    assert w.dequantize().dtype == torch.bfloat16
    tables = 4 * 16 + (4 * 256 if double_quant else 0)
    scales = 32 + 4 + 4 if double_quant else 4 * 32
    assert w.nbytes == 32 * 128 / 2 + scales + tables
    assert w.bits_per_weight == 8 * (32 * 128 / 2 + scales) / (32 * 128)
    for part in (quant_type, "(32, 128)", "blocksize=128", "bfloat16", "cpu", "bits/weight"):
        assert part in repr(w)
    assert lk.Weight4bit.from_bitsandbytes(w.to_bitsandbytes()).op_args()[6:] == (32, 128, 128)


def test_to_moves_every_tensor():
    w = lk.quantize_4bit(torch.randn(8, 64)).to("meta")
    assert {t.device.type for t in w.tensors().values()} == {"meta"} and len(w.tensors()) == 6
    assert w.dequantize().device.type == "meta"


def test_quantizing_on_meta_gives_the_same_sizes():
    real, meta = (lk.quantize_4bit(torch.zeros(7, 37, device=d)) for d in ("cpu", "meta"))
    meta.validate()
    for name, tensor in real.tensors().items():
        other = meta.tensors()[name]
        assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype)


# -- what is refused -------------------------------------------------------------------------------


def blob_of(text):
    data = text if isinstance(text, bytes) else text.encode()
    return torch.tensor(list(data), dtype=torch.uint8)


STATE = "w.quant_state.bitsandbytes__nf4"


def good_entries():
    return lk.quantize_4bit(torch.randn(8, 96), "nf4", 32).to_bitsandbytes("w")


def with_state(**changes):
    """An edit of the JSON; a value of None removes the field."""

    def edit(entries):
        state = json.loads(bytes_of(entries[STATE])) | changes
        state = {k: v for k, v in state.items() if v is not None}
        return entries | {STATE: blob_of(json.dumps(state))}

    return edit


def with_entry(**changes):
    """An edit of tensors by name."""

    def edit(entries):
        keys = {name: "w" if name == "packed" else f"w.{name}" for name in changes}
        return entries | {keys[name]: f(entries[keys[name]]) for name, f in changes.items()}

    return edit


def without(key):
    return lambda entries: {k: v for k, v in entries.items() if k != key}


def without_nested_state(entries):
    state = json.loads(bytes_of(entries[STATE]))
    state = {k: v for k, v in state.items() if not k.startswith("nested_")}
    return entries | {STATE: blob_of(json.dumps(state))}


def raw_state(data):
    return lambda entries: entries | {STATE: blob_of(data)}


BIG = 2**47
# What is done to a good checkpoint of [8, 96], and what the message must name.
MALFORMED = {
    "packed is short": (with_entry(packed=lambda t: t[:-1]), "w: expected 384"),
    "packed is long": (with_entry(packed=lambda t: torch.cat([t, t[:1]])), "w: expected 384"),
    "packed is empty": (with_entry(packed=lambda t: t[:0]), "w: expected 384"),
    "packed is int8": (with_entry(packed=lambda t: t.to(torch.int8)), "w: expected packed"),
    "packed is float64": (with_entry(packed=lambda t: t.double()), "w: expected packed"),
    "packed is a dense weight": (with_entry(packed=lambda t: torch.zeros(8, 96)), "w: expected 384"),
    "packed is strided": (with_entry(packed=lambda t: t.repeat(1, 2)[:, :1]), "not contiguous"),
    "packed is sparse": (with_entry(packed=lambda t: t.to_sparse()), "w: expected 384"),
    "packed is elsewhere": (with_entry(packed=lambda t: t.to("meta")), "one device"),
    "packed is no tensor": (with_entry(packed=lambda t: t.tolist()), "state_dict['w']"),
    "packed is missing": (without("w"), "state_dict['w']"),
    "absmax is short": (with_entry(absmax=lambda t: t[:-1]), "w.absmax"),
    "absmax is long": (with_entry(absmax=lambda t: t.repeat(2)), "w.absmax"),
    "absmax is a column": (with_entry(absmax=lambda t: t[:, None]), "w.absmax"),
    "absmax is float32": (with_entry(absmax=lambda t: t.float()), "w.absmax"),
    "absmax is strided": (with_entry(absmax=lambda t: t.repeat_interleave(2)[::2]), "w.absmax"),
    "absmax is elsewhere": (with_entry(absmax=lambda t: t.to("meta")), "one device"),
    "absmax is missing": (without("w.absmax"), "w.absmax"),
    "quant_map is short": (with_entry(quant_map=lambda t: t[:-1]), "w.quant_map"),
    "quant_map is bfloat16": (with_entry(quant_map=lambda t: t.bfloat16()), "w.quant_map"),
    "quant_map is missing": (without("w.quant_map"), "w.quant_map"),
    "nested_absmax is long": (with_entry(nested_absmax=lambda t: t.repeat(2)), "w.nested_absmax"),
    "nested_absmax is half": (with_entry(nested_absmax=lambda t: t.half()), "w.nested_absmax"),
    "nested_absmax is missing": (without("w.nested_absmax"), "w.nested_absmax"),
    "nested_quant_map is short": (with_entry(nested_quant_map=lambda t: t[:16]), "w.nested_quant_map"),
    "nested_quant_map is missing": (without("w.nested_quant_map"), "w.nested_quant_map"),
    **{
        f"{name} holds {value}": (
            with_entry(**{name: lambda t, v=value: torch.where(torch.arange(t.numel()) == 0, v, t)}),
            f"w.{name}: expected finite values",
        )
        for name in ("quant_map", "nested_absmax", "nested_quant_map")
        for value in (math.nan, math.inf, -math.inf)
    },
    "quant_map has other values": (with_entry(quant_map=lambda t: t.flip(0)), "w.quant_map: expected the table"),
    "quant_map is another code's": (with_entry(quant_map=lambda t: code_of("int4")), "w.quant_map: expected the table"),
    "nested_quant_map has other values": (
        with_entry(nested_quant_map=lambda t: 2 * t), "w.nested_quant_map: expected the table"
    ),
    "the state is missing": (without(STATE), "w.quant_state.bitsandbytes__<nf4|fp4|int4|mxfp4>, got []"),
    "the state is not nested": (without_nested_state, "w.nested_absmax"),
    "two states": (lambda e: e | {STATE[:-3] + "fp4": e[STATE]}, "bitsandbytes__fp4"),
    "state under the other name": (
        lambda e: without(STATE)(e) | {STATE[:-3] + "fp4": e[STATE]}, "quant_type inside is 'nf4'"
    ),
    "an unknown entry": (lambda e: e | {"w.zero_point": torch.zeros(1)}, "w.zero_point"),
    "the state is no JSON": (raw_state(b"\x93NUMPY"), STATE),
    "the state is no text": (raw_state(b"\xff\xfe\xfd"), STATE),
    "the state is empty": (raw_state(b""), STATE),
    "the state is cut off": (lambda e: e | {STATE: e[STATE][:-1]}, STATE),
    "the state is a list": (raw_state("[1, 2]"), "expected a JSON object, got list"),
    "the state is nested too deeply": (raw_state("[" * 4000), STATE),
    "the state is huge": (raw_state("{" + " " * 5000 + "}"), "at most 4096"),
    "the state is a matrix": (lambda e: e | {STATE: e[STATE][None]}, STATE),
    "the state is float32": (lambda e: e | {STATE: e[STATE].float()}, STATE),
    "the state is elsewhere": (lambda e: e | {STATE: e[STATE].to("meta")}, STATE),
    "unknown field": (with_state(version=2), "unknown fields ['version']"),
    **{
        f"{field} is {value!r}": (with_state(**{field: value}), f"{STATE}: {field}: expected")
        for field, values in {
            "quant_type": ("int8", "NF4", 4, ["nf4"], False, ""),
            "blocksize": (63, 0, -64, 16, 8192, 64.0, "64", True, [64], 2**70),
            "dtype": ("float64", "torch.float32", "int8", 1, []),
            "shape": (
                [8], [8, 96, 1, 1], [-8, -96], [-1, 96], [8, True], [8.0, 96], ["8", 96], "8x96", 768,
                {"N": 8}, [[8], 96], [BIG, BIG], [2**64, 1], [10**400, 1],
            ),
            "nested_blocksize": (128, 255, 0, -256, "256"),
            "nested_dtype": ("bfloat16", "float64", 32),
            "nested_offset": (
                math.nan, math.inf, -math.inf, 1e39, 10**400, -(10**400), "0.5", True, [0.5],
            ),
        }.items()
        for value in values
    },
    **{
        f"{field} is missing": (with_state(**{field: None}), f"{STATE}: {field}: expected")
        for field in ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset")
    },
    "shape is of another size": (with_state(shape=[8, 97]), "w: expected 388"),
    "shape is huge": (with_state(shape=[2**20, 2**20]), f"w: expected {2**39}"),
    "shape is empty": (with_state(shape=[0, 96]), "w: expected 0"),
    "blocksize is another": (with_state(blocksize=64), "w.absmax"),
}  # fmt: skip


class NoKernels(TorchDispatchMode):
    """Fails on any operator of the library."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not func.name().startswith("lowrank_kernels::"), f"{func.name()} ran"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_checkpoint(name):
    corrupt, message = MALFORMED[name]
    entries = corrupt(good_entries())
    with NoKernels(), pytest.raises(ValueError) as error:
        lk.Weight4bit.from_bitsandbytes(entries, "w")
    assert message in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scales_that_are_not_finite_are_refused(value):
    """Not double-quantized; wherever a file is read."""
    entries = lk.quantize_4bit(torch.randn(8, 96), "nf4", 32, double_quant=False).to_bitsandbytes(
        "weight"
    )
    entries["weight.absmax"][-1] = value
    with pytest.raises(ValueError, match=r"weight.absmax: expected finite values"):
        lk.Weight4bit.from_bitsandbytes(entries)
    layer = lk.Linear4bit(96, 8, bias=False)
    before = layer.dequantize()
    with pytest.raises(RuntimeError, match=r"weight.absmax: expected finite values"):
        layer.load_state_dict(entries)
    assert torch.equal(layer.dequantize(), before)


@pytest.mark.parametrize("change", [
    {"nested_code": None}, {"nested_offset": None}, {"nested_offset": torch.zeros(2)}, {"blocksize": 48},
    {"nested_offset": torch.zeros((), dtype=torch.float64)}, {"absmax": torch.zeros(24)},
])  # fmt: skip
def test_weights_made_by_hand_are_checked_too(change):
    w = dataclasses.replace(lk.quantize_4bit(torch.randn(8, 96), "nf4", 32), **change)
    with pytest.raises(ValueError, match=r"^(w\.|blocksize: )"):
        lk.Linear4bit.from_weight(w)


def test_the_good_checkpoint_loads():
    """So that the cases above are refused for what was done to them, and not anyway."""
    w = lk.Weight4bit.from_bitsandbytes(good_entries(), "w")
    assert w.shape == (8, 96)
    with pytest.raises(AssertionError, match="dequantize_4bit ran"), NoKernels():
        w.dequantize()


def mutate(rng, entries):
    """One random change to one entry, of the kinds that files and programs suffer."""
    key = rng.choice(list(entries))
    tensor = entries[key]
    changes = [
        lambda: tensor[: rng.randrange(len(tensor) + 1)],
        lambda: torch.cat([tensor, tensor[: rng.randrange(1, len(tensor) + 1)]]),
        lambda: tensor.flatten(),
        lambda: tensor.to(rng.choice([torch.float32, torch.float16, torch.int32, torch.bool])),
        lambda: tensor.flatten().view(torch.uint8),
        lambda: tensor[None],
        lambda: tensor.repeat_interleave(2, 0)[::2],
        lambda: tensor.to("meta"),
        lambda: entries[rng.choice(list(entries))],
        lambda: flip_bytes(rng, tensor),
    ]
    kind = rng.randrange(len(changes) + 3)
    if kind == len(changes):
        return without(key)(entries)
    if kind == len(changes) + 1:
        renamed = rng.choice([key + "x", key[:-1], key.replace("nf4", "fp4"), "w.absmax", "w"])
        return {renamed if k == key else k: v for k, v in entries.items()}
    if kind == len(changes) + 2:
        return entries | {STATE: flip_bytes(rng, entries[STATE])} if STATE in entries else entries
    return entries | {key: changes[kind]()}


def flip_bytes(rng, tensor):
    if tensor.is_meta or not tensor.numel():
        return tensor
    data = tensor.contiguous().flatten().view(torch.uint8).clone()
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] = rng.choice(b'0123456789-.eE",:[]{} \x00\xff')
    return data.view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_a_mutated_checkpoint_is_refused_or_a_weight(start, backend):
    """Nothing but ValueError, and what loads can be used: no kernel may read out of bounds."""
    loaded = 0
    for seed in range(start, start + 50):
        rng = random.Random(seed)
        entries = good_entries()
        for _ in range(rng.randint(1, 3)):
            entries = mutate(rng, entries)
        try:
            with contextlib.suppress(ValueError):
                w = lk.Weight4bit.from_bitsandbytes(entries, "w")
                w.validate()
                assert w.dequantize(torch.float32).shape == w.shape
                lk.linear_4bit(torch.ones(2, w.shape[1], device=w.device), w)
                loaded += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    assert 0 < loaded < 25
