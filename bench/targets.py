"""What the CPU kernels aim at where there are products of bfloat16 numbers, beside what was measured.

A ratio says how many times faster than the fastest of the peers; its goals are for 4096 x 4096, and nine tenths of them
for other shapes. Of a model, tokens per second are compared.
"""

from __future__ import annotations

from typing import NamedTuple

from lowrank_kernels.benchmark import experts, models
from lowrank_kernels.benchmark.ops import OURS
from lowrank_kernels.benchmark.report import Rows, median

from . import peer_ggml, peer_int4, peer_openvino
from .suite import CPU_SHAPES, CPU_TOKENS, INT8, MEDIUM

EXACT_PEERS = (peer_openvino.NAME, peer_int4.ORT, "torch")
INT8_PEERS = (peer_int4.ORT_INT8, peer_openvino.U4, peer_ggml.NAME)
SHARES = (0.75, 0.75, 0.75, 0.85, 0.92)
ERROR = 2.2e-3  # of the norm, of bfloat16 activations


class Goal(NamedTuple):
    """``goals``: one for each M of CPU_TOKENS. Without peers, shares of the limit."""

    words: str
    dtype: str
    ours: str
    peers: tuple[str, ...]
    goals: tuple[float, ...]


BNB = ("bitsandbytes",)
GOALS = (
    Goal("bfloat16, against bitsandbytes", "bfloat16", OURS, BNB, (1.2, 1.2, 1.2, 1.2, 1.4)),
    Goal("bfloat16, against dense", "bfloat16", OURS, ("torch",), (4, 2.5, 1.4, 1.1, 0.95)),
    Goal("float32, best exact peer", "float32", OURS, EXACT_PEERS, (1.6, 1.3, 1.3, 1.1, 1.1)),
    Goal('"medium", against bitsandbytes', "float32", MEDIUM, BNB, (1.2, 1.2, 1.2, 1.2, 1.4)),
    Goal("int8, best int8 peer", "float32", INT8, INT8_PEERS, (1.0, 1.15, 1.1, 1.3, 1.4)),
    Goal("bfloat16, share of the limit", "bfloat16", OURS, (), SHARES),
    Goal("float32, share of the limit", "float32", OURS, (), SHARES),
)
# phase, dtype, ours, peer, goal
MODEL_GOALS = (
    *(("decode", *who, models.BITSANDBYTES, 1.6) for who in (("bfloat16", OURS), ("float32", MEDIUM))),
    *(("prefill", *who, models.BITSANDBYTES, 1.3) for who in (("bfloat16", OURS), ("float32", MEDIUM))),
    ("train", "bfloat16", OURS, models.BITSANDBYTES, 1.3),
    ("train", "float32", MEDIUM, models.BITSANDBYTES, 2.2),
    ("train", "float32", OURS, models.BITSANDBYTES, 1.4),
    ("train", "bfloat16", OURS, models.DENSE, 1.2),
    ("prefill", "bfloat16", OURS, models.DENSE, 1.0),
    *((phase, dtype, models.PEFT, OURS, 0.95) for dtype in ("bfloat16", "float32") for phase in models.TOKENS),
)  # fmt: skip


# Of experts: dtype of ours, peer, its dtype, and the goals at 1, 16 and 512 tokens and in training (None: no goal).
EXPERTS_GOALS = (
    ("bfloat16", "torch", "bfloat16", (5.0, 3.0, 1.3, 1.3)),
    ("bfloat16", "bitsandbytes", "bfloat16", (350.0, 25.0, 4.0, 4.0)),
    ("float32", "torch", "bfloat16", (4.0, 2.0, None, None)),
    ("float32", "torch", "float32", (None, None, 1.0, None)),
    ("float32", "bitsandbytes", "bfloat16", (280.0, 15.0, None, None)),
)
EXPERTS_SHARE = 0.65  # of the limit, at one token
_TRAINED = {"torch": experts.PEFT, "bitsandbytes": experts.BITSANDBYTES}


