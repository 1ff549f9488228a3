"""The public functions around the operators: errors, shapes, autocast, autograd, torch.compile."""

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import cases
import lowrank_kernels as lk
import tolerance

OPS = ["linear_4bit", "lora_linear_4bit", "lora_linear"]
LORA = OPS[1:]
M, N, K, R = 5, 24, 64, 4
CASE = cases.Case(M, N, K, R=R, bias=cases.F32)
each_op = pytest.mark.parametrize("op", OPS)


def keywords(op):
    """Good arguments by name."""
    named = {"x": torch.randn(M, K), "bias": torch.randn(N)}
    if op == "lora_linear":
        named["weight"] = torch.randn(N, K)
    else:
        named["w"] = lk.quantize_4bit(torch.randn(N, K))
    if op != "linear_4bit":
        named |= {"A": torch.randn(R, K), "B": torch.randn(N, R), "scaling": 2.0, "dropout_p": 0.0}
    return named


# -- errors ----------------------------------------------------------------------------------------

BAD_TENSOR = [None, 1.0, [[1.0]], "x"]
BAD_DTYPE = [torch.float64, torch.int8, torch.bool, torch.complex64]
# argument: (good shape, bad shapes, words that stand for the good shape)
SHAPES = {
    "x": ((M, K), [(), (K + 1,), (M, K - 1), (K, M)], f"x: expected shape [..., K] with K = {K}"),
    "bias": ((N,), [(), (N + 1,), (1,), (N, 1), (1, N)], f"bias: expected shape [N] = ({N},)"),
    "A": ((R, K), [(), (K,), (R, K + 1), (K, R), (0, K), (1, R, K)], "A: expected shape [R, K]"),
    "B": ((N, R), [(), (N,), (N, R + 1), (R, N), (N, 0), (1, N, R)], "B: expected shape [N, R]"),
    "weight": ((N, K), [(), (K,), (1, N, K)], "weight: expected a matrix [N, K]"),
}
BAD = [
    *((name, value, TypeError, f"{name}: expected a torch.Tensor, got ")
      for name in SHAPES for value in BAD_TENSOR if (name, value) != ("bias", None)),
    *((name, torch.zeros(SHAPES[name][0], dtype=dtype), TypeError,
       f"{name}: expected float32, bfloat16 or float16, got {dtype}")
      for name in SHAPES for dtype in BAD_DTYPE),
    *((name, torch.zeros(shape), ValueError, words)
      for name, (_, shapes, words) in SHAPES.items() for shape in shapes),
    *((name, torch.zeros(shape, device="meta"), ValueError, " on meta")
      for name, (shape, _, _) in SHAPES.items()),
    *(("w", value, TypeError, "w: expected a Weight4bit (see quantize_4bit), got ")
      for value in (None, torch.zeros(N, K), torch.zeros(N, K).char(), {})),
    ("w", lk.Weight4bit(*[torch.empty(0, device="meta")] * 3, torch.Size((N, K)), torch.float32, "nf4", 64),
     ValueError, "weight: expected one on cpu like x, got one on meta"),
    *(("scaling", value, TypeError, "scaling: expected a number, got ")
      for value in (None, "2", torch.ones(1), [2.0], 1j)),
    *(("dropout_p", value, ValueError, "dropout_p: expected 0 <= dropout_p < 1, got ")
      for value in (-0.1, 1.0, 1.5, float("nan"), float("inf"))),
    *(("dropout_p", value, TypeError, "dropout_p: expected a number, got ")
      for value in (None, "0.1", [0.1], torch.zeros(1))),
]  # fmt: skip


def _bad_id(value):
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.device}".removeprefix("torch.")
    return getattr(value, "__name__", None) or str(value)[:20]


@each_op
@pytest.mark.parametrize(("name", "value", "kind", "message"), BAD, ids=_bad_id)
def test_bad_argument(op, name, value, kind, message):
    """The message names the argument, what was expected and what came; no kernel runs."""
    named = keywords(op)
    if name not in named:
        return  # the other functions have this argument
    with pytest.raises(kind) as error:
        getattr(lk, op)(**named | {name: value})
    assert message in str(error.value), str(error.value)


