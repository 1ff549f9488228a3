"""What test_fsdp.py runs in four processes: FSDP2 over tensor parallel layers."""

from __future__ import annotations

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowrank_kernels import distributed as lkd
from workers_data_parallel import batch, close, model


def check_fsdp_of_parallel_layers(rank, size):
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    mine, one, x = model(), model(), batch()
    lkd.parallelize(mine, {"up": "column", "down": "row"}, mesh["tp"])
    for block in mine[:2]:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(mine, mesh=mesh["dp"])
    part = mesh["dp"].get_local_rank()
    y, expected = mine(x.chunk(2)[part]), one(x)
    close("y", y, expected.chunk(2)[part])
    for output in (y, expected):
        output.square().mean().backward()
    for shard, whole in ((mine[0].up, one[0].up), (mine[1].down, one[1].down)):
        gradients = shard.shard_of_adapter(*(p.grad for p in whole.adapter_parameters("default")))
        for parameter, gradient in zip(shard.adapter_parameters("default"), gradients):
            close("gradient", parameter.grad.full_tensor(), gradient)
