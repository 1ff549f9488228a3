"""``Linear4bit``: a frozen 4-bit linear layer that saves and loads bitsandbytes' keys."""

from __future__ import annotations

import torch
from torch import nn

from .formats import Weight4bit, quantize_4bit
from .frozen4bit import Frozen4bit
from .functional import linear, taken
from .packed import Params4bit
from .ragged import by_rows
from .shared_input import Operands, opened, shared_output


class Linear4bit(Frozen4bit, nn.Linear):
    """``y = x Wᵀ + bias`` with W ``[out_features, in_features]`` frozen in 4 bits.

    ``weight`` holds the packed bytes as bitsandbytes stores them (dtype ``quant_storage``,
    ``[n, 1]`` or ``[1, n]``); the statistics are non-persistent buffers. The state dict has
    bitsandbytes' keys: a checkpoint that bitsandbytes wrote loads with plain ``load_state_dict``,
    whatever its quant_type, blocksize or storage. A dense floating ``weight [N, K]`` loads too, and
    is quantized with this layer's settings. Casts (``.half()``, ``.to(dtype)``) touch only the
    bias.

    A fresh layer is initialised as nn.Linear and quantized; on ``device="meta"`` nothing is
    allocated. ``dtype`` (float32, bfloat16 or float16) is that of the weight before quantization.

    Raises TypeError for another dtype, ValueError for an unknown quant_type, blocksize or
    quant_storage. Source: QLoRA (Dettmers et al. 2023).

    Examples:
        >>> import torch, lowrank_kernels as lk
        >>> layer = lk.Linear4bit(64, 32, quant_type="nf4", blocksize=64)
        >>> layer(torch.randn(2, 64)).shape, layer.weight4bit.shape, layer.merged
        (torch.Size([2, 32]), torch.Size([32, 64]), False)
        >>> fresh = lk.Linear4bit(64, 32)
        >>> fresh.load_state_dict(layer.state_dict())
        <All keys matched successfully>
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        weight = quantize_4bit(self.weight, quant_type, blocksize, double_quant, quant_storage)
        self._setup(weight, self.bias)

    @classmethod
    def from_weight(cls, w: Weight4bit, bias: torch.Tensor | None = None) -> Linear4bit:
        """A layer around ``w`` (its tensors are shared, not copied) and ``bias [N]`` or None.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> w = lk.quantize_4bit(torch.randn(32, 64))
            >>> lk.Linear4bit.from_weight(w, torch.zeros(32))(torch.randn(2, 64)).shape
            torch.Size([2, 32])
        """
        if not isinstance(w, Weight4bit):
            raise TypeError(f"w: expected a Weight4bit (see quantize_4bit), got {type(w).__name__}")
        w.validate("w")
        if bias is not None and tuple(bias.shape) != (w.shape[0],):
            raise ValueError(f"bias: expected shape [N] = {(w.shape[0],)}, got {tuple(bias.shape)}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self._setup(w, bias)
        return self

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        quant_storage: torch.dtype = torch.uint8,
    ) -> Linear4bit:
        """``linear`` quantized: same device, bias (the same Parameter) and training mode.

        A ``Linear4bit`` keeps its bytes: its weight is shared, the quantization arguments do not
        apply. Raises TypeError if ``linear`` is no nn.Linear or its weight not float32, bfloat16 or
        float16; ValueError for a weight with a NaN or infinity.

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> linear = torch.nn.Linear(64, 32)
            >>> layer = lk.Linear4bit.from_linear(linear)
            >>> layer.bias is linear.bias, layer.quant_type
            (True, 'nf4')
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        if isinstance(linear, Linear4bit):
            weight = linear.weight4bit
        else:
            shape = (linear.out_features, linear.in_features)
            if tuple(linear.weight.shape) != shape:
                raise ValueError(
                    f"linear.weight: expected shape [out_features, in_features] = {shape}, "
                    f"got {tuple(linear.weight.shape)}"
                )
            weight = quantize_4bit(
                linear.weight, quant_type, blocksize, double_quant, quant_storage
            )
        return cls.from_weight(weight, linear.bias).train(linear.training)

    def _setup(self, w: Weight4bit, bias: nn.Parameter | None) -> None:
        self.out_features, self.in_features = w.shape
        super()._setup(w, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features] -> [..., out_features]`` in x's dtype; see :func:`linear_4bit`."""
        if getattr(x, "is_nested", False):
            return by_rows(self.forward, x)
        if opened.scopes and (y := shared_output(self, x)) is not None:
            return y
        w = self.weight4bit
        return linear(taken(x, w), w, self._parameters["bias"])

    def operands(self) -> Operands | None:
        """What the forward computes with, for layers that share their input (``replace_linear(fuse=True)``).

        Examples:
            >>> import torch, lowrank_kernels as lk
            >>> layer = lk.Linear4bit(64, 32)
            >>> layer.operands().w is layer.weight4bit
            True
        """
        return Operands(self.weight4bit, self._parameters["bias"])

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation, quantized with this layer's settings."""
        if not isinstance(self.weight, Params4bit):  # nn.Linear.__init__: nothing quantized yet
            return super().reset_parameters()
        w = self.weight4bit
        dense = nn.Linear(w.shape[1], w.shape[0], self.bias is not None, w.device, w.dtype)
        self._set_weight4bit(self._quantize_like(dense.weight, w))
        if self.bias is not None:
            self.bias.data.copy_(dense.bias)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, quant_type={self.quant_type}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}, dtype={self._weight4bit.dtype}"
        )
