"""The tables of many adapters in one batch: what was aimed at, Punica's grid, and every other case."""

from __future__ import annotations

from typing import NamedTuple

from lowrank_kernels.tables import digits, times_faster

from .tables import OURS, cell, markdown, median, of_limit, plain, ratio

ADD, LINEAR, TRAINING = (
    "multi_lora_",
    "multi_lora_linear_4bit",
    "multi_lora_linear_4bit_fwd_bwd",
)
TITLES = {
    ADD: "`multi_lora_`: y += each row's adapter",
    LINEAR: "`multi_lora_linear_4bit`: base and adapters",
    TRAINING: "`multi_lora_linear_4bit`, forward and gradients of x and of every A, B",
}
POPULARITIES = {
    "identical": "identical",
    "uniform": "uniform",
    "zipf": "zipf 1.5",
    "distinct": "distinct",
}
GRID_PEERS = ("torch loop", "gather + bmm", "vLLM's CPU scheme", "vLLM's scheme")
WORDS = """\
*Identical*: all rows have one adapter; *uniform*: ceil(sqrt(rows)) adapters, evenly; *zipf 1.5*: adapters with 1, 1.5,
1.5², ... rows, rounded down; *distinct*: one row each (Punica's definitions and shape). Rows of one adapter are
adjacent. Pages and stacks have the dtype of the activations. *Mixed ranks*: 8, 16, 32 and 64 in turn. The batches of a
case take turns over adapters of their own, so that one with few adapters does not find them in a cache. *torch loop*,
for each adapter: `y[rows] += scaling * (x[rows] @ A.T) @ B.T`, the rows a slice; *addmm_*: the same in place.
*gather + bmm*: A and B of every row by `index_select`, then two `bmm`. *vLLM's CPU scheme*: every row's adapter out of
a stack padded to the largest rank, cast to the dtype of the result, `einsum`. *vLLM's scheme*, on a GPU: its two Triton
kernels, A in slices of K that are summed by atomics. Both written here after their source, not run from it. *Padded to
64*: this library with every adapter stored at rank 64. *At the limit*: the ratio that a kernel would have which runs at
the limit of the machine.""".replace("\n", " ")


class Target(NamedTuple):
    """``peer``: to be that many times faster than; None: a share of the limit to be reached."""

    words: str
    op: str
    M: int
    popularity: str
    peer: str | None
    least: float
    mixed: bool = False


# At 4096 x 4096, r = 16, float32.
TARGETS = (
    Target("decode, 64 rows, 64 adapters", ADD, 64, "distinct", "torch loop", 4.0),
    Target("decode, 64 rows, 64 adapters", ADD, 64, "distinct", "gather + bmm", 3.0),
    Target("decode, 64 rows, ranks 8 to 64", ADD, 64, "distinct", "padded to 64", 2.0, True),
    Target("prefill, 512 rows, 4 adapters", ADD, 512, "4", "torch loop", 1.2),
    Target("decode, 64 rows, 64 adapters", ADD, 64, "distinct", "vLLM's CPU scheme", 5.0),
    Target("decode, 64 rows, ranks 8 to 64", ADD, 64, "distinct", "vLLM's CPU scheme", 5.0, True),
    Target("prefill, 512 rows, 4 adapters", ADD, 512, "4", "vLLM's CPU scheme", 10.0),
    Target(
        "base + deltas, 64 rows, 64 adapters",
        LINEAR, 64, "distinct", "linear_4bit, multi_lora_", 1.05,
    ),
    Target(
        "base + deltas, 512 rows, 4 adapters",
        LINEAR, 512, "4", "linear_4bit, multi_lora_", 1.05,
    ),
    Target("decode, 64 rows, 64 adapters", ADD, 64, "distinct", None, 0.65),
)  # fmt: skip


# -- what was aimed at -----------------------------------------------------------------------------


def _case_of(document: dict, target: Target) -> dict | None:
    wanted = (target.op, 4096, 4096, target.M, target.popularity, target.mixed, "float32")
    fields = ("op", "N", "K", "M", "popularity", "mixed", "dtype")
    return next(
        (c for c in document["cases"] if tuple(c.get(field) for field in fields) == wanted), None
    )


def _target_row(document: dict, target: Target) -> list[str]:
    case, against = _case_of(document, target), target.peer or "limit of the machine"
    asked = f"{target.least:g}x" if target.peer else f"{target.least:.0%}"
    row = [target.words, against, asked]
    ours = case and median(case, OURS)
    base = case and (median(case, target.peer) if target.peer else case["limit_ms"])
    if not (ours and base):
        return [*row, "-", "-", "not measured"]
    verdict = "met" if base / ours >= target.least else "not met"
    if target.peer is None:
        return [*row, f"{base / ours:.0%}", "100%", verdict]
    return [*row, _times(base / ours), _times(base / case["limit_ms"]), verdict]


