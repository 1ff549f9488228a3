"""What test_experts_parallel.py runs in two processes: experts among processes against one process."""

from __future__ import annotations

import copy
import importlib
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lowrank_kernels as lk
import tolerance
from lowrank_kernels import distributed as lkd
from lowrank_kernels.distributed.shards import Cut
from lowrank_kernels.experts import Experts4bit, GroupedLinear4bit
from tiny_experts import BOTH, TOKENS, adapted, logits, pair, stacks
from workers_data_parallel import close

STYLES = ("experts", "slices")
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss")


def parallel(model: nn.Module, style, key: str = "mlp.experts") -> nn.Module:
    """A copy, cut."""
    mine = copy.deepcopy(model)
    assert lkd.parallelize(mine, {key: style})
    return mine


def experts_of(model: nn.Module) -> Experts4bit:
    return model.model.layers[0].mlp.experts


def example(E: int, rows: int = 11, hidden: int = 64) -> tuple[torch.Tensor, ...]:
    """Tokens, indices (one expert twice for a token) and weights."""
    index = torch.stack([torch.randperm(E)[:2] for _ in range(rows)])
    index[1] = index[1, 0]
    return torch.randn(rows, hidden), index, torch.rand(rows, 2)


# -- a module ------------------------------------------------------------------------------------------


def outputs_and_gradients(experts: nn.Module, x, index, weights) -> dict[str, torch.Tensor]:
    """y, gradients of x and of the routing weights, and those of all parameters."""
    experts.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = experts(x, index, weights)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
    found = {"y": y.detach(), "dx": x.grad, "dweights": weights.grad}
    return found | {n: p.grad for n, p in experts.named_parameters() if p.grad is not None}


def part_of(mine: Experts4bit, name: str, whole: torch.Tensor) -> torch.Tensor:
    """This process's part of a gradient of the whole module."""
    stack, _, rest = name.partition(".lora_")
    if rest:
        part = rest[0]
        layer = mine.stacks[stack]
        E, r = layer.num_experts, layer.r["default"]
        A, B = torch.zeros(r * E, layer.in_features), torch.zeros(layer.out_features, r * E)
        pair = (whole, B) if part == "A" else (A, whole)
        return layer.shard_of_adapter(*pair)[part == "B"]
    if name.endswith("_bias") and isinstance(mine, lkd.DividedExperts4bit):
        return mine.cut.own(whole, 0)
    if name == "gate_up_proj_bias":
        return whole[:, mine.stacks["gate_up_proj"].rows(mine.cut)]
    return whole


def same_as_one(one: Experts4bit, mine: Experts4bit, case, c: float = 2e-6) -> None:
    expected, actual = (outputs_and_gradients(m, *case) for m in (one, mine))
    assert expected.keys() == actual.keys()
    assert any("lora_A" in name for name in actual)
    for name, value in actual.items():
        close(name, value, part_of(mine, name, expected[name]), c)


def check_modules(rank, size):
    """Outputs and all gradients, biases included, of three families and both styles."""
    for family in FAMILIES:
        one = experts_of(adapted(family, BOTH, r=4))
        one.requires_grad_(True)
        E = next(iter(one.stacks.values())).num_experts
        for style in STYLES:
            mine = copy.deepcopy(one)
            lkd.parallelize(nn.ModuleDict({"experts": mine}), {"experts": style})
            same_as_one(one, mine, example(E))


def check_weights_are_exact_parts(rank, size):
    for family in FAMILIES:
        one = experts_of(adapted(family, BOTH))
        wholes = {name: stack.dequantize(torch.float32) for name, stack in one.stacks.items()}
        for style in STYLES:
            mine = copy.deepcopy(one)
            lkd.parallelize(nn.ModuleDict({"experts": mine}), {"experts": style})
            for name, stack in mine.stacks.items():
                W = wholes[name]
                if style == "experts":
                    expected = mine.cut.own(W, 0)
                elif name == "down_proj":
                    expected = mine.cut.own(W, 1 if stack.transposed else 2)
                else:
                    expected = W.index_select(2 if stack.transposed else 1, stack.rows(mine.cut))
                part = stack.dequantize(torch.float32)
                tolerance.assert_same_bits(f"{family}: {name}", part, expected)
                assert stack.weight.numel() * size == one.stacks[name].weight.numel()


