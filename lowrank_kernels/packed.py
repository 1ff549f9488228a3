"""``Params4bit``: the packed bytes of a 4-bit weight as a parameter that arithmetic cannot change.

Utilities that average, scale or cast the parameters of a model (an exponential moving average,
``torch.optim.swa_utils``, merging methods) do so with the bytes of a 4-bit weight as well, which mean nothing
as numbers. They reach them by ``detach()``, ``data`` or an arithmetic method of the parameter. All of these
lead to a :class:`PackedBytes`, which computes like a tensor but is only ever written whole packed bytes:

- ``copy_`` of bytes of the same dtype writes;
- arithmetic in place, and ``copy_`` of what was computed from packed bytes, write nothing. If all the bytes
  that were computed with equal those here, that is the right average; if not, it is a ValueError;
- everything else that would write is a TypeError.

Kernels get the parameter itself, whose functions torch calls without asking Python. So functions of torch (not
methods) that are given the parameters themselves, as ``torch._foreach_mul_(list(model.parameters()), 0.9)``, are
not seen. With ``quant_storage=torch.uint8`` torch refuses them, since the results are no integers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

_ARITHMETIC = frozenset(
    {
        "add", "sub", "subtract", "rsub", "__rsub__", "mul", "multiply", "div", "divide", "true_divide",
        "__rdiv__", "__rtruediv__", "lerp", "addcmul", "addcdiv", "neg",
    }
)  # fmt: skip
_CASTS = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as"})
_KEPT = frozenset({"detach", "clone", "view_as", "contiguous"})
# Methods that write no elements, or are about the whole tensor.
_NO_WRITES = frozenset(
    {"requires_grad_", "detach_", "share_memory_", "retain_grad_", "rename_", "resize_", "set_"}
)
_COMPILER = ("torch._functorch", "torch._dynamo", "torch._inductor", "torch._subclasses")
_OPERATORS = ("add", "sub", "mul", "truediv")
_HINT = "; leave 4-bit weights out, as (p for p in model.parameters() if p.requires_grad) does, or the layers dense"


class _Marked(torch.Tensor):
    """What has to do with packed bytes, for torch to ask :func:`_call` what a function does with it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _set_data(self, value)

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol: int):
        return plain(self).__reduce_ex__(protocol)  # files hold tensors of torch's own class


class PackedBytes(_Marked):
    """Packed bytes: ``detach()``, ``data`` or ``clone()`` of a :class:`Params4bit`."""


class PackedNumbers(_Marked):
    """Numbers that were computed from packed bytes, which are ``origins``."""

    origins: tuple[torch.Tensor, ...]


