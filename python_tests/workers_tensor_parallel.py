"""What test_tensor_parallel.py runs in two and three processes: parallel layers against one process."""

from __future__ import annotations

import copy
import functools
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
import tolerance
from lowrank_kernels import distributed as lkd
from lowrank_kernels.functional import dropout_seed
from workers_data_parallel import close

F32, BF16 = torch.float32, torch.bfloat16
STYLES = {
    "column": lkd.Column(),
    "gathered": lkd.Column(gather_output=True),
    "row": lkd.Row(),
    "whole_x": lkd.Row(input_is_parallel=False),
}


def layer(K=96, N=160, r=3, **arguments) -> lk.LoRALinear4bit:
    defaults = {"r": r, "lora_alpha": 2 * r, "init_lora_weights": False}
    return lk.LoRALinear4bit.from_linear(nn.Linear(K, N), **(defaults | arguments))


def parallel(one: nn.Module, style) -> nn.Module:
    """A copy, cut."""
    model = nn.Sequential(copy.deepcopy(one))
    assert lkd.parallelize(model, {"0": style}) == ["0"]
    return model[0]


def part(tensor: torch.Tensor, cut, cut_it: bool) -> torch.Tensor:
    return cut.own(tensor, tensor.dim() - 1) if cut_it else tensor


def compare(one, kind: str, x: torch.Tensor, c: float = tolerance.C_ZERO_MEAN, bound=None) -> None:
    """y and all gradients keep the bounds of one process; ``bound``: of 16-bit numbers, relative to the largest."""
    mine = parallel(one, STYLES[kind])
    cut = mine.weight_cut
    leaf = part(x, cut, kind == "row").clone().requires_grad_()
    torch.manual_seed(5)
    seed = dropout_seed(one.lora_dropout["default"], x.device)
    torch.manual_seed(5)
    y = mine(leaf)
    dy = torch.randn(x.shape[0], one.out_features).to(x.dtype)
    y.backward(part(dy, cut, kind == "column"))

    A, B = (p.detach() for p in one.adapter_parameters("default"))
    adapter = (A, B, one.scaling["default"], one.bias.detach(), one.lora_dropout["default"], seed)
    args = (x, *one.weight4bit.op_args(), *adapter)
    (value, s), (size, _) = tolerance.evaluate("lora_linear_4bit", args)
    backward = (dy, x, s.float(), *args[1:], True, True, True, True)
    values, sizes = tolerance.evaluate("lora_linear_4bit_backward", backward)

    def parts(y, dx, dA, dB, dbias):
        dA, dB = mine.shard_of_adapter(dA, dB)
        column = kind in ("column", "gathered")
        return {
            "y": part(y, cut, kind == "column"),
            "dx": part(dx, cut, kind == "row"),
            "dA": dA,
            "dB": dB,
            "dbias": cut.own(dbias, 0) if column else dbias,
        }

    actual = {"y": y, "dx": leaf.grad, "dbias": mine.bias.grad}
    for name, parameter in zip(("dA", "dB"), mine.adapter_parameters("default")):
        actual[name] = parameter.grad
    expected, magnitudes = parts(value, *values), parts(size, *sizes)
    for name, tensor in actual.items():
        if bound is None or name in ("dA", "dB"):
            tolerance.assert_close(
                f"{kind}: {name}", tensor, expected[name], magnitudes[name], 2 * c
            )
        else:
            assert tensor.dtype == (F32 if name == "dbias" else x.dtype)
            close(f"{kind}: {name}", tensor.double(), expected[name], bound)


def check_layers(rank, size):
    for kind in STYLES:
        for K, N, r in ((96, 160, 8), (160, 96, 5), (352, 97, 1)):
            for dropout in (0.0, 0.4):
                compare(layer(K, N, r, lora_dropout=dropout), kind, torch.randn(7, K))


def check_sixteen_bits(rank, size):
    """Each process rounds its part of y and dx once more than one process does."""
    for kind in STYLES:
        compare(layer(lora_dropout=0.4), kind, torch.randn(7, 96).to(BF16), bound=2.0**-6)


