"""What test_experts_parallel.py runs in two processes: DDP, FSDP2, PEFT, transformers' plans and experts in 4 bits."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import lowrank_kernels as lk
import tolerance
from lowrank_kernels import distributed as lkd
from tiny_experts import BOTH, TOKENS, adapted, dense, logits, pair, randomize, stacks
from workers_data_parallel import close, same_state, trainable, whole

FAMILIES = ("qwen3_moe", "gpt_oss")


def frozen_but_adapters(family: str, **arguments) -> nn.Module:
    """The same on all processes, its adapters alone trained, so that gradients of a batch's halves average."""
    model = adapted(family, BOTH, **arguments)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def put_other_weights(model: nn.Module) -> None:
    for stack in stacks(model).values():
        W = torch.randn(stack.weight4bit.shape, generator=torch.Generator().manual_seed(1))
        stack._set_weight4bit(lk.quantize_4bit(0.1 * W))


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(parallel: nn.Module, one: nn.Module, rank: int, size: int, steps: int = 2) -> None:
    """Outputs and gradients of each step are those of one process with the whole batch."""
    optimizers = [torch.optim.SGD(trainable(m), lr=0.05) for m in (parallel, one)]
    for _ in range(steps):
        own = TOKENS.chunk(size)[rank]
        y, expected = logits(parallel, own), logits(one)
        close("y", y.detach(), expected.detach().chunk(size)[rank], 1e-4)
        for output in (y, expected):
            output.square().mean().backward()
        names = [name for name, p in one.named_parameters() if p.requires_grad]
        for name, actual, value in zip(names, trainable(parallel), trainable(one), strict=True):
            close(f"gradient of {name}", whole(actual.grad), value.grad, 1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def check_ddp(rank, size):
    for family in FAMILIES:
        one, mine = frozen_but_adapters(family), frozen_but_adapters(family)
        if rank:  # DDP hands the first process's bytes to all
            put_other_weights(mine)
        parallel = nn.parallel.DistributedDataParallel(mine)
        train(parallel, one, rank, size)
        same_state(parallel.module.state_dict(), one.state_dict())
        assert get_model_state_dict(parallel).keys() == one.state_dict().keys()


def check_fsdp(rank, size):
    for family in FAMILIES:
        parallel, one = shard(frozen_but_adapters(family)), frozen_but_adapters(family)
        key, stack = next(iter(stacks(parallel).items()))
        assert isinstance(stack.weight, DTensor) and stack.weight.dtype == torch.uint8
        assert 2 * stack.weight.to_local().numel() == stacks(one)[key].weight.numel()
        train(parallel, one, rank, size)
        full = get_model_state_dict(parallel, options=StateDictOptions(full_state_dict=True))
        same_state(full, one.state_dict())
        same_state({k: whole(v) for k, v in parallel.state_dict().items()}, one.state_dict())


def check_fsdp_state_dict_is_loaded(rank, size):
    """Whole from every process, or in parts; not broadcast, and not plainly."""
    source, options = frozen_but_adapters("gpt_oss", seed=5), StateDictOptions(full_state_dict=True)
    put_other_weights(source)
    expected, state = logits(source).detach(), source.state_dict()
    parts = shard(frozen_but_adapters("gpt_oss"))
    set_model_state_dict(parts, dict(state), options=options)
    close("whole", logits(parts).detach(), expected)
    parts.reshard()
    again = shard(frozen_but_adapters("gpt_oss"))
    set_model_state_dict(again, get_model_state_dict(parts))
    close("parts", logits(again).detach(), expected)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for load in (
        lambda model: set_model_state_dict(
            model, dict(state) if rank == 0 else {}, options=broadcast
        ),
        lambda model: model.load_state_dict(state),
    ):
        with pytest.raises(
            RuntimeError, match=r"this layer is sharded: expected torch.distributed"
        ):
            load(shard(frozen_but_adapters("gpt_oss")))


def check_fsdp_saves_adapters(rank, size):
    parallel, fresh = shard(frozen_but_adapters("gpt_oss")), frozen_but_adapters("gpt_oss", seed=3)
    with pytest.raises(RuntimeError, match="this process has only a part of the adapter"):
        lk.save_adapter(parallel, "adapter")
    lkd.save_adapter(parallel, "adapter")
    lk.load_adapter(fresh, "adapter")
    same_state(fresh.state_dict(), frozen_but_adapters("gpt_oss").state_dict())
    with pytest.raises(RuntimeError, match=r"experts: expected a whole weight, got FSDP2's"):
        lkd.parallelize(parallel, {"mlp.experts": "experts"})
    dist.barrier()


def check_fsdp_of_peft(rank, size):
    peft = pytest.importorskip("peft", reason="PEFT's own adapters need peft")

    def model():
        base = pair("gpt_oss")[0].requires_grad_(False)
        config = peft.LoraConfig(r=4, target_parameters=BOTH, init_lora_weights=False)
        return randomize(peft.get_peft_model(base, config))

    parallel, one = model(), model()
    shard(parallel.base_model.model)
    train(parallel, one, rank, size)
    full = get_model_state_dict(parallel, options=StateDictOptions(full_state_dict=True))
    same_state(full, one.state_dict())


def check_peft(rank, size):
    """PEFT's own adapters are not cut, and none are put on parts of experts."""
    peft = pytest.importorskip("peft", reason="PEFT's own adapters need peft")
    config = peft.LoraConfig(r=4, target_parameters=["mlp.experts.down_proj"])
    linear = peft.LoraConfig(r=4, target_modules=["q_proj"])
    for key, style, targets in (("mlp.experts", "experts", config), ("q_proj", "column", linear)):
        wrapped = peft.get_peft_model(pair("mixtral")[0], targets)
        with pytest.raises(TypeError, match=f"{key}: expected a layer without PEFT's adapters"):
            lkd.parallelize(wrapped, {key: style})
    for style in ("experts", "slices"):
        mine = pair("mixtral")[0]
        lkd.parallelize(mine, {"mlp.experts": style})
        with pytest.raises(RuntimeError, match="PEFT's own adapters are not implemented for para"):
            logits(peft.get_peft_model(mine, config))


def check_transformers_plans(rank, size):
    """from_pretrained under a distributed_config is refused by name; a plan on experts in 4 bits divides nothing."""
    import transformers

    try:
        from transformers.distributed.configuration_utils import DistributedConfig
        from transformers.distributed.expert_parallel import apply_expert_parallelism
    except ImportError:  # of newer transformers
        return
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(size)}
    path = pathlib.Path("model")
    if rank == 0:
        dense("qwen3_moe").save_pretrained(path)
    dist.barrier()
    load = transformers.AutoModelForCausalLM.from_pretrained
    for sizes in ({"tp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"fsdp_size": 2}):
        asked = DistributedConfig(**sizes)
        with pytest.raises(ValueError, match="distributed_config: expected none for weights in 4"):
            load(path, quantization_config=lk.LowRankConfig(), distributed_config=asked)
        cut = load(path, distributed_config=asked)
        with pytest.raises(ValueError, match=r"mlp.experts: .*(is a DTensor|been replaced)"):
            lk.replace_linear(cut, target_modules=["mlp.experts"], progress=False)
    mesh, model = init_device_mesh("cpu", (size,)), pair("qwen3_moe")[0]
    expected = logits(model).detach()
    styles = {"": "ep_dispatch_experts", ".gate_up_proj": "grouped_gemm"}
    styles |= {".down_proj": "grouped_gemm"}
    plan = {f"model.layers.{i}.mlp.experts{k}": v for i in (0, 1) for k, v in styles.items()}
    apply_expert_parallelism(model, mesh, mesh, plan, "all_reduce")
    tolerance.assert_same_bits("logits", logits(model).detach(), expected)
