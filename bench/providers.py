"""x"""

def _triton(op: str, case: Case) -> Callable:
    """The Triton kernel of an operator, called as it is: the CUDA kernels stay where they are."""
    if case.device != "cuda":
        raise Unavailable("triton runs on GPUs")
    if not triton_installed():
        raise Unavailable("triton is not installed")
    return kernel_of(op)



def linear_bitsandbytes_training(case: Case) -> Calls:
    """The same module while training: it dequantizes and multiplies in the dtype of x, everywhere."""
    return [functools.partial(module, x_of(case)) for module in _bnb_modules(case)]



def linear_triton(case: Case) -> Calls:
    pairs, linear = each(case, x_of(case), weights_4bit(case)), _triton("linear_4bit", case)
    return [functools.partial(linear, x, *w.op_args(), None) for x, w in pairs]



def dx_triton(case: Case) -> Calls:
    pairs, dx = each(case, dy_of(case), weights_4bit(case)), _triton("linear_4bit_dx", case)
    return [functools.partial(dx, dy, *w.op_args()) for dy, w in pairs]



def lora_triton(case: Case) -> Calls:
    """Forward, or forward and backward, without autograd around them."""
    forward = _triton("lora_linear_4bit", case)
    backward = _triton("lora_linear_4bit_backward", case)
    A, B = (t.detach() for t in adapter_of(case))
    adapter = A, B, SCALING, None, 0.0, None
    pairs = each(case, x_of(case), weights_4bit(case))
    if case.op == "lora_linear_4bit":
        return [lambda x=x, w=w: forward(x, *w.op_args(), *adapter)[0] for x, w in pairs]

    def both(x, dy, w):
        _, s = forward(x, *w.op_args(), *adapter)
        return backward(dy, x, s, *w.op_args(), *adapter, True, True, True, False)[:3]

    triples = each(case, dy_of(case), pairs)
    return [functools.partial(both, x, dy, w) for dy, (x, w) in triples]



def _addmm_forward(x, W, A, B):
    """y = x Wᵀ, then y += scaling (x Aᵀ) Bᵀ in place."""
    return F.linear(x, W()).addmm_(x @ A.to(x.dtype).T, B.to(x.dtype).T, alpha=SCALING)



def _addmm_both(x, dy, W, A, B):
    """Forward, then the gradients of x, A and B: x Aᵀ is not kept, and dx is added to in place."""
    _addmm_forward(x, W, A, B)
    A, B = A.to(x.dtype), B.to(x.dtype)
    dS = dy @ B
    dA = SCALING * (dS.T @ x)
    dB = SCALING * (dy.T @ (x @ A.T))
    return (dy @ W()).addmm_(dS, A, alpha=SCALING), dA, dB



def _addmm_calls(case: Case, weights: list[Callable[[], torch.Tensor]]) -> Calls:
    """The scheme of Unsloth: dense products around ``weights``, functions that give dense ones.

    Written out as its matmul_lora and LoRA_W do it, without autograd around it.
    """
    A, B = (t.detach() for t in adapter_of(case))
    pairs = each(case, x_of(case), weights)
    if case.op == "lora_linear_4bit":
        return [functools.partial(_addmm_forward, x, W, A, B) for x, W in pairs]
    triples = each(case, dy_of(case), pairs)
    return [functools.partial(_addmm_both, x, dy, W, A, B) for dy, (x, W) in triples]



def lora_addmm_dense(case: Case) -> Calls:
    return _addmm_calls(case, [lambda w=w: w for w in dense_weights(case)])



def lora_addmm_dequantize(case: Case) -> Calls:
    dtype = case.torch_dtype
    return _addmm_calls(case, [lambda w=w: w.dequantize(dtype) for w in weights_4bit(case)])



def lora_addmm_bitsandbytes(case: Case) -> Calls:
    return _addmm_calls(case, [lambda w=w: bnb_dequantize(*w) for w in _bnb_weights(case)])



def quantize_lowrank(case: Case) -> Calls:
    return [functools.partial(lk.quantize_4bit, weight) for weight in dense_weights(case)]



def quantize_operators(case: Case) -> Calls:
    """The two operators inside quantize_4bit, without its look for a NaN, which waits."""
    code, nested_code = code_of("nf4", case.device), dynamic_code(case.device)

    def quantize(weight: torch.Tensor) -> lk.Weight4bit:
        packed, absmax = ops.quantize_4bit(weight, code, BLOCKSIZE)
        absmax, nested_absmax, offset = ops.double_quantize(absmax, nested_code)
        kind = (code, weight.shape, weight.dtype, "nf4", BLOCKSIZE)
        return lk.Weight4bit(packed, absmax, *kind, nested_absmax, nested_code, offset)

    return [functools.partial(quantize, weight) for weight in dense_weights(case)]



def quantize_bitsandbytes(case: Case) -> Calls:
    quantize = _bitsandbytes(case.device).functional.quantize_4bit
    options = {"blocksize": BLOCKSIZE, "quant_type": "nf4", "compress_statistics": True}
    return [functools.partial(quantize, weight, **options) for weight in dense_weights(case)]



def dequantize_lowrank(case: Case) -> Calls:
    return [functools.partial(w.dequantize, case.torch_dtype) for w in weights_4bit(case)]



def dequantize_bitsandbytes(case: Case) -> Calls:
    return [functools.partial(bnb_dequantize, *weight) for weight in _bnb_weights(case)]