@pytest.mark.parametrize("op", LORA)
def test_numbers_of_other_kinds(op):
    """Integers, and a bool that is one, as PEFT's configurations have them."""
    named = keywords(op)
    expected = getattr(lk, op)(**named)
    tolerance.assert_same_bits("y", getattr(lk, op)(**named | {"scaling": 2}), expected)
    tolerance.assert_same_bits("y", getattr(lk, op)(**named | {"dropout_p": 0}), expected)


# -- shapes ----------------------------------------------------------------------------------------

LEADING = [(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (1, 1, 1), (3, 1, 2, 2)]


@each_op
@pytest.mark.parametrize("leading", LEADING)
def test_any_leading_shape(op, leading, any_backend):
    named = keywords(op)
    x = torch.randn(*leading, K, requires_grad=True)
    y = getattr(lk, op)(**named | {"x": x})
    flat = x.detach().reshape(-1, K).requires_grad_()
    expected = getattr(lk, op)(**named | {"x": flat})
    assert y.shape == (*leading, N)
    tolerance.assert_same_bits("y", y.reshape(-1, N), expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.reshape(-1, N))
    tolerance.assert_same_bits("gradient of x", x.grad, flat.grad.view(x.shape))


VIEWS = {
    "transposed": lambda t: t.mT,
    "rows apart": lambda t: t[::2],
    "columns apart": lambda t: t[..., ::2],
    "expanded": lambda t: t[:1].expand(4, *t.shape[1:]),
    "last token": lambda t: t[:, -1],
    "permuted": lambda t: t.permute(1, 0, 2),
}


@each_op
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_x_and_their_gradients(op, view, any_backend):
    """Same bits as for a contiguous copy; the gradient arrives at the whole."""
    whole = {"transposed": (2, K, 3), "columns apart": (2, 3, 2 * K)}.get(view, (4, 3, K))
    x = torch.randn(whole)
    named = keywords(op)
    results = []
    for copy in (False, True):
        leaf = x.clone().requires_grad_()
        part = VIEWS[view](leaf)
        assert copy or view == "rows apart" or not part.is_contiguous()
        y = getattr(lk, op)(**named | {"x": part.contiguous() if copy else part})
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    tolerance.assert_same_bits("y, gradient of x", *results)


# -- autograd --------------------------------------------------------------------------------------


@each_op
def test_no_graph_where_no_gradient_is_wanted(op, any_backend):
    named = keywords(op)
    assert getattr(lk, op)(**named).grad_fn is None
    named["x"].requires_grad_()
    with torch.no_grad():
        assert getattr(lk, op)(**named).grad_fn is None
    with torch.inference_mode():
        inferred = getattr(lk, op)(**named)
    y = getattr(lk, op)(**named)
    assert y.grad_fn is not None
    tolerance.assert_same_bits("y", inferred.clone(), y)


@each_op
def test_double_backward_is_an_error(op, any_backend):
    """Not a derivative that silently lacks a term."""
    named = keywords(op)
    x = named["x"].requires_grad_()
    y = getattr(lk, op)(**named)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|differentiate twice"):
        (dx.square().sum() + y.sum()).backward()


@each_op
def test_second_backward_needs_retain_graph(op, any_backend):
    named = keywords(op)
    x = named["x"].requires_grad_()
    y = getattr(lk, op)(**named)
    y.sum().backward(retain_graph=True)
    first = x.grad.clone()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@each_op
def test_what_backward_saved_must_not_change(op, any_backend):
    named = keywords(op)
    y = getattr(lk, op)(**named | {"x": named["x"].requires_grad_()})
    saved = named["weight"] if op == "lora_linear" else named["w"].packed
    saved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("op", LORA)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(op, use_reentrant, any_backend):
    named = keywords(op) | {"dropout_p": 0.5}
    results = []
    for recompute in (False, True):
        x, A = named["x"].clone().requires_grad_(), named["A"].clone().requires_grad_()

        def layer(x, A=A):
            return getattr(lk, op)(**named | {"x": x, "A": A})

        torch.manual_seed(4)
        y = checkpoint(layer, x, use_reentrant=use_reentrant) if recompute else layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, A.grad))
    tolerance.assert_same_bits("y and gradients", *results)


