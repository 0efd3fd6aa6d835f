"""kt-kernel's mixture-of-experts classes over random weights, called as its own Python layer calls them."""

from types import SimpleNamespace

import torch
from contenders import Contender, _bits, _torch_batch, make_adapters
from kt_kernel import kt_kernel_ext as kt

MAX_TOKENS = 2048
# Its builds for different CPUs have different classes: the first that is there.
FORWARD = {
    "bf16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
    "fp8_block": ("AMXFP8_MOE", "AVX2FP8_MOE"),
    "int8_group128": ("AMXInt8_MOE",),  # W8A8: it quantises bf16 weights and activations itself
    "int4_group32": ("AMXInt4_KGroup_MOE", "AVX2RawInt4_MOE"),
}
TUNING = ("AMXBF16_SFT_MOE",)
STORED_BYTES = {"bf16": 2, "fp8_block": 1, "int8_group128": 1, "int4_group32": 0.5}


def class_of(fmt, rank):
    """The name of what multiplies experts of a format here, with adapters of a rank or (0) without; or None."""
    names = TUNING if rank else FORWARD[fmt]
    return next((name for name in names if hasattr(kt.moe, name)), None)


def _bank(*shape):
    bank = torch.empty(shape, dtype=torch.bfloat16)
    for one in bank:
        one.normal_(0, 0.02)
    return bank