def check_base_has_the_same_bits(rank, size):
    """Of a column-parallel layer, whose outputs are nobody else's."""
    for one in (layer(), lk.Linear4bit(96, 160)):
        mine, x = parallel(one, "column"), torch.randn(7, 96)
        if isinstance(one, lk.LoRALinear4bit):
            one.disable_adapters()
            mine.disable_adapters()
        expected = mine.weight_cut.own(one(x), 1)
        tolerance.assert_same_bits("y", mine(x), expected)
        dense = mine.weight_cut.own(one.dequantize(), 0)
        tolerance.assert_same_bits("W", mine.dequantize(), dense)
        tolerance.assert_same_bits("rows", mine(x[:0]), expected[:0])
        row = parallel(lk.Linear4bit(160, 96, quant_storage=BF16), lkd.Row(input_is_parallel=False))
        assert row(torch.randn(2, 3, 160)).shape == (2, 3, 96) and row.weight.dtype == BF16


def check_a_layer_keeps_no_more_than_its_part(rank, size):
    for style in ("column", "row"):
        mine = parallel(layer(1024, 1024 * size, 8), style)
        for name, tensor in mine.named_parameters():
            if "bias" not in name:
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize, name
        assert mine.weight.numel() == 1024 * 1024 // 2 if style == "column" else True
        assert sum(m.weight.numel() for m in mine.lora_A.values()) < 8 * 1024


# -- a model ---------------------------------------------------------------------------------------


def random_llama(heads: int) -> nn.Module:
    """The same on all processes."""
    transformers = pytest.importorskip("transformers", reason="a real model needs transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16 * heads,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


def llama(heads: int) -> nn.Module:
    model = random_llama(heads)
    lk.replace_linear(model, r=5, lora_alpha=5, init_lora_weights=False, progress=False)
    return model


PLAN = {
    "q_proj": lkd.Column(unit=64),
    "k_proj": lkd.Column(unit=32),
    "v_proj": lkd.Column(unit=32),
    "o_proj": lkd.Row(unit=64),
    "gate_proj": "column",
    "up_proj": "column",
    "down_proj": "row",
}


def check_llama_trains(rank, size):
    """Loss, gradients and two steps of AdamW; heads are divided, 160 columns are 96 + 64 (64 + 64 + 32)."""
    one, mine = llama(2 * size), llama(2 * size)
    assert len(lkd.parallelize(mine, PLAN, init_device_mesh("cpu", (size,)))) == 14
    assert mine.model.layers[0].mlp.up_proj.weight_cut.sizes == {2: [96, 64], 3: [64, 64, 32]}[size]
    layers = [lk.nn.lora_layers(model) for model in (one, mine)]
    ids = torch.randint(0, 50, (3, 9))
    optimizers = []
    for model in (one, mine):
        optimizers.append(
            torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-3)
        )
    for _ in range(2):
        losses = [model(input_ids=ids, labels=ids).loss for model in (one, mine)]
        close("loss", losses[1], losses[0])
        for loss in losses:
            loss.backward()
        for path, whole in layers[0].items():
            shard = layers[1][path]
            gradients = shard.shard_of_adapter(
                *(p.grad for p in whole.adapter_parameters("default"))
            )
            for name, parameter, value in zip("AB", shard.adapter_parameters("default"), gradients):
                if value.numel():
                    close(f"{path}: d{name}", parameter.grad, value, 1e-4)
        norms = nn.utils.clip_grad_norm_(one.parameters(), 0.5), lkd.clip_grad_norm_(mine, 0.5)
        close("norm", norms[1], norms[0])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        close("logits", mine(ids).logits, one(ids).logits, 1e-4)
    mine.eval()
    tokens = [m.eval().generate(ids, max_new_tokens=4, do_sample=False) for m in (one, mine)]
    assert torch.equal(*tokens)


def check_docs(rank, size):
    """The blocks of distributed.md, on a model whose heads can be divided."""
    import markdown_blocks

    load = functools.partial(random_llama, 2 * size)
    names = markdown_blocks.run(
        "docs/distributed.md", {"load": load, "ids": torch.randint(0, 50, (2, 6))}
    )
    assert "model.layers.0.mlp.up_proj.weight.absmax" in names["full"]
    saved = [
        pathlib.Path(f"{kind}-adapter/adapter_model.safetensors") for kind in ("ddp", "fsdp", "tp")
    ]
    assert all(file.exists() for file in saved)
    dist.barrier()


