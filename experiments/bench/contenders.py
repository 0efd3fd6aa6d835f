"""kjax and its peers as the bench sees them: weights to judge by, and the calls to time."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from cases import FORMATS, Batch, Shape, make_store

from kjax import _ext


@dataclass
class Contender:
    name: str
    format: str  # of the weights as they are stored
    bytes_of_expert: float
    weights: Callable  # expert -> (gate, up, down) in float64
    calls: dict[str, Callable[[Batch], tuple]]  # pass -> call that returns what that pass makes, y first
    decode: dict[str, float] = field(default_factory=dict)  # pass -> seconds per weight
    keep: list = field(default_factory=list)  # memory that must outlive the calls
    lora: str = ""  # rank of adapters on every expert, and where they are
    adapters: Callable | None = None  # expert -> three (A, B, scale) in float64
    prepare: Callable = lambda: None  # before a call whose results are judged
    beside: dict[str, Callable] = field(default_factory=dict)  # pass -> the call without adapters
    either: bool = False  # weights may also be rounded to bf16 before they are multiplied (ext/kernels.h)


def make_adapters(shape: Shape, rank: int):
    """[A, B] of gate, up and down for all experts, fp32 [E, R, in] and [E, out, R]; their scale; both by expert."""
    rng, scale, factors = np.random.default_rng(2), 2.0, []
    for inner, outer in ((shape.width, shape.hidden),) * 2 + ((shape.hidden, shape.width),):
        factors += [
            rng.standard_normal((shape.experts, rank, inner), np.float32) / np.float32(np.sqrt(inner)),
            rng.standard_normal((shape.experts, outer, rank), np.float32) / np.float32(4 * np.sqrt(rank)),
        ]
    of_expert = lambda e: [  # noqa: E731
        (a[e].astype(np.float64), b[e].astype(np.float64), scale)
        for a, b in zip(factors[::2], factors[1::2], strict=True)
    ]
    return factors, scale, of_expert


def _kjax_calls(store, adapters=None, gradients=None):
    """forward and forward+backward; the latter with the adapters' gradients, returned or where the host adds them."""

    def forward(b):
        return _ext.forward(store.id, 0, b.x, b.idx, b.gate, False, adapters)[:1]

    def forward_backward(b):
        y, slip = _ext.forward(store.id, 0, b.x, b.idx, b.gate, True, adapters)
        dx, dgate, more = _ext.backward(store.id, 0, slip, b.x, b.idx, b.gate, b.dy, adapters)
        return (y, dx, dgate, gradients or more) if adapters else (y, dx, dgate)

    return {"forward": forward, "forward+backward": forward_backward}


def kjax(shape: Shape, fmt: str, threads: int, rank: int):
    store, bytes_of_expert, weights = make_store(shape, fmt)
    along, across = (float(np.median([_ext.decode_cost(fmt, way) for _ in range(5)])) for way in (False, True))
    quantised = FORMATS[fmt][1] is not None
    decode, plain = {"forward": along, "forward+backward": along + across}, _kjax_calls(store)
    if not rank:
        yield Contender("kjax", fmt, bytes_of_expert, weights, plain, decode, [store], either=quantised)
        return
    factors, scale, of_expert = make_adapters(shape, rank)
    with_factors = _kjax_calls(store, (factors, [scale] * 3, 0.0, -1))
    parts = ("kjax", fmt, bytes_of_expert, weights)
    of_home = {"adapters": of_expert, "beside": plain, "either": quantised}
    yield Contender(*parts, with_factors, decode, [store], f"{rank}, operands", **of_home)
    host, sums = _ext.HostAdapters(1, shape.experts, shape.width, shape.hidden), [np.zeros_like(f) for f in factors]
    host.bind([tuple(a[None] for a in (*factors[i : i + 2], *sums[i : i + 2])) for i in (0, 2, 4)])
    on_host = _kjax_calls(store, ([], [scale] * 3, 0.0, host.id), sums)
    clear = lambda: [a.fill(0) for a in sums]  # noqa: E731
    yield Contender(*parts, on_host, decode, [store, host], f"{rank}, host", prepare=clear, **of_home)


