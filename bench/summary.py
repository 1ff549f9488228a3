"""A GPU's results in few lines, for a terminal that shows only the end of a long output."""

from __future__ import annotations

from . import report, report_multi

MATMULS = ("linear_4bit", "linear_4bit_dx", "lora_linear_4bit", "lora_linear_4bit_fwd_bwd")
# Column -> the providers it compares with: the first that ran.
RATIOS = {
    "cuBLAS": ("torch",),
    "bnb": report.PEERS,
    "Unsloth": ("Unsloth's scheme", "Unsloth's scheme, bitsandbytes"),
}


def _find(document: dict, op: str) -> dict[tuple[int, int], dict[int, dict]]:
    """Shape -> M -> case, of one operator."""
    found: dict[tuple[int, int], dict[int, dict]] = {}
    for case in document["cases"]:
        if case["op"] == op:
            found.setdefault((case["N"], case["K"]), {})[case["M"]] = case
    return found


def _shapes(found: dict) -> str:
    return ", ".join(f"{N}x{K}" for N, K in found)


def _ratio(case: dict, providers: tuple[str, ...]) -> str:
    ratios = [report.ratio(case, name) for name in providers]
    return report.times_faster(next((value for value in ratios if value), None))


def _microseconds(case: dict) -> str:
    if "error" in case["providers"].get(report.OURS, {}):
        return "FAILED"
    ours = report.median(case, report.OURS)
    return report.digits(ours * 1e3) if ours else "-"


def _matmul_table(found: dict, ratios: list[str]) -> list[list[str]]:
    """One row per M; per shape: our time, how much faster than others, share of the limit."""
    rows = [["M", *["us", *ratios, "limit"] * len(found)]]
    for M in sorted({M for by_tokens in found.values() for M in by_tokens}):
        row = [str(M)]
        for by_tokens in found.values():
            case = by_tokens.get(M)
            if case is None:
                row += ["-"] * (len(ratios) + 2)
                continue
            row += [_microseconds(case), *(_ratio(case, RATIOS[name]) for name in ratios)]
            row.append(report.of_limit(case))
        rows.append(row)
    return rows


def _overhead_table(linear: dict, lora: dict) -> list[list[str]]:
    """What an adapter adds to the time of the base, forward."""
    rows = [["M", *(f"{N}x{K}" for N, K in lora)]]
    for M in sorted({M for by_tokens in lora.values() for M in by_tokens}):
        row = [str(M)]
        for shape, by_tokens in lora.items():
            with_adapter = report.median(by_tokens.get(M, {"providers": {}}), report.OURS)
            base = linear.get(shape, {}).get(M, {"providers": {}})
            alone = report.median(base, report.OURS)
            both = with_adapter and alone
            row.append(f"{with_adapter / alone - 1:+.0%}" if both else "-")
        rows.append(row)
    return rows


def _format_table(document: dict) -> list[list[str]]:
    rows = [["", "shape", "us", "bnb", "limit", "GB/s written"]]
    for op in ("dequantize_4bit", "quantize_4bit"):
        for (N, K), by_tokens in _find(document, op).items():
            case = by_tokens[0]
            written = report.written(case) if op == "dequantize_4bit" else ""
            row = [op, f"{N}x{K}", _microseconds(case), _ratio(case, report.PEERS)]
            rows.append([*row, report.of_limit(case), written])
    return rows


def text(document: dict) -> str:
    """The tables; ratios say how many times faster this library is."""
    limits = document["limits"]
    lines = [
        f"{document['gpu']['name']}: copy {limits['copy_gbs']:.0f} GB/s, write "
        f"{limits['write_gbs']:.0f} GB/s, matmul {limits['matmul_tflops']:.0f} TFLOP/s; "
        "columns cuBLAS, bnb, Unsloth: their time / ours"
    ]
    if not document.get("complete", True):
        lines.append("THE RUN WAS CUT SHORT")
    for op in MATMULS:
        found = _find(document, op)
        if found:
            training = op == "lora_linear_4bit_fwd_bwd"
            ratios = ["cuBLAS", "bnb", *(["Unsloth"] if training else [])]
            lines += [f"\n{op}: {_shapes(found)}", report.plain(_matmul_table(found, ratios))]
    linear, lora = _find(document, "linear_4bit"), _find(document, "lora_linear_4bit")
    if lora:
        lines += ["\nadapter over base, forward", report.plain(_overhead_table(linear, lora))]
    lines += ["", report.plain(_format_table(document)), *report_multi.text(document)]
    failed = sum(
        "error" in result for case in document["cases"] for result in case["providers"].values()
    )
    if failed:
        lines.append(f"\n{failed} results FAILED, among them:")
    missing = [line[:160] for line in report.missing(document) if line]
    return "\n".join(lines + missing[:8])