def _times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def targets(document: dict) -> list[list[str]]:
    """One row per target; "at the limit": the ratio that a kernel at the limit of the machine has."""
    head = ["", "against", "asked", "measured", "at the limit", ""]
    return [head, *(_target_row(document, target) for target in TARGETS)]


# -- the grid, and the rest ------------------------------------------------------------------------


def _many(document: dict) -> list[dict]:
    return [case for case in document["cases"] if case["op"] in TITLES]


def _grid_shape(document: dict) -> tuple[int, int] | None:
    """The shape with a case of every popularity that Punica has."""
    found: dict[tuple[int, int], set[str]] = {}
    for case in _many(document):
        if case["op"] == ADD and not case["mixed"]:
            found.setdefault((case["N"], case["K"]), set()).add(case["popularity"])
    return next((shape for shape, names in found.items() if names >= set(POPULARITIES)), None)


def _of_grid(document: dict) -> list[dict]:
    shape = _grid_shape(document)
    return [
        case
        for case in _many(document)
        if (case["N"], case["K"]) == shape
        and (case["op"], case["mixed"]) == (ADD, False)
        and case["popularity"] in POPULARITIES
    ]


def grid(document: dict) -> list[list[str]]:
    """Rows: M; per popularity our time, and how many times faster that is than each peer."""
    by_place = {(case["M"], case["popularity"]): case for case in _of_grid(document)}
    rows = [["rows", *POPULARITIES.values()]]
    for M in sorted({M for M, _ in by_place}):
        row = [str(M)]
        for popularity in POPULARITIES:
            case = by_place.get((M, popularity))
            row.append(_grid_cell(case) if case else "-")
        rows.append(row)
    return rows


def _grid_cell(case: dict) -> str:
    ours = median(case, OURS)
    if not ours:
        return "-"
    unit = 1e3 if case.get("device") == "cuda" else 1.0
    ratios = [times_faster(ratio(case, name)) for name in GRID_PEERS if name in case["providers"]]
    return f"{digits(ours * unit)} ({', '.join(ratios)})"


def _grid_peers(document: dict) -> str:
    names = {name for case in _of_grid(document) for name in case["providers"]}
    return ", ".join(name for name in GRID_PEERS if name in names)


def rest(document: dict, op: str) -> list[list[str]]:
    """A row per case of ``op`` outside of the grid; a column per provider."""
    in_grid = [id(case) for case in _of_grid(document)]
    cases = [case for case in _many(document) if case["op"] == op and id(case) not in in_grid]
    names = list(dict.fromkeys(name for case in cases for name in case["providers"]))
    rows = [["W", "dtype", "rows", "adapters", *names, "of limit"]]
    for case in cases:
        row = [f"{case['N']} x {case['K']}", case["dtype"], str(case["M"]), _adapters(case)]
        rows.append([*row, *(cell(case, name) for name in names), of_limit(case)])
    return rows if cases else []


def _adapters(case: dict) -> str:
    words = POPULARITIES.get(case["popularity"], case["popularity"])
    return f"{words}, mixed ranks" if case["mixed"] else f"{words}, r = {case['R']}"


# -- together --------------------------------------------------------------------------------------


def _tables(document: dict) -> list[tuple[str, list[list[str]]]]:
    """(title, table) of all that was measured."""
    on_gpu, found = "gpu" in document, []
    unit = "microseconds" if on_gpu else "milliseconds"
    if not on_gpu:
        words = f"Targets, W 4096 x 4096, r = 16, float32, {document['threads']} threads"
        found.append((words, targets(document)))
    if shape := _grid_shape(document):
        first = _of_grid(document)[0]
        words = (
            f"W {shape[0]} x {shape[1]}, r = {first['R']}, {first['dtype']}: {unit} (times faster "
            f"than {_grid_peers(document)})"
        )
        found.append((words, grid(document)))
    for op, title in TITLES.items():
        if table := rest(document, op):
            found.append((f"{title}, {unit}", table))
    return found


def text(document: dict) -> list[str]:
    """For a terminal; nothing where no such case was measured."""
    if not _many(document):
        return []
    lines = ["", "many adapters in one batch"]
    for title, table in _tables(document):
        lines += ["", title, plain(table)]
    return lines


def section(document: dict) -> list[str]:
    """For docs/performance.md; nothing where no such case was measured."""
    if not _many(document):
        return []
    lines = ["", "### Many adapters in one batch", "", WORDS]
    for title, table in _tables(document):
        lines += ["", f"{title}:", "", markdown(table)]
    return lines
