"""``demo``: a real model, quantized in place, fine-tuned, saved, reloaded, with many adapters, and timed."""

from __future__ import annotations

import argparse
import copy
import statistics
import textwrap
import time
from collections import defaultdict

import torch
from tqdm import tqdm

import lowrank_kernels as lk

from .. import files
from ..benchmark import harness, report
from ..benchmark.models import BITSANDBYTES, DENSE, Contest, cases, contenders
from ..benchmark.ops import OURS
from . import UserError, corpus, demo_multi, models, pictures
from .demo_parts import LOOK_EVERY, adamw, chapter, loss_fell, prepare

BATCH, STEPS, LEARNING_RATE = 4, 24, 1.5e-3
SPEED_SECONDS = 45.0
PROMPTS = ("What should I do on a rainy day?", "How do I boil an egg?")


def run(args: argparse.Namespace) -> int:
    """All chapters; 1 if a loss did not fall or something is not what it should be equal to."""
    if args.rlhf:
        from . import demo_rlhf

        return demo_rlhf.run(args)
    args.steps, args.lr = args.steps or STEPS, args.lr or LEARNING_RATE
    start = time.perf_counter()
    prepare(args)
    kernels = lk.backends.report()
    if kernels["active"] not in kernels["available"]:
        raise UserError(f"no kernels ({kernels['build']})")

    chapter("1. Load")
    base, tokenizer, name = models.load(args.model)
    running = f"{kernels['active']} kernels, {kernels['isa']}, {kernels['threads']} threads"
    print(f"{name}: {sum(p.numel() for p in base.parameters()) / 1e6:.1f} M parameters; {running}")
    model = copy.deepcopy(base)

    chapter("2. Quantize to NF4 with double quantization, add adapters")
    sizes = replace(model, args.rank)
    chapter("3. Before fine-tuning")
    before = answers(model, tokenizer)
    chapter(f"4. Fine-tune the adapters: r = {args.rank}, {args.steps} steps of {BATCH} examples")
    losses, held_out = train(model, tokenizer, args)
    chapter("5. After fine-tuning (neither question was in the training text)")
    after = answers(model, tokenizer)
    chapter("6. Save the adapter, load it into a fresh 4-bit base")
    identical = reload(base, model, tokenizer, args)
    chapter("7. Many adapters in one batch")
    many, problems = demo_multi.run(model, tokenizer, PROMPTS, args)
    rates = {}
    if not args.no_speed:
        chapter("8. Speed, tokens per second")
        rates = compare(base, model, tokenizer, args.rank)

    chapter("Written")
    title = f"{name}, NF4, r = {args.rank}"
    pictures.loss(args.out / "loss.png", f"Fine-tuning {title}", losses, held_out)
    if rates:
        pictures.speed(args.out / "speed.png", f"{title}; {running}", rates)
    generated = {"before": before, "after": after}
    numbers = {"model": name, "bytes": sizes, "loss": losses, "held_out_loss": held_out}
    numbers |= {"answers": generated, "logits_identical": identical, "many_adapters": many}
    numbers |= {"tokens_per_second": rates}
    files.write_json(numbers, args.out / "demo.json")
    for path in sorted(args.out.iterdir()):
        print(f"  {path}")
    print(f"\n{time.perf_counter() - start:.0f} s")
    if not loss_fell(losses):
        problems.append("the loss did not fall")
    if not identical:
        problems.append("the reloaded adapter computes other logits")
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


# -- the chapters ----------------------------------------------------------------------------------


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def replace(model: torch.nn.Module, rank: int) -> dict[str, int]:
    """Replaces every linear layer but the head, in place; prints and returns the sizes."""
    torch.manual_seed(0)
    dense = tensor_bytes(model)
    report = lk.replace_linear(model, r=rank, lora_alpha=2 * rank)
    kinds = defaultdict(list)
    for layer in report.replaced:
        kinds[layer.name.rpartition(".")[2], layer.shape].append(layer)
    row = "  {:12} {:>6} {:>13} {:>12} {:>10} {:>12}"
    print(row.format("layers", "count", "shape", "dense MiB", "NF4 MiB", "adapter MiB"))

    def mib(layers, field: str) -> str:
        return f"{sum(getattr(layer, field) for layer in layers) / 2**20:.1f}"

    def line(kind: str, shape: str, layers: list) -> str:
        fields = ("bytes_before", "bytes_after", "adapter_bytes")
        return row.format(kind, len(layers), shape, *(mib(layers, f) for f in fields))

    for (kind, (N, K)), layers in kinds.items():
        print(line(kind, f"{N} x {K}", layers))
    print(line("together", "", report.replaced))
    for layer in report.skipped:
        print(f"  left alone: {layer.name} ({layer.reason})")
    after = tensor_bytes(model)
    print(f"\n  whole model: {dense / 2**20:.0f} MiB -> {after / 2**20:.0f} MiB with adapters")
    return {
        "model_before": dense,
        "model_after": after,
        "linear_before": report.bytes_before,
        "linear_after": report.bytes_after,
        "adapters": report.adapter_bytes,
    }


