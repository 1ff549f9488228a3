"""``ModulePages``: the adapters of one module, in pages of ranks, as the kernels read them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import nn

from ..schema import ceil_div
from .plan import PageTable, Plan


class Owner(Protocol):
    """Whoever has the parameters of the adapters that live in a module's pages."""

    def adapter(self, slot: int) -> tuple[nn.Parameter, nn.Parameter]:
        """A ``[r, K]`` and B ``[N, r]`` of the adapter in ``slot``."""


class _Home(NamedTuple):
    """Where the parameters of an owner's adapter live: views of the pages, and their addresses."""

    A: torch.Tensor
    B: torch.Tensor
    addresses: tuple[int, int]


class ModulePages:
    """The pages of one module, ``bank[module_name]``: what :func:`multi_lora_` reads.

    ``A [pages, page_rank, K]`` and ``B [pages, page_rank, N]`` (transposed), and the tables of the module by slot.
    An adapter is copied into its pages by :meth:`fill`. Or it lives there, after :meth:`adopt`: the owner's
    parameters are views of the pages, so that what an optimizer writes needs no copying.
    """

    def __init__(
        self,
        table: PageTable,
        N: int,
        K: int,
        owner: Owner | None = None,
        routed: bool = False,
        parts: int = 1,
    ) -> None:
        """``routed``: the module's rows come in an order of their own, as those of an expert do.

        ``parts``: how many pages, and entries of the tables, the module has for each one: see experts.py.
        """
        self.table, self.shape, self.owner, self.routed = table, (N, K), owner, routed
        self.parts = parts
        num_pages, page_rank = table.num_pages * parts, table.page_rank
        options = {"dtype": table.dtype, "device": table.device}
        # Not initialised: no kernel reads past an adapter's rank.
        self.A = torch.empty(num_pages, page_rank, K, **options)
        self.B = torch.empty(num_pages, page_rank, N, **options)
        self.device = self.A.device
        self._ranks = [0] * table.num_pages
        self._dropout = [0.0] * table.num_pages
        self._tables = (
            torch.zeros(num_pages, dtype=torch.int32, device=table.device),
            torch.zeros(num_pages, dtype=torch.float32, device=table.device),
            torch.zeros(num_pages, dtype=torch.float64, device=table.device),
        )
        # The arguments PAGES of the operators but for the seed (see schema.py).
        self.args = (self.A, self.B, *self._tables)
        self.own: dict[int, _Home] = {}  # by slot
        self.moves: dict[int, int] = {}  # by slot: how often parameters were moved in
        self._residents: dict[int, tuple[weakref.ref, weakref.ref]] = {}
        self._grad_rows: dict[tuple[int, ...], torch.Tensor] = {}

    def op_args(self) -> tuple[torch.Tensor, ...]:
        """The arguments PAGES of the operators but for the seed (see schema.py)."""
        return self.args

    def rank(self, slot: int) -> int:
        return self._ranks[slot]

    def seed(self, plan: Plan) -> torch.Tensor | None:
        """A fresh key for the dropout of the plan's adapters (see functional.dropout_seed); None if none has any."""
        for slot in plan.slots:
            if self._dropout[slot]:
                return torch.randint(
                    -(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=self.device
                )
        return None

    def covers(self, plan: Plan) -> bool:
        """Whether an adapter of the plan changes this module's output."""
        return any(self._ranks[slot] for slot in plan.slots)

    def check_order(self, plan: Plan) -> None:
        """Raises ValueError where the plan cannot say which adapter the module's rows have."""
        if self.routed and self.covers(plan):
            raise ValueError(
                "plan: expected no adapter of routed experts: these layers see some rows of a batch, in an order of "
                "their own, which a plan does not know; run such a model with one active adapter, or load adapters "
                "that leave the experts out"
            )

    # -- what the pages hold -----------------------------------------------------------------------

    def describe(self, slot: int, rank: int, scaling: float, dropout_p: float) -> None:
        """What the adapter in ``slot`` is in this module; rank 0: it does not cover it."""
        self._ranks[slot], self._dropout[slot] = rank, dropout_p
        for table, value in zip(self._tables, (rank, scaling, dropout_p)):
            table[slot * self.parts : (slot + 1) * self.parts] = value
        self._grad_rows.clear()

    @torch.no_grad()
    def fill(self, pages: Sequence[int], A: torch.Tensor, B: torch.Tensor) -> None:
        """Copies an adapter into ``pages``."""
        rank, page_rank = A.shape[0], self.table.page_rank
        for i in range(ceil_div(rank, page_rank)):
            rows = slice(i * page_rank, min(rank, (i + 1) * page_rank))
            count = rows.stop - rows.start
            self.A[pages[i], :count].copy_(A[rows])
            self.B[pages[i], :count].copy_(B[:, rows].T)

    # -- adapters that live here -------------------------------------------------------------------

    def adopt(self, slot: int, first_page: int) -> None:
        """Has the owner's adapter of ``slot`` live in the adjacent pages from ``first_page`` on.

        Raises as :meth:`check_fits`.
        """
        N, K = self.shape
        first = first_page * self.table.page_rank
        rows = slice(first, first + self._ranks[slot])
        A, B = self.A.view(-1, K)[rows], self.B.view(-1, N)[rows].T
        self.own[slot] = _Home(A, B, (A.data_ptr(), B.data_ptr()))
        self._move_in(slot, *self.owner.adapter(slot))

    def release(self, slot: int) -> None:
        """Gives the parameters that live in the pages of ``slot`` memory of their own again."""
        home = self.own.pop(slot, None)
        if home is not None:
            self._move_out(slot, home)

    def check_fits(self, slot: int, A: torch.Tensor, B: torch.Tensor) -> None:
        """Raises RuntimeError if A and B cannot live in the pages of ``slot``, whose rank was described."""
        (N, K), rank = self.shape, self._ranks[slot] * self.parts
        for name, tensor, shape in (("A", A, (rank, K)), ("B", B, (N, rank))):
            expected = f"{name} of an adapter that lives in pages: expected a parameter"
            if type(tensor) is not nn.Parameter:
                raise RuntimeError(f"{expected}, got {type(tensor).__name__}")
            if tuple(tensor.shape) != shape:
                raise RuntimeError(
                    f"{expected} of shape {shape}, got {tuple(tensor.shape)}; evict the adapter and load it again"
                )
            if tensor.dtype != self.A.dtype or tensor.device != self.device:
                raise RuntimeError(
                    f"{expected} in {self.A.dtype} on {self.device} like the pages, got {tensor.dtype} on "
                    f"{tensor.device}; make a bank with this dtype, or load a copy of the adapter from a state dict"
                )

    @torch.no_grad()
    def _move_in(self, slot: int, A: nn.Parameter, B: nn.Parameter) -> None:
        self.check_fits(slot, A, B)
        home = self.own[slot]
        self._move_out(slot, home)
        for parameter, view in ((A, home.A), (B, home.B)):
            view.copy_(parameter)
            parameter.data = view
            _Resident(self, parameter).enter()
        self._residents[slot] = weakref.ref(A), weakref.ref(B)
        self.moves[slot] = self.moves.get(slot, 0) + 1

    def _move_out(self, slot: int, home: _Home) -> None:
        for reference, address in zip(self._residents.pop(slot, ()), home.addresses):
            parameter = reference()
            if parameter is not None and parameter.data_ptr() == address:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
                _Resident.leave(parameter)

    def parameters(self, plan: Plan) -> tuple[list[int], list[nn.Parameter]]:
        """Slots of the plan's adapters that live here, and A and B of each; none where no gradients are recorded.

        Parameters that were given other memory since the last time (by a cast, by ``.data``, by another parameter in
        their place) are moved in again. Raises RuntimeError if they do not fit.
        """
        slots: list[int] = []
        parameters: list[nn.Parameter] = []
        if not self.own:
            return slots, parameters
        compiling = (
            torch.compiler.is_compiling()
        )  # which knows no addresses: AdapterBank.using asked
        for slot in plan.slots:
            home = self.own.get(slot)
            if home is None:
                continue
            A, B = self.owner.adapter(slot)
            if not compiling and home.addresses != (A.data_ptr(), B.data_ptr()):
                self._move_in(slot, A, B)
            slots.append(slot)
            parameters += A, B
        return (slots, parameters) if torch.is_grad_enabled() else ([], [])

    def refresh(self, plan: Plan) -> None:
        """Has the pages hold the values that the plan's adapters that live here have now."""
        self.parameters(plan)

    def grad_layout(self, slots: tuple[int, ...]) -> tuple[dict[int, int], int]:
        """The first row of each slot's gradients among those of all ``slots``, and the number of rows."""
        first, rows = {}, 0
        for slot in slots:
            first[slot] = rows
            rows += self._ranks[slot] * self.parts
        return first, rows

    def gradients(
        self, slot: int, first: int, dA: torch.Tensor, dB: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of A and B of ``slot``, which begin in row ``first`` of all."""
        rows = slice(first, first + self._ranks[slot])
        return dA[rows], dB[rows].T

    def grad_rows(self, slots: tuple[int, ...]) -> torch.Tensor:
        """:meth:`grad_layout` as the operators take it."""
        if slots in self._grad_rows:
            return self._grad_rows[slots]
        rows = [-1] * (len(self._ranks) * self.parts)
        for slot, first in self.grad_layout(slots)[0].items():
            for part in range(self.parts):
                rows[slot * self.parts + part] = first + part * self._ranks[slot]
        made = torch.tensor(rows, dtype=torch.int32, device=self.device)
        if not torch.compiler.is_compiling():  # which may write to nothing in a backward
            self._grad_rows[slots] = made
        return made

    def __repr__(self) -> str:
        N, K = self.shape
        return f"ModulePages(N={N}, K={K}, {self.table.num_pages} pages)"


class _Resident:
    """Has a parameter that lives in pages copied and pickled as one with memory of its own.

    Otherwise its pickle would hold the pages of all adapters, and the copy of B be transposed.
    """

    def __init__(self, pages: ModulePages, parameter: nn.Parameter) -> None:
        self.pages, self.parameter = weakref.ref(pages), weakref.ref(parameter)

    def enter(self) -> None:
        parameter = self.parameter()
        # copy.deepcopy and pickle look for both on the object itself.
        parameter.__deepcopy__, parameter.__reduce_ex__ = self.deepcopy, self.reduce

    @staticmethod
    def leave(parameter: nn.Parameter) -> None:
        del parameter.__deepcopy__, parameter.__reduce_ex__

    def plain(self) -> nn.Parameter:
        parameter = self.parameter()
        data = parameter.detach().clone(memory_format=torch.contiguous_format)
        return nn.Parameter(data, parameter.requires_grad)

    def deepcopy(self, memo: dict) -> nn.Parameter:
        return memo.setdefault(id(self.parameter()), self.plain())

    def reduce(self, protocol: int) -> tuple:
        return self.plain().__reduce_ex__(protocol)


def home_of(parameter: nn.Parameter) -> ModulePages | None:
    """The pages that ``parameter`` lives in."""
    bound = parameter.__dict__.get("__reduce_ex__")
    pages = None if bound is None else bound.__self__.pages()
    if pages is None or all(
        parameter.data_ptr() not in home.addresses for home in pages.own.values()
    ):
        return None
    return pages


def save_plainly(module: nn.Module, state: dict, prefix: str, local_metadata: dict) -> None:
    """A state-dict hook: of A and B that live in pages the state dict has contiguous copies.

    safetensors refuses what is not contiguous or shares memory, and torch.save would save all pages.
    """
    for part in ("lora_A", "lora_B"):
        for name in getattr(module, part):
            key = f"{prefix}{part}.{name}.weight"
            tensor = state.get(key)
            if type(tensor) is not torch.Tensor or tensor.is_meta:  # with keep_vars: the parameter
                continue
            if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() > tensor.nbytes:
                state[key] = tensor.clone(memory_format=torch.contiguous_format)