def _fp8(weights):
    """Codes, scales per 128 x 128; the weights become what the codes mean."""
    experts, rows, cols = weights.shape
    codes, scales = torch.empty(experts, rows, cols, dtype=torch.uint8), torch.empty(experts, rows // 128, cols // 128)
    for e in range(experts):
        blocks = weights[e].float().view(rows // 128, 128, cols // 128, 128)
        scales[e] = 2.0 ** torch.ceil(torch.log2(blocks.abs().amax((1, 3)) / 448))
        code = (blocks / scales[e][:, None, :, None]).to(torch.float8_e4m3fn)
        codes[e] = code.view(torch.uint8).view(rows, cols)
        weights[e] = (code.float() * scales[e][:, None, :, None]).view(rows, cols)
    return codes, scales


def _int4(weights):
    """Eight codes per int32, bf16 scales per 32; the weights become what the codes mean."""
    experts, rows, cols = weights.shape
    codes = torch.empty(experts, rows, cols // 8, dtype=torch.int32)
    scales = torch.empty(experts, rows, cols // 32, dtype=torch.bfloat16)
    shifts = 4 * torch.arange(8, dtype=torch.int32)
    for e in range(experts):
        groups = weights[e].float().view(rows, cols // 32, 32)
        scales[e] = (groups.abs().amax(-1) / 7).clamp_min(1e-8)
        scale = scales[e].float()[..., None]
        code = torch.round(groups / scale).clamp(-8, 7)
        weights[e] = (code * scale).view(rows, cols)
        nibbles = (code + 8).to(torch.int32).view(rows, cols // 8, 8)
        codes[e] = (nibbles << shifts).sum(-1, dtype=torch.int32)
    return codes, scales


def _forward_class(shape, fmt, threads, gate, up, down):
    pool = kt.CPUInfer(threads)
    config = kt.moe.MOEConfig(shape.experts, shape.per_token, shape.width, shape.hidden, 0)
    config.max_len, config.pool = MAX_TOKENS, pool.backend_
    order = torch.arange(shape.experts, dtype=torch.int64)
    config.physical_to_logical_map = order.data_ptr()
    quantise = {"fp8_block": _fp8, "int4_group32": _int4}.get(fmt)
    keep = [pool, config, order, gate, up, down]
    for name, weights in (("gate", gate), ("up", up), ("down", down)):
        if quantise:
            codes, scales = quantise(weights)
            keep += [codes, scales]
            setattr(config, f"{name}_scale", scales.data_ptr())
        else:
            codes = weights
        setattr(config, f"{name}_proj", codes.data_ptr())
    if quantise:
        config.quant_config.bits, config.quant_config.group_size = (8, 128) if fmt == "fp8_block" else (4, 32)
        config.quant_config.zero_point = False
    moe = getattr(kt.moe, class_of(fmt, 0))(config)
    try:
        pool.submit(moe.load_weights_task(order.data_ptr()))
    except TypeError:
        pool.submit(moe.load_weights_task())
    pool.sync()

    def forward(b):
        x, _, idx, gates = _torch_batch(b)
        y, length = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        pointers = [a.data_ptr() for a in (idx, gates, x, y)]
        pool.submit(moe.forward_task(length.data_ptr(), shape.per_token, *pointers, False))
        pool.sync()
        return (_bits(y),)

    return {"forward": forward}, [moe, *keep]


def _tuning_class(shape, threads, rank, scale, factors, gate, up, down):
    """Adapters are always on in this class. factors: A and B of gate, up and down in bf16."""
    workers = kt.WorkerPoolConfig()
    workers.subpool_count, workers.subpool_numa_map, workers.subpool_thread_count = 1, [0], [threads]
    pool = kt.CPUInfer(workers)
    config = kt.moe.MOESFTConfig(shape.experts, shape.per_token, shape.width, shape.hidden)
    settings = SimpleNamespace(
        max_len=MAX_TOKENS, max_cache_depth=1, layer_idx=0, lora_rank=rank, lora_alpha=scale * rank,
        full_weight_grad=False, authoritative_optimizer_grads=True, share_backward_bb=False, share_cache_pool=False,
    )  # fmt: skip
    order = torch.arange(shape.experts, dtype=torch.int64)
    names = [f"{name}_lora_{factor}" for name in ("gate", "up", "down") for factor in "ab"]
    grads = [torch.zeros_like(factor) for factor in factors]
    for name, factor in zip(names, factors, strict=True):
        setattr(settings, name, factor.data_ptr())
    for name, weights in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        setattr(settings, name, weights.data_ptr())
    settings.physical_to_logical_map, settings.pool = order.data_ptr(), pool.backend_
    for name, value in vars(settings).items():
        setattr(config, name, value)
    moe = getattr(kt.moe, class_of("bf16", rank))(config)
    moe.load_weights()

    def forward(b, save=False):
        x, _, idx, gates = _torch_batch(b)
        y, length = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        pointers = [a.data_ptr() for a in (idx, gates, x, y)]
        moe.forward_sft(length.data_ptr(), shape.per_token, *pointers, save)
        return (_bits(y),)

    def forward_backward(b):
        (y,) = forward(b, True)
        _, dy, _, gates = _torch_batch(b)
        dx, dgate = torch.empty_like(dy), torch.empty_like(gates)
        pointers = [grad.data_ptr() for grad in grads]
        moe.backward(dy.data_ptr(), dx.data_ptr(), *pointers, dgate.data_ptr(), 0, 0, 0, False, 1.0)
        return y, _bits(dx), dgate.numpy(), [_bits(grad) for grad in grads]

    calls = {"forward": forward, "forward+backward": forward_backward}
    return calls, [moe, pool, config, order, factors, grads, gate, up, down]


def _weights(shape, threads):
    """gate, up, down, and the same by expert in float64."""
    torch.set_num_threads(threads)
    gate, up = (_bank(shape.experts, shape.hidden, shape.width) for _ in range(2))
    down = _bank(shape.experts, shape.width, shape.hidden)
    return (gate, up, down), lambda e: tuple(w[e].double().numpy() for w in (gate, up, down))


def inference(shape, fmt, threads):
    projections, weights = _weights(shape, threads)
    calls, keep = _forward_class(shape, fmt, threads, *projections)
    return Contender(f"kt-kernel {class_of(fmt, 0)}", fmt, STORED_BYTES[fmt] * shape.weights, weights, calls, {}, keep)


def tuning(shape, threads, rank):
    projections, weights = _weights(shape, threads)
    made, scale, _ = make_adapters(shape, rank)
    factors = [torch.from_numpy(factor).bfloat16() for factor in made]
    calls, keep = _tuning_class(shape, threads, rank, scale, factors, *projections)
    of_expert = lambda e: [  # noqa: E731
        (a[e].double().numpy(), b[e].double().numpy(), scale)
        for a, b in zip(factors[::2], factors[1::2], strict=True)
    ]
    size, name = STORED_BYTES["bf16"] * shape.weights, class_of("bf16", rank)
    return Contender(f"kt-kernel {name}", "bf16", size, weights, calls, {}, keep, f"{rank}", of_expert)
