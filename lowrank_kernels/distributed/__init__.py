"""Layers and experts in 4 bits among processes of torch.distributed; see docs/distributed.md."""

from .experts import DividedExperts4bit, SlicedExperts4bit
from .layers import ColumnParallelLoRALinear4bit, RowParallelLoRALinear4bit
from .parallelize import Column, Experts, Row, Slices, clip_grad_norm_, parallelize, save_adapter
from .shards import shard_sizes

__all__ = [
    "Column",
    "ColumnParallelLoRALinear4bit",
    "DividedExperts4bit",
    "Experts",
    "Row",
    "RowParallelLoRALinear4bit",
    "SlicedExperts4bit",
    "Slices",
    "clip_grad_norm_",
    "parallelize",
    "save_adapter",
    "shard_sizes",
]