# -- adapters --------------------------------------------------------------------------------------


def check_named_adapters(rank, size):
    for style, K, N in (("column", 96, 160), (lkd.Row(input_is_parallel=False), 160, 96)):
        one = layer(K, N)
        mine, x = parallel(one, style), torch.randn(4, K)
        for target in (one, mine):
            torch.manual_seed(9)
            target.add_adapter("b", r=2, init_lora_weights=False)
            target.set_adapter("b")
        for actual, value in zip(
            mine.adapter_parameters("b"), mine.shard_of_adapter(*one.adapter_parameters("b"))
        ):
            tolerance.assert_same_bits("b", actual, value)
            assert actual.requires_grad
        assert not any(p.requires_grad for p in mine.adapter_parameters("default"))
        outputs = mine.weight_cut if style == "column" else lkd.shards.Cut([N], 0)
        close("y", mine(x), outputs.own(one(x), 1))
        with one.disable_adapters(), mine.disable_adapters():
            close("base", mine(x), outputs.own(one(x), 1))
        for target in (one, mine):
            target.delete_adapter("b")
            target.set_adapter("elsewhere")
        close("base", mine(x), outputs.own(one(x), 1))
        assert mine.r == {"default": 3} and (mine.out_features, mine.in_features) == (N, K)
        assert f"({rank} of {size})" in repr(mine)


def check_adapter_files(rank, size):
    path = pathlib.Path("adapters")
    one = nn.ModuleDict({"up": layer(), "down": layer(160, 96, 1), "head": layer(96, 8)})
    mine = copy.deepcopy(one)
    lkd.parallelize(mine, {"up": "column", "down": "row"})
    with pytest.raises(
        RuntimeError, match="save_adapter: this process has only a part of the adapter"
    ):
        lk.save_adapter(mine, path / "parts")
    assert not (path / "parts").exists()
    lkd.save_adapter(mine, path / "whole")
    fresh = nn.ModuleDict({"up": layer(), "down": layer(160, 96, 1), "head": layer(96, 8)})
    lkd.parallelize(fresh, {"up": "column", "down": "row"})
    for name, loaded in (("default", one), ("more", one), ("default", fresh)):
        lk.load_adapter(loaded, path / "whole", name)
    for target in (one, fresh):
        for key in target:
            kept = mine[key].adapter_parameters("default")
            name = "more" if target is one else "default"
            parts = target[key].adapter_parameters(name)
            if target is one:
                parts = mine[key].shard_of_adapter(*parts)
            for actual, value in zip(parts, kept):
                tolerance.assert_same_bits(key, actual, value)
    dist.barrier()


# -- under PyTorch's machinery -----------------------------------------------------------------------