class Params4bit(nn.Parameter):
    """The packed bytes of a 4-bit weight, as a parameter that never requires a gradient.

    Arithmetic cannot change it (see :mod:`lowrank_kernels.packed`), and neither do casts.
    PEFT and accelerate know packed parameters by this class name: they then neither upcast a
    bfloat16 ``quant_storage`` (``prepare_model_for_kbit_training``) nor count two weights as one.
    """

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False):
        return torch.Tensor._make_subclass(cls, plain(data), False)

    @property
    def requires_grad(self) -> bool:
        """False. Setting it does nothing, so that a loop over all parameters passes over the packed bytes."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    def requires_grad_(self, requires_grad: bool = True):
        """Does nothing, so that ``model.requires_grad_(True)`` passes over the packed bytes."""
        return self

    def detach(self) -> torch.Tensor:
        return plain(self) if _asked_by_compiler() else plain(self).as_subclass(PackedBytes)

    def clone(self, *, memory_format: torch.memory_format = torch.preserve_format) -> PackedBytes:
        return plain(self).clone(memory_format=memory_format).as_subclass(PackedBytes)

    @property
    def data(self) -> torch.Tensor:
        return plain(self) if _asked_by_compiler() else plain(self).as_subclass(PackedBytes)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        _set_data(self, value)

    def to(self, *args, **kwargs):
        moved = super().to(*args, **kwargs)
        return self if moved is self else type(self)(moved)

    def __reduce_ex__(self, protocol):
        return type(self), (plain(self),)


def _through_bytes(name: str, in_place: bool) -> Callable:
    def method(self: Params4bit, *args, **kwargs):
        result = getattr(self.detach(), name)(*args, **kwargs)
        return self if in_place else result

    method.__name__ = name
    return method


for _name in ("add", "sub", "mul", "div", "lerp", "addcmul", "addcdiv"):
    setattr(Params4bit, _name, _through_bytes(_name, False))
    setattr(Params4bit, f"{_name}_", _through_bytes(f"{_name}_", True))
for _name in ("copy_", "zero_", "fill_", "normal_", "uniform_", "clamp_"):
    setattr(Params4bit, _name, _through_bytes(_name, True))
for _name in _OPERATORS:
    setattr(Params4bit, f"__{_name}__", _through_bytes(f"__{_name}__", False))
    setattr(Params4bit, f"__r{_name}__", _through_bytes(f"__r{_name}__", False))
    setattr(Params4bit, f"__i{_name}__", _through_bytes(f"__i{_name}__", True))


def _asked_by_compiler() -> bool:
    """Whether torch.compile asks, which writes to no parameter and compares classes with torch.Tensor itself."""
    module = sys._getframe(2).f_globals.get("__name__")
    return module is None or module.startswith(_COMPILER)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` detached, sharing its memory, of torch's own class where it is packed bytes."""
    if isinstance(tensor, Params4bit):
        return torch.Tensor.detach(tensor)
    if isinstance(tensor, _Marked):
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(torch.Tensor).detach()
    return tensor.detach()


# -- what a function of torch does with packed bytes -------------------------------------------------


def _call(func: Callable, args: tuple, kwargs: dict):
    name = func.__name__
    if name.startswith("_foreach_"):
        return _each(func, name, args, kwargs)
    in_place = name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES
    if in_place and isinstance(args[0], PackedBytes | Params4bit):
        return _write(name, args, kwargs)
    if name == "__setitem__" and isinstance(args[0], PackedBytes):
        raise _refused("a part of them")
    if name in _ARITHMETIC or in_place:
        return _compute(func, args, kwargs)
    result = func(*args, **kwargs)
    if name in _KEPT or name in _CASTS:
        return _marked(result, args[:1])
    return result


def _write(name: str, args: tuple, kwargs: dict) -> torch.Tensor:
    """A function that writes into packed bytes: only whole bytes are written."""
    target, *operands = args
    operands += kwargs.values()
    tensors = [t for t in operands if isinstance(t, torch.Tensor) and t.dim() > 0]
    if name == "copy_" and not any(isinstance(t, PackedNumbers) for t in tensors):
        (source,) = tensors or [None]
        if source is None or source.dtype != target.dtype or source.shape != target.shape:
            got = "a number" if source is None else f"{source.dtype} of {tuple(source.shape)}"
            raise _refused(got)
        plain(target).copy_(plain(source))
        return target
    if name.removesuffix("_") not in _ARITHMETIC | {"copy"}:
        raise _refused(f"the result of {name}")
    for tensor in tensors:
        _require_same(target, tensor)
    return target


def _require_same(target: torch.Tensor, operand: torch.Tensor) -> None:
    """What would be written was computed from the very bytes that are there."""
    if not isinstance(operand, _Marked | Params4bit):
        raise _refused(f"the result of arithmetic with {operand.dtype} of {tuple(operand.shape)}")
    for origin in _origins(operand):
        if not _same_bytes(plain(target), origin):
            raise ValueError(
                "packed bytes of two 4-bit weights differ, and an average of them means nothing"
                + _HINT
            )


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    return torch.equal(a.view(torch.uint8), b.to(a.device).view(torch.uint8))


