"""Tensor parallel 4-bit layers on torch.distributed; see docs/distributed.md."""

from .layers import ColumnParallelLoRALinear4bit, RowParallelLoRALinear4bit
from .parallelize import Column, Row, clip_grad_norm_, parallelize, save_adapter
from .shards import shard_sizes

__all__ = [
    "Column",
    "ColumnParallelLoRALinear4bit",
    "Row",
    "RowParallelLoRALinear4bit",
    "clip_grad_norm_",
    "parallelize",
    "save_adapter",
    "shard_sizes",
]