def _torch_batch(b: Batch):
    import torch

    as_bf16 = lambda a: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)  # noqa: E731
    return as_bf16(b.x), as_bf16(b.dy), torch.from_numpy(b.idx.astype(np.int64)), torch.from_numpy(b.gate)


def _bits(tensor):
    import torch

    return tensor.detach().contiguous().view(torch.int16).numpy().view(np.uint16)


def transformers(shape: Shape, fmt: str, threads: int, rank: int):
    """transformers' experts on CPU torch in bf16, frozen weights: the eager loop and the grouped product."""
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

    torch.set_num_threads(threads)
    config = DeepseekV3Config(
        hidden_size=shape.width,
        moe_intermediate_size=shape.hidden,
        n_routed_experts=shape.experts,
        num_experts_per_tok=shape.per_token,
        num_hidden_layers=1,
        n_group=1,
        topk_group=1,
    )
    config.num_experts = shape.experts
    kind = next(getattr(modeling, name) for name in dir(modeling) if name.endswith(("NaiveMoe", "Experts")))
    config._experts_implementation = "eager"
    with torch.device("meta"):
        experts = kind(config)
    experts = experts.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    for weight in experts.parameters():
        for one in weight:
            one.normal_(0, 0.02)

    def weights(e):
        gate, up = experts.gate_up_proj[e].double().chunk(2)
        return gate.numpy(), up.numpy(), experts.down_proj[e].double().numpy()

    def forward(b):
        x, _, idx, gate = _torch_batch(b)
        with torch.no_grad():
            return (_bits(experts(x, idx, gate.bfloat16())),)

    def forward_backward(b):
        x, dy, idx, gate = _torch_batch(b)
        x.requires_grad_(True)
        y = experts(x, idx, gate.bfloat16())
        return _bits(y), _bits(torch.autograd.grad(y, x, dy)[0])

    for implementation in ("eager", "grouped_mm"):
        config._experts_implementation = implementation
        experts.config = config
        calls = {"forward": forward, "forward+backward": forward_backward}
        yield Contender(f"transformers {implementation}", "bf16", 2 * shape.weights, weights, calls, {}, [experts])


def kt_kernel(shape: Shape, fmt: str, threads: int, rank: int):
    """kt-kernel's inference classes and, for bf16, its fine-tuning class, as far as it has them for the format."""
    import kt_peers

    if not kt_peers.class_of(fmt, rank):
        print(f"kt-kernel's build for this CPU has nothing for {fmt}{' with adapters' if rank else ''}")
    elif rank:
        yield kt_peers.tuning(shape, threads, rank)
    else:
        yield kt_peers.inference(shape, fmt, threads)


CONTENDERS = {"kjax": kjax, "transformers": transformers, "kt-kernel": kt_kernel}
LORA = {"kjax": list(FORMATS), "kt-kernel": ["bf16"]}
PEER_FORMATS = {"transformers": ["bf16"], "kt-kernel": ["bf16", "fp8_block", "int8_group128", "int4_group32"]}


def why_not(who: str, fmt: str, rank: int) -> str:
    """Empty, or why a contender cannot be measured."""
    if folder := os.environ.get("KJAX_BENCH_PEERS"):  # where pip's --target put them
        sys.path.append(folder) if folder not in sys.path else None
    needs = {"kjax": [], "transformers": ["torch", "transformers"], "kt-kernel": ["torch", "kt_kernel"]}[who]
    missing = [name for name in needs if not importlib.util.find_spec(name)]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if rank and fmt not in LORA.get(who, []):
        return "has no adapters of experts"
    return "" if fmt in PEER_FORMATS.get(who, FORMATS) else f"has no {fmt}"
