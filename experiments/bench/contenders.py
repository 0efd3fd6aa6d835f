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


def kjax(shape: Shape, fmt: str, threads: int):
    store, bytes_of_expert = make_store(shape, fmt)

    def forward(b):
        return _ext.forward(store.id, 0, b.x, b.idx, b.gate, False)[:1]

    def forward_backward(b):
        y, slip = _ext.forward(store.id, 0, b.x, b.idx, b.gate, True)
        return y, *_ext.backward(store.id, 0, slip, b.x, b.idx, b.gate, b.dy)

    along, across = (float(np.median([_ext.decode_cost(fmt, way) for _ in range(5)])) for way in (False, True))
    yield Contender(
        "kjax",
        fmt,
        bytes_of_expert,
        lambda e: tuple(store.decode(0, e, p).astype(np.float64) for p in range(3)),
        {"forward": forward, "forward+backward": forward_backward},
        {"forward": along, "forward+backward": along + across},
        [store],
    )


def _torch_batch(b: Batch):
    import torch

    as_bf16 = lambda a: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)  # noqa: E731
    return as_bf16(b.x), as_bf16(b.dy), torch.from_numpy(b.idx.astype(np.int64)), torch.from_numpy(b.gate)


def _bits(tensor):
    import torch

    return tensor.detach().contiguous().view(torch.int16).numpy().view(np.uint16)


def transformers(shape: Shape, fmt: str, threads: int):
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


def kt_kernel(shape: Shape, fmt: str, threads: int):
    """kt-kernel's inference classes and, for bf16, its fine-tuning class, as far as it has them for the format."""
    import kt_peers

    yield from (Contender(*parts) for parts in kt_peers.contenders(shape, fmt, threads))


CONTENDERS = {"kjax": kjax, "transformers": transformers, "kt-kernel": kt_kernel}
PEER_FORMATS = {"transformers": ["bf16"], "kt-kernel": ["bf16", "fp8_block", "int8_group128", "int4_group32"]}


def why_not(who: str, fmt: str) -> str:
    """Empty, or why a contender cannot be measured."""
    if folder := os.environ.get("KJAX_BENCH_PEERS"):  # where pip's --target put them
        sys.path.append(folder) if folder not in sys.path else None
    needs = {"kjax": [], "transformers": ["torch", "transformers"], "kt-kernel": ["torch", "kt_kernel"]}[who]
    missing = [name for name in needs if not importlib.util.find_spec(name)]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return "" if fmt in PEER_FORMATS.get(who, FORMATS) else f"has no {fmt}"