def check_machinery(rank, size):
    x = torch.randn(5, 96)
    for kind in ("gathered", "whole_x"):
        one = layer(lora_dropout=0.3)
        mine = parallel(one, STYLES[kind])
        with torch.autocast("cpu", BF16):
            y = mine.eval()(x)
        assert y.dtype == BF16
        tolerance.assert_same_bits("autocast", y, mine(x.to(BF16)))
        mine.train()
        other = copy.deepcopy(mine)
        assert other.place is mine.place
        other.load_state_dict(mine.state_dict())
        results = []
        for reentrant in (None, True, False):
            leaf = x.clone().requires_grad_()
            torch.manual_seed(rank)  # the mask is the first process's
            if reentrant is None:
                used, y = mine, mine(leaf)
            else:
                used, y = other, checkpoint(other, leaf, use_reentrant=reentrant)
            y.sum().backward()
            parts = [p.grad.clone() for p in used.parameters() if p.grad is not None]
            assert len(parts) == 3
            other.zero_grad()
            results.append((y.detach(), leaf.grad, *parts))
        for result in results[1:]:
            tolerance.assert_same_bits(kind, result, results[0])
        torch.manual_seed(0)
        close("y", results[0][0], one(x))
        mine.zero_grad()
        leaf = x.clone().requires_grad_()
        compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)
        y = compiled(leaf)
        y.sum().backward()
        parts = [p.grad for p in mine.parameters() if p.grad is not None]
        tolerance.assert_same_bits("compiled", (y, leaf.grad, *parts), results[0])
        (dx,) = torch.autograd.grad(mine(leaf).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|differentiate twice"):
            dx.sum().backward()


def check_what_stays(rank, size):
    one = layer().eval()
    one.bias.requires_grad_(False)
    model = nn.Sequential(one)
    calls = []
    handle = one.register_forward_hook(lambda *_: calls.append(1))
    lkd.parallelize(model, {"0": "column"})
    assert model[0] is one and not one.training and not one.bias.requires_grad
    one(torch.randn(2, 96))
    handle.remove()
    one(torch.randn(2, 96))
    assert calls == [1]


def check_int8(rank, size):
    if lk.backends.report()["int8"] is None:
        return
    one, x = layer(128, 160), torch.randn(6, 128)
    mine = parallel(one, STYLES["gathered"])
    with torch.no_grad(), lk.int8_activations():
        close("y", mine(x), one(x))
    with lk.int8_activations(), pytest.raises(RuntimeError, match="for inference only"):
        mine(x)


# -- errors ------------------------------------------------------------------------------------------


def check_errors(rank, size):
    def model():
        return nn.ModuleDict(
            {"a": layer(), "b": nn.Linear(4, 4), "c": layer(129, 96), "d": layer(96, 8)}
        )

    merged = model()
    merged["a"].merge()
    once = model()
    lkd.parallelize(once, {"a": "row"})
    mesh = init_device_mesh("cpu", (1, size))
    for arguments, error, message in [
        ((model(), {}), TypeError, "plan: expected a mapping"),
        ((model(), {"x": "row"}), ValueError, "plan: 'x' matches no module"),
        (
            (model(), {"a": "diagonal"}),
            ValueError,
            r"plan\['a'\]: expected 'column', 'row', 'experts', 'slices'",
        ),
        ((model(), {"a": lkd.Row(unit=0)}), ValueError, r"plan\['a'\]: unit: expected an integer"),
        (
            (model(), {"a": "row", "b": "row"}),
            TypeError,
            "b: expected a Linear4bit or LoRALinear4bit",
        ),
        ((model(), {"c": "row"}), ValueError, "c: .*columns can be cut only where K is a multiple"),
        (
            (model(), {"a": lkd.Row(unit=24)}),
            ValueError,
            "a: start, length: expected multiples of 32",
        ),
        ((model(), {"d": "column"}), ValueError, r"d: unit: expected at least \d units"),
        ((merged, {"a": "row"}), RuntimeError, "a: an adapter is merged; call unmerge"),
        ((once, {"a": "row"}), RuntimeError, "a: expected a whole layer, got one that is cut"),
        ((model(), {"a": "row"}, "tp"), TypeError, "group: expected a ProcessGroup, DeviceMesh or"),
        (
            (model(), {"a": "row"}, mesh),
            ValueError,
            "group: expected a DeviceMesh of one dimension",
        ),
    ]:
        with pytest.raises(error, match=message):
            lkd.parallelize(*arguments)
        assert arguments[0] is once or type(arguments[0]["a"]) is lk.LoRALinear4bit
    twice = nn.ModuleDict({"x": nn.ModuleDict({"a": layer()})})
    with pytest.raises(ValueError, match=r"plan: x.a matches both 'a' and 'x.a'"):
        lkd.parallelize(twice, {"a": "row", "x.a": "row"})
    mine = once["a"]
    for call, error, message in [
        (mine.merge, RuntimeError, "merge: not implemented for parallel layers"),
        (lambda: mine(torch.randn(2, 96)), ValueError, r"x: expected shape \[..., K\] with K = "),
        (
            lambda: mine(torch.ones(2, 5).tolist()),
            TypeError,
            "x: expected a torch.Tensor, got list",
        ),
        (lambda: type(mine)(4, 4), TypeError, "expected lowrank_kernels.distributed.parallelize"),
    ]:
        with pytest.raises(error, match=message):
            call()
    bank = lk.AdapterBank.for_model(once, num_pages=4)
    with bank.using(bank.plan([None], [2])):
        with pytest.raises(
            RuntimeError, match="AdapterBank is not implemented for parallel layers"
        ):
            mine(torch.randn(2, mine.weight_cut.size))