def check_a_row_of_one_process_keeps_its_bits(rank, size):
    for family in FAMILIES:
        one = experts_of(adapted(family, BOTH))
        mine = copy.deepcopy(one)
        lkd.parallelize(nn.ModuleDict({"experts": mine}), {"experts": "experts"})
        x, _, weights = example(4)
        cut = mine.cut
        first = torch.arange(x.shape[0]) % size  # the process whose experts a token takes
        start = torch.tensor([Cut(cut.sizes, p).first for p in range(size)])[first]
        index = torch.stack((start, start + 1), 1)
        with torch.no_grad(), lk.batch_invariant():
            tolerance.assert_same_bits("y", mine(x, index, weights), one(x, index, weights))


def check_uneven_parts(rank, size):
    """Five experts among two processes; 96 features are 64 and 32; indices of E and more add nothing."""
    from transformers.models.qwen3_moe import configuration_qwen3_moe, modeling_qwen3_moe

    config = configuration_qwen3_moe.Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=96, num_experts=5
    )
    torch.manual_seed(2)
    whole = modeling_qwen3_moe.Qwen3MoeExperts(config)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.1)
    for arguments in ({}, {"quant_type": "int4", "blocksize": 128, "double_quant": False}):
        one = Experts4bit.from_experts(whole, **arguments)
        for stack in one.stacks.values():
            stack.add_adapter("default", r=3, init_lora_weights=False)
        x, index, weights = example(5)
        index[3], index[4, 1] = 5, 7
        for style, sizes in (("experts", [3, 2]), ("slices", [64, 32])):
            mine = copy.deepcopy(one)
            lkd.parallelize(nn.ModuleDict({"experts": mine}), {"experts": style})
            assert mine.cut.sizes == sizes and mine.cut.rank == rank
            same_as_one(one, mine, (x, index, weights))
            assert not mine(x, index, weights)[3].any()
            nobody = torch.full_like(index, 5)
            assert not mine(x, nobody, weights).any()
            assert mine(x[:0], index[:0], weights[:0]).shape == (0, 64)


def check_other_families(rank, size):
    """No gate; a transposed [gate; up]; a norm after each expert, whose gradient comes from all processes."""
    families = {
        "aria": (
            "AriaExperts",
            "AriaTextConfig",
            {"hidden_size": 64, "moe_num_experts": 4, "intermediate_size": 64},
        ),
        "muse_spark": (
            "MuseSparkExperts",
            "MuseSparkTextConfig",
            {"moe_hidden_size": 64, "num_local_experts": 4, "moe_intermediate_size": 64},
        ),
        "nemotron_h": (
            "NemotronHExperts",
            "NemotronHConfig",
            {
                "hidden_size": 64,
                "n_routed_experts": 4,
                "moe_intermediate_size": 64,
                "moe_latent_size": None,
            },
        ),
    }
    for family, (name, config, sizes) in families.items():
        module = f"transformers.models.{family}"
        try:
            modeling = importlib.import_module(f"{module}.modeling_{family}")
        except ImportError:  # of newer transformers
            continue
        config = getattr(importlib.import_module(f"{module}.configuration_{family}"), config)
        torch.manual_seed(2)
        whole = getattr(modeling, name)(config(**sizes))
        for parameter in whole.parameters():
            nn.init.normal_(parameter, std=0.1)
        one = Experts4bit.from_experts(whole)
        for stack in one.stacks.values():
            stack.add_adapter("default", r=4, init_lora_weights=False)
        for style in STYLES:
            mine = copy.deepcopy(one)
            lkd.parallelize(nn.ModuleDict({"experts": mine}), {"experts": style})
            same_as_one(one, mine, example(4), 2e-5 if one.has_post_expert_norm else 2e-6)


def check_sixteen_bits(rank, size):
    """Each process rounds its sum, and the sum over processes is rounded again."""
    one = experts_of(adapted("gpt_oss", BOTH)).to(torch.bfloat16)
    x, index, weights = (t.bfloat16() if t.is_floating_point() else t for t in example(4))
    for style in STYLES:
        mine = copy.deepcopy(one)
        lkd.parallelize(nn.ModuleDict({"experts": mine}), {"experts": style})
        assert mine(x, index, weights).dtype == torch.bfloat16
        same_as_one(one, mine, (x, index, weights), 2.0**-6)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert mine(x.float(), index, weights).dtype == torch.float32


# -- a model -------------------------------------------------------------------------------------------


