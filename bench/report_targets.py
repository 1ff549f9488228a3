"""What the CPU kernels are to reach, what was measured, and what is missing: all from a run's JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import memory, peer_ggml, peer_openvino, variants
from .tables import INT8, OURS, markdown, median, plain

SHAPES = ((4096, 4096), (11008, 4096))
TOKENS = (1, 4, 16, 64, 512)
FORWARD, DX = "linear_4bit", "linear_4bit_dx"
LORA, TRAINING = "lora_linear_4bit", "lora_linear_4bit_fwd_bwd"
EXTRA_MIB = 4  # of memory, a thread
WORDS = {FORWARD: "y = x Wᵀ", DX: "dx = dy W", LORA: "LoRA forward", TRAINING: "LoRA training"}


class Target(NamedTuple):
    """``value(document, case)`` is to be at least, for "more" at most, ``asked[M]``.

    ``unit``: "share" of the limit, "times" faster, or "more" time. ``peer``: who is compared with
    exact float32 kernels, so that the limit of the machine bounds the ratio as well.
    """

    op: str
    words: str
    asked: dict[int, float]
    unit: str
    value: Callable[[dict, dict], float | None]
    peer: str | None = None


def _by_tokens(*values: float) -> dict[int, float]:
    return dict(zip(TOKENS, values))


SHARES = _by_tokens(0.70, 0.70, 0.75, 0.88, 0.93)


# -- figures -----------------------------------------------------------------------------------------


def limit_ms(document: dict, case: dict, isa: str) -> float:
    """The limit of a case; for AVX2 where it was forced, with the products that AVX2 can do."""
    gflops = document["limits"].get("sgemm_avx2_gflops")
    if isa != "avx2" or document["isa"] == "avx2" or not gflops:
        return case["limit_ms"]
    return max(case["bytes"] / document["limits"]["read_gbs"] / 1e6, case["flops"] / gflops / 1e6)


def provider_of(document: dict, isa: str) -> str:
    return OURS if isa == document["isa"] else variants.named(isa)


def share(document: dict, case: dict, isa: str) -> float | None:
    """Of the limit, by the kernels for ``isa``."""
    ours = median(case, provider_of(document, isa))
    return limit_ms(document, case, isa) / ours if ours else None


def _share(isa: str) -> Callable:
    return lambda document, case: share(document, case, isa)


def _times(slow: str, fast: str = OURS) -> Callable:
    """How many times faster ``fast`` is than ``slow``."""

    def value(document: dict, case: dict) -> float | None:
        a, b = median(case, slow), median(case, fast)
        return a / b if a and b else None

    return value


def _more(slow: str, fast: str = OURS) -> Callable:
    """The time that ``slow`` takes more, as a part of that of ``fast``."""

    def value(document: dict, case: dict) -> float | None:
        times = _times(slow, fast)(document, case)
        return times and times - 1

    return value


def isas_of(document: dict) -> list[str]:
    """The ISA that ran by itself, then those that were forced and are to reach the same shares."""
    names = {name for case in document["cases"] for name in case["providers"]}
    forced = [isa for isa in ("avx512", "avx2") if variants.named(isa) in names]
    return [document["isa"], *forced]


def targets(document: dict) -> list[Target]:
    found = [
        Target(op, f"of the limit, {isa}", SHARES, "share", _share(isa))
        for op in (FORWARD, DX)
        for isa in isas_of(document)
    ]
    for words, peer, asked in (
        ("against F.linear", "torch", (5, 6, 4, 1.5, 1.0)),
        ("against bitsandbytes", "bitsandbytes", (40, 40, 18, 7, 1.5)),
        ("against bitsandbytes, training", "bitsandbytes, training", (40, 40, 18, 7, 1.5)),
        ("against OpenVINO", peer_openvino.NAME, (1.5, 2, 1.5, 1.1, 1.1)),
        ("against ggml", peer_ggml.NAME, (1.3, 1.5, 1.1, 1.5, 1.3)),
    ):
        by_m = _by_tokens(*asked)
        found.append(Target(FORWARD, words, by_m, "times", _times(peer), peer))
    int8 = _times(peer_ggml.NAME, INT8)
    by_m = _by_tokens(1.3, 1.5, 1.5, 3, 3)
    found.append(Target(FORWARD, "int8 against ggml", by_m, "times", int8))
    for op in (FORWARD, DX):
        for dtype in variants.SIXTEEN_BITS:
            tenth = _by_tokens(*[0.10] * len(TOKENS))
            value = _more(variants.named(dtype))
            found.append(Target(op, f"{dtype} over float32", tenth, "more", value))
        if document["threads"] == 2:
            by_m, value = {M: 1.8 for M in (16, 64, 512)}, _times(variants.thread_name(1))
            found.append(Target(op, "2 threads against 1", by_m, "times", value))
    added = _by_tokens(0.10, 0.10, 0.10, 0.04, 0.04)
    found.append(Target(LORA, "over its base alone", added, "more", _more(OURS, variants.BASE)))
    peft = "bitsandbytes + PEFT"
    training = Target(TRAINING, f"against {peft}", {512: 1.5}, "times", _times(peft), peft)
    return [*found, training]


# -- verdicts ----------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """One figure: where it belongs, its cell of a table, and whether it was met; None: not measured."""

    where: str
    M: int
    cell: str
    met: bool | None
    short: str = ""


def figure(value: float, unit: str) -> str:
    if unit == "times":
        return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"
    return f"{value:+.0%}" if unit == "more" else f"{value:.0%}"


def judge(
    where: str, M: int, value: float | None, asked: float, unit: str, most: float | None = None
) -> Verdict:
    """``most``: what a kernel at the limit of the machine would reach."""
    goal = figure(asked, unit).lstrip("+")
    if value is None:
        return Verdict(where, M, f"- ({goal})", None)
    met = value <= asked if unit == "more" else value >= asked
    cell = f"{figure(value, unit)} ({goal})"
    if met:
        return Verdict(where, M, cell, True)
    missing = (
        f"{value - asked:.0%} too much" if unit == "more" else f"{1 - value / asked:.0%} short"
    )
    if most and most < asked:
        missing += f" (at the limit {figure(most, unit)})"
    return Verdict(where, M, f"**{cell}**", False, missing)


def _most(case: dict | None, peer: str | None) -> float | None:
    theirs = median(case, peer) if case and peer else None
    return theirs / case["limit_ms"] if theirs else None


def _case(document: dict, op: str, shape: tuple[int, int], M: int) -> dict | None:
    wanted = (op, *shape, M, "float32", "cold")
    fields = ("op", "N", "K", "M", "dtype", "cache")
    return next((c for c in document["cases"] if tuple(c[f] for f in fields) == wanted), None)


def by_tokens(document: dict, shape: tuple[int, int]) -> tuple[list[list[str]], list[Verdict]]:
    """The table of one shape, a column per M and no row without a figure, and its verdicts."""
    rows, verdicts = [["", "", *(f"M = {M}" for M in TOKENS)]], []
    for target in targets(document):
        row, measured = [WORDS[target.op], target.words], False
        for M in TOKENS:
            if M not in target.asked:
                row.append("")
                continue
            case = _case(document, target.op, shape, M)
            value = target.value(document, case) if case else None
            where = f"{WORDS[target.op]}, {shape[0]} x {shape[1]}, {target.words}"
            most = _most(case, target.peer)
            verdict = judge(where, M, value, target.asked[M], target.unit, most)
            verdicts.append(verdict)
            row.append(verdict.cell)
            measured |= value is not None
        rows += [row] * measured
    return rows, verdicts


def of_formats(document: dict) -> tuple[list[list[str]], list[Verdict]]:
    """Quantize and dequantize, a column per shape."""
    rows, verdicts = [["", *(f"{N} x {K}" for N, K in SHAPES)]], []
    for op, times in (("quantize_4bit", 20), ("dequantize_4bit", 6)):
        for words, asked, unit, value, peer in (
            ("against bitsandbytes", times, "times", _times("bitsandbytes"), "bitsandbytes"),
            ("of the limit", 1 / 1.5, "share", _share(document["isa"]), None),
        ):
            row = [f"{op}, {words}"]
            for shape in SHAPES:
                case = _case(document, op, shape, 0)
                where = f"{op}, {shape[0]} x {shape[1]}, {words}"
                got = value(document, case) if case else None
                verdicts.append(judge(where, 0, got, asked, unit, _most(case, peer)))
                row.append(verdicts[-1].cell)
            rows.append(row)
    return rows, verdicts


def of_memory(document: dict) -> tuple[list[list[str]], list[Verdict]]:
    """MiB beyond the outputs, a column per M."""
    measured = document["memory"]
    asked = EXTRA_MIB * measured["threads"]
    by_name = {name: by_m for name, by_m in measured["extra"].items() if isinstance(by_m, dict)}
    tokens = sorted({int(M) for by_m in by_name.values() for M in by_m})
    rows, verdicts = [["", *(f"M = {M}" for M in tokens)]], []
    for name, by_m in by_name.items():
        row = [name]
        for M in tokens:
            mib = by_m[str(M)] / 2**20
            met = mib <= asked
            row.append(f"{mib:.1f}" if met or name == memory.COMPARED else f"**{mib:.1f}**")
            if name != memory.COMPARED:
                short = "" if met else f"{mib - asked:.1f} MiB too much"
                verdicts.append(Verdict(f"memory of {name}", M, row[-1], met, short))
        rows.append(row)
    return rows, verdicts


# -- together ----------------------------------------------------------------------------------------


def _tables(document: dict) -> list[tuple[str, list[list[str]], list[Verdict]]]:
    """(title, table, verdicts) of all that was measured."""
    found = [(f"W {N} x {K}, measured (asked)", *by_tokens(document, (N, K))) for N, K in SHAPES]
    found.append(("Quantization, measured (asked)", *of_formats(document)))
    if where := document.get("memory"):
        words = (
            f"Memory of a call beyond its outputs, W {where['N']} x {where['K']}, MiB "
            f"(asked: at most {EXTRA_MIB} a thread, {EXTRA_MIB * where['threads']} together)"
        )
        found.append((words, *of_memory(document)))
    return [part for part in found if any(verdict.met is not None for verdict in part[2])]


def missed(verdicts: list[Verdict]) -> list[str]:
    """A line for each row with targets that were not met: at which M, by how much."""
    by_row: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.met is False:
            at = f"M = {verdict.M}: {verdict.short}" if verdict.M else verdict.short
            by_row.setdefault(verdict.where, []).append(at)
    return [f"{where}: {'; '.join(parts)}" for where, parts in by_row.items()]


def _count(verdicts: list[Verdict]) -> str:
    met, absent = (sum(v.met is kind for v in verdicts) for kind in (True, None))
    words = f"{met} of {len(verdicts)} targets met"
    return f"{words}, {absent} not measured" if absent else words


def text(document: dict) -> list[str]:
    """For a terminal; nothing where no case with a target was measured."""
    tables = _tables(document)
    verdicts = [verdict for *_, of_table in tables for verdict in of_table]
    lines = [f"\ntargets: {_count(verdicts)}"] if tables else []
    for title, table, _ in tables:
        lines += ["", title, plain(table)]
    return lines


def section(document: dict) -> list[str]:
    """For docs/performance.md."""
    tables = _tables(document)
    if not tables:
        return []
    verdicts = [verdict for *_, of_table in tables for verdict in of_table]
    lines = ["", "### Targets", "", f"**{_count(verdicts)}.** Missed in bold."]
    for title, table, _ in tables:
        lines += ["", f"{title}:", "", markdown(table)]
    if lacking := missed(verdicts):
        lines += ["", "Missed:", "", *(f"- {line}" for line in lacking)]
    return lines
