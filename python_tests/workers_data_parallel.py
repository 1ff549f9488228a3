"""What test_fsdp.py runs in two processes, each with half of a batch: DDP and FSDP2 against one process."""

from __future__ import annotations

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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import lowrank_kernels as lk
from lowrank_kernels.nn import lora_layers
from tolerance import assert_same_bits

WIDTH, BATCH = 96, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 160), nn.Linear(160, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def model(storage: torch.dtype = torch.uint8, **arguments) -> nn.Sequential:
    """The same on all processes."""
    torch.manual_seed(1)
    blocks = nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 8))
    arguments = {
        "r": 4,
        "lora_alpha": 2,
        "init_lora_weights": False,
        "quant_storage": storage,
    } | arguments
    lk.replace_linear(blocks, progress=False, **arguments)
    return blocks


def shard(blocks: nn.Sequential, **options) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks[:2]:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(blocks, mesh=mesh, **options)


def batch() -> torch.Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(2))


def own(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    return x.chunk(size)[rank]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(name, actual, expected, tolerance=2e-5):
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error < tolerance, f"{name}: {float(error):.3g} of the largest"


def train(parallel: nn.Module, one: nn.Module, rank: int, size: int, steps: int = 2) -> None:
    """Outputs and gradients of each step are those of one process with the whole batch."""
    x = batch()
    optimizers = [torch.optim.SGD(trainable(m), lr=0.05) for m in (parallel, one)]
    for _ in range(steps):
        y, expected = parallel(own(x, rank, size)), one(x)
        close("y", y, own(expected, rank, size))
        for output in (y, expected):
            output.square().mean().backward()
        names = [name for name, p in one.named_parameters() if p.requires_grad]
        assert len(names) == 10  # A and B of five layers
        pairs = zip(names, trainable(parallel), trainable(one), strict=True)
        for name, actual, value in pairs:
            close(f"gradient of {name}", whole(actual.grad), value.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def same_state(actual: dict, expected: dict) -> None:
    """Packed bytes and statistics bit for bit; what was trained nearly."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if "lora" in key:
            close(key, actual[key], value, 1e-5)
        else:
            assert_same_bits(key, actual[key], value)


# -- DistributedDataParallel -----------------------------------------------------------------------


def check_ddp(rank, size):
    parallel, one = nn.parallel.DistributedDataParallel(model()), model()
    train(parallel, one, rank, size)
    same_state(parallel.module.state_dict(), one.state_dict())
    full = get_model_state_dict(parallel)
    assert full.keys() == one.state_dict().keys()


def check_ddp_takes_the_first_processes_bytes(rank, size):
    """DDP broadcasts parameters and buffers when it is made: also packed bytes and statistics."""
    mine = model()
    if rank:
        for layer in lora_layers(mine).values():
            layer.reset_parameters()
    parallel = nn.parallel.DistributedDataParallel(mine)
    same_state(parallel.module.state_dict(), model().state_dict())


# -- FSDP2 -----------------------------------------------------------------------------------------


def check_fsdp(rank, size):
    for storage in (torch.uint8, torch.bfloat16, torch.float32):
        parallel, one = shard(model(storage)), model(storage)
        up = parallel[0].up
        assert isinstance(up.weight, DTensor) and up.weight.dtype == storage
        assert 2 * up.weight.to_local().numel() == one[0].up.weight.numel()
        train(parallel, one, rank, size)
        full = get_model_state_dict(parallel, options=StateDictOptions(full_state_dict=True))
        same_state(full, one.state_dict())
        same_state({k: whole(v) for k, v in parallel.state_dict().items()}, one.state_dict())


def check_fsdp_of_peft(rank, size):
    """PEFT's adapters on Linear4bit, sharded by block."""
    peft = pytest.importorskip("peft", reason="PEFT's own adapters need peft")

    def adapted():
        config = peft.LoraConfig(
            r=4, lora_alpha=2, target_modules=["up", "down", "2"], init_lora_weights=False
        )
        base = model(r=0)
        base.requires_grad_(False)
        torch.manual_seed(6)
        return peft.get_peft_model(base, config)

    parallel, one = adapted(), adapted()
    shard(parallel.base_model.model)
    train(parallel, one, rank, size)
    full = get_model_state_dict(parallel, options=StateDictOptions(full_state_dict=True))
    same_state(full, one.state_dict())


def check_fsdp_of_single_layers(rank, size):
    parallel, one = model(), model()
    mesh = init_device_mesh("cpu", (size,))
    for block in parallel[:2]:
        fully_shard(block.up, mesh=mesh)
        fully_shard(block.down, mesh=mesh)
    train(fully_shard(parallel, mesh=mesh), one, rank, size)


def check_fsdp_state_dict_is_loaded(rank, size):
    x = batch()
    for storage in (torch.uint8, torch.bfloat16):
        source, parallel = model(storage), shard(model(storage))
        for layer in lora_layers(source).values():
            layer.reset_parameters()  # to the same on all processes
        expected, state = source(x), source.state_dict()
        for broadcast in (False, True):
            assert (parallel(x) - expected).abs().max() > 0.01
            parallel.reshard()  # after a forward without backward torch loads nothing into the root
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
            given = dict(state) if rank == 0 or not broadcast else statistics(state)
            set_model_state_dict(parallel, given, options=options)
            close("y", parallel(x), expected)
            parallel = shard(model(storage))


def statistics(state: dict) -> dict:
    """torch broadcasts parameters and buffers alone."""
    return {key: value for key, value in state.items() if ".weight." in key}


def check_fsdp_of_a_model_without_data(rank, size):
    """Meta tensors are sharded, allocated, and loaded from the first process."""
    state, x = model().state_dict(), batch()
    for to_empty in (True, False):
        with torch.device("meta"):
            parallel = model()
        shard(parallel)
        if to_empty:
            parallel.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(
            parallel, dict(state) if rank == 0 else statistics(state), options=options
        )
        close("y", parallel(x), model()(x))


def check_fsdp_moves(rank, size):
    for storage in (torch.uint8, torch.bfloat16):
        parallel, one = shard(model(storage)), model(storage)
        parallel.to(torch.float16)
        one.to(torch.float16)
        same_state({k: whole(v) for k, v in parallel.state_dict().items()}, one.state_dict())
        close("y", parallel(batch().half()), one(batch().half()), 1e-3)


def check_fsdp_mixed_precision(rank, size):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for storage in (torch.uint8, torch.bfloat16):
        parallel, one, x = (
            shard(model(storage), mp_policy=policy),
            model().to(torch.bfloat16),
            batch(),
        )
        y = parallel(x)
        assert y.dtype == torch.bfloat16
        close("y", y, one(x.bfloat16()), 0.02)
        y.float().square().mean().backward()
        assert {p.grad.dtype for p in trainable(parallel)} == {torch.float32}
    for storage in (torch.float16, torch.float32):
        with pytest.raises(ValueError, match=r"quant_storage=torch.uint8 is never cast"):
            shard(model(storage), mp_policy=policy)(batch())


def check_fsdp_saves_adapters(rank, size):
    parallel, fresh = shard(model()), model(init_lora_weights=True)
    with pytest.raises(RuntimeError, match="this process has only a part of the adapter"):
        lk.save_adapter(parallel, "adapter")
    lk.distributed.save_adapter(parallel, "adapter")
    lk.load_adapter(fresh, "adapter")
    same_state(fresh.state_dict(), model().state_dict())
    with pytest.raises(RuntimeError, match=r"0.up: expected a whole weight, got FSDP2's"):
        lk.distributed.parallelize(parallel, {"up": "column"})
    dist.barrier()


def check_fsdp_plain_load_is_refused(rank, size):
    parallel, state = shard(model()), model().state_dict()
    with pytest.raises(RuntimeError, match=r"0.up.weight: this layer is sharded: expected torch"):
        parallel.load_state_dict(state)
    parallel(batch())
