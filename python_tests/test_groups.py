"""The public functions of several weights that share x: errors, gradients, torch.compile."""

import pytest
import torch

import lowrank_kernels as lk

SIZES = (64, 32, 16)


def problem():
    ws = [lk.quantize_4bit(torch.randn(n, 128), double_quant=n != 32) for n in SIZES]
    A = [torch.randn(4, 128, requires_grad=True), None, torch.randn(2, 128, requires_grad=True)]
    B = [torch.randn(64, 4, requires_grad=True), None, torch.randn(16, 2, requires_grad=True)]
    return torch.randn(3, 128, requires_grad=True), ws, A, B


def separate(x, ws, A, B, p):
    return [
        lk.linear_4bit(x, w) if a is None else lk.lora_linear_4bit(x, w, a, b, 2.0, None, p)
        for w, a, b in zip(ws, A, B)
    ]


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_as_separate_calls(p):
    """y and the adapters' gradients bit for bit, masks too; dx, another order of sums, nearly."""
    x, ws, A, B = problem()
    results = []
    for fused in (True, False):
        torch.manual_seed(3)
        lora = (A, B, [2.0] * 3, None, p)
        ys = lk.lora_linear_4bit_group(x, ws, *lora) if fused else separate(x, ws, A, B, p)
        leaves = [x, A[0], B[0], A[2], B[2]]
        results.append((list(ys), torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)))
    (ys, grads), (expected, single) = results
    assert all(map(torch.equal, ys, expected)) and all(map(torch.equal, grads[1:], single[1:]))
    torch.testing.assert_close(grads[0], single[0])


def test_an_output_that_is_not_used_has_no_part():
    x, ws, A, B = problem()
    lk.lora_linear_4bit_group(x, ws, A, B, [2.0] * 3)[1].sum().backward()
    expected = torch.ones(3, 32) @ ws[1].dequantize()
    torch.testing.assert_close(x.grad, expected)
    assert A[0].grad is None and B[2].grad is None


def test_compiles_whole():
    x, ws, A, B = problem()

    def call(x):
        return lk.lora_linear_4bit_group(x, ws, A, B, [2.0] * 3)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    ys, expected = compiled(x), call(x)
    assert all(map(torch.equal, ys, expected))
    grads = [torch.autograd.grad(sum(y.sum() for y in of), x)[0] for of in (ys, expected)]
    assert torch.equal(*grads)


def test_errors_name_the_list_and_the_place():
    x, ws, A, B = problem()
    other = lk.quantize_4bit(torch.randn(4, 64))
    for words, call in {
        "weights: expected one weight or more": lambda: lk.linear_4bit_group(x, []),
        "biases: expected 3 entries": lambda: lk.linear_4bit_group(x, ws, [None]),
        r"weights\[1\]: expected shape": lambda: lk.linear_4bit_group(x, [ws[0], other]),
        r"biases\[1\]: expected": lambda: lk.linear_4bit_group(x, ws, [None, torch.ones(3), None]),
        r"As\[2\]: expected": lambda: lk.lora_linear_4bit_group(
            x, ws, [*A[:2], B[0]], B, [1.0] * 3
        ),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()