def _origins(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.origins if isinstance(tensor, PackedNumbers) else (plain(tensor),)


def _marked(result: object, sources: Iterator | tuple) -> object:
    """``result`` as bytes, or as numbers computed from them."""
    if not isinstance(result, torch.Tensor) or isinstance(result, _Marked | Params4bit):
        return result
    origins = [o for t in sources if isinstance(t, _Marked | Params4bit) for o in _origins(t)]
    numbers = any(isinstance(t, PackedNumbers) for t in sources) or len(origins) > 1
    if not numbers and result.dtype == origins[0].dtype:
        return result.as_subclass(PackedBytes)
    made = result.as_subclass(PackedNumbers)
    made.origins = tuple(origins)
    return made


def _compute(func: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
    """Arithmetic as on any tensor. Bytes count as numbers, in float32 so that differences are not modulo 256."""
    if isinstance(kwargs.get("out"), PackedBytes | Params4bit):
        raise _refused(f"the result of {func.__name__}")
    result = func(*map(_number, args), **{key: _number(value) for key, value in kwargs.items()})
    if isinstance(result, _Marked):
        return result  # written in place
    made = result.as_subclass(PackedNumbers) if isinstance(result, torch.Tensor) else result
    sources = (t for t in (*args, *kwargs.values()) if isinstance(t, _Marked | Params4bit))
    made.origins = tuple(origin for t in sources for origin in _origins(t))
    return made


def _number(value: object) -> object:
    if isinstance(value, PackedBytes | Params4bit):
        value = plain(value)
        return value.float() if value.dtype == torch.uint8 else value
    return value


def _each(func: Callable, name: str, args: tuple, kwargs: dict):
    """A function of lists: what is packed one by one, everything else together."""
    count = len(args[0])

    def pick(value: object, indices: list[int]) -> object:
        per_tensor = isinstance(value, list | tuple) and len(value) == count
        return [value[i] for i in indices] if per_tensor else value

    def special(i: int) -> bool:
        lists = [value for value in args if isinstance(value, list | tuple) and len(value) == count]
        return any(isinstance(value[i], _Marked | Params4bit) for value in lists)

    def arguments(indices: list[int]) -> tuple[list, dict]:
        return [pick(v, indices) for v in args], {k: pick(v, indices) for k, v in kwargs.items()}

    results: dict[int, torch.Tensor] = {}
    rest = [i for i in range(count) if not special(i)]
    single = name.removeprefix("_foreach_")
    for i in set(range(count)) - set(rest):
        own, keywords = arguments([i])
        own = [value[0] if isinstance(value, list) else value for value in own]
        keywords = {k: v[0] if isinstance(v, list) else v for k, v in keywords.items()}
        if single.endswith("_") and isinstance(own[0], PackedBytes | Params4bit):
            _write(single, tuple(own), keywords)
        else:
            results[i] = _compute(getattr(torch.Tensor, single), tuple(own), keywords)
    if rest:
        own, keywords = arguments(rest)
        made = func(*own, **keywords)
        results.update(zip(rest, made) if made is not None else ())
    return None if single.endswith("_") else [results[i] for i in range(count)]


def _set_data(self: torch.Tensor, value: torch.Tensor) -> None:
    """``self.data = value``: bytes of the same dtype. A cast of the bytes is passed over, as ``.half()`` is."""
    raw = plain(value)
    if raw.dtype == self.dtype and not isinstance(value, PackedNumbers):
        with torch._C.DisableTorchFunctionSubclass():
            torch.Tensor.data.__set__(self, raw)
        return
    if raw.shape == self.shape and _same_bytes(plain(self), raw.to(self.dtype)):
        return
    if isinstance(value, PackedNumbers):
        _require_same(self, value)
        return
    raise _refused(f"{raw.dtype} of {tuple(raw.shape)}")


def _refused(got: str) -> TypeError:
    return TypeError(
        f"packed bytes of a 4-bit weight: expected whole bytes of the same dtype and shape to be written, got {got}"
        + _HINT
    )