def check_models_train(rank, size):
    """Loss, norm of the gradients and two steps of AdamW on adapters, routers and all that is not frozen."""
    for family in FAMILIES:
        for style in STYLES:
            one = adapted(family, BOTH, r=4).train()
            mine = parallel(one, style)
            optimizers = []
            for model in (one, mine):
                parameters = [p for p in model.parameters() if p.requires_grad]
                optimizers.append(torch.optim.AdamW(parameters, 1e-3))
            for _ in range(2):
                losses = [m(input_ids=TOKENS, labels=TOKENS).loss for m in (one, mine)]
                close("loss", losses[1].detach(), losses[0].detach())
                for loss in losses:
                    loss.backward()
                router = "model.layers.0.mlp.gate.weight"
                if family != "gpt_oss" and one.get_parameter(router).grad is not None:
                    close("router", mine.get_parameter(router).grad, one.get_parameter(router).grad)
                norms = (
                    nn.utils.clip_grad_norm_(one.parameters(), 0.5),
                    lkd.clip_grad_norm_(mine, 0.5),
                )
                close("norm", norms[1], norms[0])
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            with torch.no_grad():
                close("logits", logits(mine.eval()), logits(one.eval()), 1e-4)
            tokens = [
                m.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
                for m in (one, mine)
            ]
            assert torch.equal(*tokens)


def check_with_parallel_attention(rank, size):
    """Attention and experts cut by one plan, checkpointed."""
    one = adapted("qwen3_moe", [*BOTH])
    plan = {"q_proj": lkd.Column(unit=32), "k_proj": lkd.Column(unit=16)}
    plan |= {"v_proj": lkd.Column(unit=16), "o_proj": lkd.Row(unit=32), "mlp.experts": "slices"}
    mine = copy.deepcopy(one)
    for model in (one, mine):
        model.train()
        model.gradient_checkpointing_enable()
    paths = lkd.parallelize(mine, plan)
    assert len(paths) == 10 and "model.layers.1.mlp.experts" in paths
    results = [m(input_ids=TOKENS, labels=TOKENS).loss for m in (one, mine)]
    close("loss", results[1].detach(), results[0].detach())
    for loss in results:
        loss.backward()
    norms = nn.utils.clip_grad_norm_(one.parameters(), 1e3), lkd.clip_grad_norm_(mine, 1e3)
    close("norm", norms[1], norms[0])


# -- adapters ------------------------------------------------------------------------------------------


def check_adapter_files(rank, size):
    for family in FAMILIES:
        one = adapted(family, BOTH, r=4)
        for style in STYLES:
            path = pathlib.Path(f"{family}-{style}")
            mine = parallel(one, style)
            with pytest.raises(RuntimeError, match="save_adapter: this process has only a part"):
                lk.save_adapter(mine, path / "parts")
            lkd.save_adapter(mine, path)
            whole = adapted(family, BOTH, r=4, seed=7)
            lk.load_adapter(whole, path)
            for key, stack in stacks(one).items():
                for actual, value in zip(
                    stacks(whole)[key].adapter_parameters("default"),
                    stack.adapter_parameters("default"),
                    strict=True,
                ):
                    tolerance.assert_same_bits(key, actual, value)
            again = parallel(adapted(family, BOTH, r=4, seed=8), style)
            lk.load_adapter(again, path)
            lk.load_adapter(again, path, "more")
            assert stacks(again).keys() == stacks(mine).keys()
            with torch.no_grad():
                tolerance.assert_same_bits("logits", logits(again), logits(mine))
            dist.barrier()


def check_named_adapters(rank, size):
    for style in STYLES:
        one = adapted("mixtral", BOTH)
        mine = parallel(one, style)
        for model in (one, mine):
            torch.manual_seed(9)
            for stack in stacks(model).values():
                stack.add_adapter("b", r=2, init_lora_weights=False)
                stack.set_adapter("b")
        for key, stack in stacks(mine).items():
            parts = stack.shard_of_adapter(*stacks(one)[key].adapter_parameters("b"))
            for actual, value in zip(stack.adapter_parameters("b"), parts, strict=True):
                tolerance.assert_same_bits(key, actual, value)
                assert actual.requires_grad
            assert not any(p.requires_grad for p in stack.adapter_parameters("default"))
            assert f"({rank} of {size})" in repr(stack)
        with torch.no_grad():
            close("b", logits(mine), logits(one), 1e-5)
            for model in (one, mine):
                for stack in stacks(model).values():
                    stack.delete_adapter("b")
                    stack.set_adapter("nowhere")
            close("base", logits(mine), logits(one), 1e-5)


