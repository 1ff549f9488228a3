"""The picture of one machine's results: time per call against tokens, and the limit."""

from __future__ import annotations

import os
import pathlib

PANELS = (
    ("linear_4bit", "y = x Wᵀ"),
    ("lora_linear_4bit_fwd_bwd", "LoRA forward + backward, r = 16"),
)
COLORS = {
    "lowrank_kernels": "#c8102e",
    "torch": "#4a6fa5",
    "torch + PEFT": "#4a6fa5",
    "dequantize + matmul": "#a3a3a3",
    "bitsandbytes": "#e0a030",
    "bitsandbytes + PEFT": "#e0a030",
    "Unsloth's scheme": "#6f9f5f",
    "Unsloth's scheme, bitsandbytes": "#b5c99a",
}


def write(document: dict, path: pathlib.Path) -> None:
    """One panel per operator: first shape, first dtype, cold caches; bars are quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 4.4), layout="constrained")
    first = document["cases"][0]
    for axis, (op, title) in zip(axes, PANELS):
        group = [
            case
            for case in document["cases"]
            if (case["op"], case["dtype"], case["cache"]) == (op, first["dtype"], "cold")
            and (case["N"], case["K"]) == (first["N"], first["K"])
        ]
        _panel(axis, sorted(group, key=lambda case: case["M"]), title)
    machine = f"{document['cpu']['model']}, {document['threads']} threads"
    if "gpu" in document:
        machine = document["gpu"]["name"]
    figure.suptitle(
        f"W {first['N']} x {first['K']}, NF4 + double quantization, {first['dtype']}, cold caches; "
        f"{machine}\nlimit: {_limits(document['limits'])}",
        fontsize=10,
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
    plt.close(figure)
    os.replace(temporary, path)


def _limits(limits: dict) -> str:
    if "copy_gbs" in limits:
        return f"{limits['copy_gbs']:.0f} GB/s copy, {limits['matmul_tflops']:.0f} TFLOP/s"
    return f"{limits['read_gbs']:.1f} GB/s read, {limits['sgemm_gflops']:.0f} GFLOP/s"


def _panel(axis, group: list[dict], title: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("tokens M")
    axis.set_ylabel("milliseconds per call")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.25, which="both", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    if not group:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
        return
    tokens = [case["M"] for case in group]
    axis.plot(tokens, [c["limit_ms"] for c in group], "k--", linewidth=1.2, label="limit")
    names = sorted(group[0]["providers"], key=lambda name: name != "lowrank_kernels")
    for name in names:
        results = [(c["M"], c["providers"][name]) for c in group]
        points = [
            (m, r["median_ms"], r["q1_ms"], r["q3_ms"]) for m, r in results if "median_ms" in r
        ]
        if not points:
            continue
        m, middle, low, high = zip(*points)
        width = 2.4 if name == "lowrank_kernels" else 1.4
        axis.plot(
            m, middle, "o-", color=COLORS.get(name), linewidth=width, markersize=4, label=name
        )
        axis.vlines(m, low, high, color=COLORS.get(name), linewidth=width)
    axis.set_xticks(tokens, [str(m) for m in tokens])
    axis.legend(frameon=False, fontsize=9)