def answers(model: torch.nn.Module, tokenizer) -> dict[str, str]:
    """Greedy answers to PROMPTS, printed and returned."""
    said = {}
    for prompt in PROMPTS:
        [said[prompt]], _ = models.answer(model, tokenizer, [prompt])
        print(f"  > {prompt}")
        print(textwrap.indent(textwrap.fill(said[prompt], 88), "    "), flush=True)
    return said


def train(model, tokenizer, args: argparse.Namespace) -> tuple[list[float], dict[int, float]]:
    """AdamW on the adapters; prints a table. (loss of every step, step -> held-out loss)."""
    rows, held_out_rows = corpus.load()
    unseen = corpus.batch(tokenizer, held_out_rows)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = adamw(parameters, args.lr, args.steps)
    losses: list[float] = []
    held_out: dict[int, float] = {0: held_out_loss(model, unseen)}
    print(f"  {'step':>4}  {'loss':>6}  held-out")
    print(f"  {0:4}  {'':6}  {held_out[0]:.3f}", flush=True)
    steps = corpus.draws(rows, BATCH, args.steps)
    with tqdm(steps, total=args.steps, desc="Training", unit="step") as bar:
        for step, drawn in enumerate(bar, 1):
            model.train()
            loss = model(**corpus.batch(tokenizer, drawn), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if step % LOOK_EVERY == 0 or step == args.steps:
                held_out[step] = held_out_loss(model, unseen)
                recent = statistics.fmean(losses[-LOOK_EVERY:])
                bar.write(f"  {step:4}  {recent:6.3f}  {held_out[step]:.3f}")
    return losses, held_out


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    model.eval()
    return model(**batch, use_cache=False).loss.item()


@torch.no_grad()
def reload(base, model, tokenizer, args: argparse.Namespace) -> bool:
    """Whether a fresh copy of ``base`` with the saved adapter computes the very same logits."""
    folder = args.out / "adapter"
    lk.save_adapter(model, folder)
    fresh = copy.deepcopy(base)
    lk.replace_linear(fresh, r=args.rank, lora_alpha=2 * args.rank, progress=False)
    ids = torch.tensor([corpus.prompt_ids(tokenizer, PROMPTS[0])])
    expected = model.eval()(input_ids=ids).logits
    without = fresh.eval()(input_ids=ids).logits
    lk.load_adapter(fresh, folder)
    got = fresh.eval()(input_ids=ids).logits
    size = sum(path.stat().st_size for path in folder.iterdir())
    identical = torch.equal(got, expected)
    difference = (got - expected).abs().max().item()
    print(f"  {folder}: {size / 2**20:.1f} MiB in PEFT's format")
    print(f"  fresh base alone:    logits differ by up to {(without - expected).abs().max():.2f}")
    print(f"  with the adapter:    {'identical, bit for bit' if identical else difference}")
    return identical


def compare(base, model, tokenizer, rank: int) -> dict[str, dict[str, float] | str]:
    """Prints and returns tokens/s of this library, dense and bitsandbytes. Uses ``base`` up.

    Training comes first and on models of their own, and its gradients are compared before it is timed: see
    :mod:`lowrank_kernels.benchmark.models`.
    """
    rows, _ = corpus.load()
    batch = corpus.batch(tokenizer, rows[:BATCH])
    names = (OURS, DENSE, BITSANDBYTES)
    contest = Contest(contenders(base, rank, names, model), batch)
    providers = {name: contest.provider(name) for name in names}
    tokens = int(batch["attention_mask"].sum())
    entries = [(case, providers) for case in cases("model", "float32", rank, "cpu", tokens)]
    measured = list(harness.run(entries, 1.0, deadline=time.monotonic() + SPEED_SECONDS))
    names = report.names_of(measured)
    print(report.plain(report.table(measured, names, names)))
    print("\n".join(report.missing({"cases": measured})))
    return report.rates({"cases": measured})