# -- under PyTorch's machinery -------------------------------------------------------------------------


def check_machinery(rank, size):
    for style in STYLES:
        one = experts_of(adapted("gpt_oss", BOTH))
        mine = copy.deepcopy(one)
        lkd.parallelize(nn.ModuleDict({"experts": mine}), {"experts": style})
        case = example(4)
        expected = outputs_and_gradients(mine, *case)
        other = copy.deepcopy(mine)
        assert other.place is mine.place and type(other) is type(mine)
        other.load_state_dict(mine.state_dict())
        compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
        for name, run in (("copy", other), ("compiled", compiled)):
            for key, value in outputs_and_gradients(run, *case).items():
                key = key.removeprefix("_orig_mod.")
                close(f"{name}: {key}", value, expected[key], 1e-6)
        (dx,) = torch.autograd.grad(
            mine(case[0].requires_grad_(), *case[1:]).square().sum(), case[0], create_graph=True
        )
        with pytest.raises(RuntimeError, match=r"once_differentiable|differentiate twice"):
            dx.sum().backward()


# -- errors --------------------------------------------------------------------------------------------


def check_errors(rank, size):
    def model():
        return adapted("qwen3_moe", BOTH)

    merged, once = model(), model()
    stacks(merged)["model.layers.0.mlp.experts.down_proj"].merge()
    lkd.parallelize(once, {"experts": "experts"})
    replaced = model()
    experts_of(replaced).forward = lambda *arguments: None
    for arguments, error, message in [
        ((model(), {"experts": "row"}), TypeError, "experts: expected a Linear4bit or LoRALinear4"),
        ((model(), {"q_proj": "experts"}), TypeError, "q_proj: expected an Experts4bit .see repl"),
        ((model(), {"gate_up_proj": "column"}), ValueError, "'gate_up_proj' matches no module of"),
        ((model(), {"experts": lkd.Slices(unit=0)}), ValueError, r"plan\['experts'\]: unit: expec"),
        ((model(), {"experts": lkd.Slices(unit=33)}), ValueError, "experts: start, length: expect"),
        ((model(), {"experts": lkd.Slices(unit=64)}), ValueError, "experts: unit: expected at lea"),
        ((merged, {"experts": "experts"}), RuntimeError, "experts: an adapter is merged; call unm"),
        (
            (once, {"experts": "slices"}),
            RuntimeError,
            "experts: expected a whole layer, got one th",
        ),
        ((replaced, {"experts": "slices"}), RuntimeError, "experts: expected the forward of its c"),
    ]:
        with pytest.raises(error, match=message):
            lkd.parallelize(*arguments)
        whole = [
            stack for stack in stacks(arguments[0]).values() if type(stack) is GroupedLinear4bit
        ]
        assert len(whole) == (0 if arguments[0] is once else 4)
    part = experts_of(once)
    bank = lk.AdapterBank.for_model(once, num_pages=4, target_parameters=BOTH)
    for call, error, message in [
        (part.dequantized, RuntimeError, "dequantized: not implemented for parallel experts"),
        (part.down_proj.merge, RuntimeError, "merge: not implemented for parallel layers"),
        (lambda: type(part.down_proj)(), TypeError, "expected lowrank_kernels.distributed.paralle"),
    ]:
        with pytest.raises(error, match=message):
            call()
    with bank.using(bank.plan([None], [TOKENS.numel()])):
        with pytest.raises(RuntimeError, match="AdapterBank is not implemented for parallel lay"):
            logits(once)


def check_more_processes_than_experts(rank, size):
    one, twin = map(experts_of, pair("mixtral"))
    few = Experts4bit.from_weights(
        twin, {name: stack.weight4bit.narrow(0, 0, 1) for name, stack in one.stacks.items()}
    )
    with pytest.raises(ValueError, match="experts: experts: expected at least 2 experts, one for"):
        lkd.parallelize(nn.ModuleDict({"experts": few}), {"experts": "experts"})
    x, _, weights = example(2)
    mine = copy.deepcopy(few)
    lkd.parallelize(nn.ModuleDict({"experts": mine}), {"experts": "slices"})
    index = torch.zeros_like(weights).long()
    close("y", mine(x, index, weights), few(x, index, weights), 2e-6)