@each_op
def test_no_warnings(op, any_backend):
    """Not once either: forward, backward, every kind of x."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (torch.randn(M, K), torch.randn(K, M).T, torch.randn(2, 1, K)[:, 0]):
            getattr(lk, op)(**keywords(op) | {"x": x.requires_grad_()}).sum().backward()
        with lk.backends.use("reference"):
            getattr(lk, op)(**keywords(op))


# -- autocast --------------------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize("x", cases.FACTORS["dtype"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_linear(op, x, autocast, any_backend):
    """x is cast, the result has the autocast dtype, gradients have the dtypes of what they are of."""
    named = keywords(op)
    leaf = named["x"].to(x).requires_grad_()
    with torch.autocast("cpu", dtype=autocast):
        y = getattr(lk, op)(**named | {"x": leaf})
        theirs = torch.nn.functional.linear(leaf, torch.zeros(N, K, dtype=x))
    assert y.dtype == theirs.dtype == autocast
    expected = getattr(lk, op)(**named | {"x": leaf.detach().to(autocast)})
    tolerance.assert_same_bits("y", y, expected)
    y.sum().backward()
    assert leaf.grad.dtype == x


@each_op
def test_autocast_leaves_what_linear_refuses(op):
    with torch.autocast("cpu"):
        for dtype in (torch.int8, torch.float64):
            with pytest.raises(TypeError, match="x: expected float32, bfloat16 or float16"):
                getattr(lk, op)(**keywords(op) | {"x": torch.ones(M, K).to(dtype)})


# -- torch.compile ---------------------------------------------------------------------------------


def compiled_and_eager(op, case, backend, dynamic=None, heights=(M,)):
    """Outputs and gradients of both, per height of x."""
    torch._dynamo.reset()
    args = cases.make(op, case)
    w = args[1] if op == "lora_linear" else cases.weight_of(args[1:10], case)

    def layer(x, bias, *lora):
        if op == "linear_4bit":
            return lk.linear_4bit(x.relu(), w, bias) * 2
        A, B = lora
        return getattr(lk, op)(x.relu(), w, A, B, case.scaling, bias, case.dropout_p) * 2

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for height in heights:
        x = torch.randn(2, height, case.K).to(case.dtype)
        results = []
        for function in (layer, compiled):
            parts = (x, args[10], *()) if op == "linear_4bit" else (x, args[-3], args[-6], args[-5])
            leaves = [t.clone().requires_grad_() for t in parts]
            torch.manual_seed(0)
            y = function(*leaves)
            y.square().sum().backward()
            results.append((y.detach(), *(t.grad for t in leaves)))
        yield results


@each_op
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_compiled_whole(op, dropout_p):
    """fullgraph: no break in forward or backward; the bits are those of eager mode."""
    if op == "linear_4bit" and dropout_p:
        return
    case = CASE._replace(dropout_p=dropout_p, dtype=cases.BF16, adapter=cases.F32)
    for eager, compiled in compiled_and_eager(op, case, "aot_eager"):
        tolerance.assert_same_bits(f"compiled {op}", compiled, eager)


@each_op
def test_compiled_for_any_number_of_rows(op):
    for eager, compiled in compiled_and_eager(op, CASE, "aot_eager", True, (5, 1, 33, 2)):
        tolerance.assert_same_bits(f"compiled {op}", compiled, eager)


@pytest.mark.parametrize(
    "op", [OPS[1], *(pytest.param(op, marks=pytest.mark.slow) for op in (OPS[0], OPS[2]))]
)
def test_compiled_by_inductor(op):
    """With dropout its generator is another, so the masks differ; without, values agree."""
    for eager, compiled in compiled_and_eager(op, CASE, "inductor"):
        for e, c in zip(eager, compiled):
            assert torch.allclose(e, c, rtol=1e-4, atol=1e-4 * float(e.abs().max()))