def _against(value: float, goal: float) -> str:
    return f"{value:.2f} {'≥' if value >= goal else '<'} {goal:.2f}"


def _cell(case: dict | None, goal: Goal, wanted: float) -> str:
    ours = median(case, goal.ours) if case else None
    found = [case["limit_ms"]] if ours and not goal.peers else []
    found += [ms for peer in goal.peers if case and (ms := median(case, peer))]
    return _against(min(found) / ours, wanted) if ours and found else "-"


def of_operators(document: dict) -> Rows:
    """A row for each goal and shape, a column for each M: what was measured, and what it should be."""
    cases = {
        (c["N"], c["K"], c["dtype"], c["M"]): c
        for c in document["cases"]
        if c["op"] == "linear_4bit" and c["cache"] == "cold"
    }
    rows = [["", "W", *(f"M = {M}" for M in CPU_TOKENS)]]
    for goal in GOALS:
        for N, K in sorted({key[:2] for key in cases}):
            easier = 1.0 if CPU_SHAPES[0] == (N, K) else 0.9
            of_shape = [cases.get((N, K, goal.dtype, M)) for M in CPU_TOKENS]
            cells = [_cell(c, goal, easier * g) for c, g in zip(of_shape, goal.goals)]
            if set(cells) != {"-"}:
                rows.append([goal.words, f"{N} x {K}", *cells])
    return rows


def of_experts(document: dict) -> Rows:
    """A row for each goal of :class:`Experts4bit`, a column for each number of tokens, and for training."""
    columns = (("experts", 1), ("experts", 16), ("experts", 512), ("experts_fwd_bwd", 512))
    cases = {
        (c["op"], c["M"], c["dtype"]): c for c in document["cases"] if c["op"].startswith("experts")
    }
    rows = [["", "1 token", "16", "512", "512, training"]]
    for dtype, peer, of_dtype, goals in EXPERTS_GOALS:
        cells = []
        for (op, M), goal in zip(columns, goals):
            name = _TRAINED[peer] if op.endswith("bwd") else peer
            ours = median(cases.get((op, M, dtype), {"providers": {}}), OURS)
            other = median(cases.get((op, M, of_dtype), {"providers": {}}), name)
            cells.append(_against(other / ours, goal) if goal and ours and other else "-")
        if set(cells) != {"-"}:
            rows.append([f"{dtype}, against {peer} in {of_dtype}", *cells])
    if case := cases.get(("experts", 1, "bfloat16")):
        share = case["limit_ms"] / median(case, OURS)
        rows.append(["bfloat16, share of the limit", _against(share, EXPERTS_SHARE), "-", "-", "-"])
    return rows


def of_models(document: dict) -> Rows:
    """A row for each goal and model."""
    rows = [["model", "", "dtype", "", "against", "measured"]]
    for phase, dtype, ours, peer, goal in MODEL_GOALS:
        for case in document["cases"]:
            wanted = case["op"] == "model" and case["model"].startswith("tinyllama")
            if wanted and (case["phase"], case["dtype"]) == (phase, dtype):
                a, b = median(case, ours), median(case, peer)
                value = _against(b / a, goal) if a and b else "-"
                rows.append([case["model"], phase, dtype, ours, peer, value])
    return rows


def errors(document: dict) -> Rows:
    """The largest relative error of each provider of linear_4bit, as the check before its timing found it."""
    largest: dict[tuple[str, str], float] = {}
    for case in document["cases"]:
        for name, result in case["providers"].items():
            if case["op"] == "linear_4bit" and "relative_error" in result:
                key = (case["dtype"], name)
                largest[key] = max(largest.get(key, 0.0), result["relative_error"])
    words = {key: f"{error:.1e}" for key, error in largest.items()}
    if (ours := ("bfloat16", OURS)) in words:
        words[ours] += f" {'≤' if largest[ours] <= ERROR else '>'} {ERROR:.1e}"
    order = sorted(largest, key=lambda key: (key[0], largest[key]))
    return [["", "dtype", "relative error"], *([key[1], key[0], words[key]] for key in order)]
