"""Other implementations of the same layer, timed beside kjax: (name, batch -> {pass: call}) where installed."""

import importlib.util


def transformers(shape, threads):
    """transformers' experts on CPU torch in bf16, frozen weights: the eager loop and the grouped product."""
    if not importlib.util.find_spec("transformers") or not importlib.util.find_spec("torch"):
        print("transformers or torch is not installed: skipped")
        return
    import numpy as np
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
    experts = experts.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for weight in experts.parameters():
            weight.requires_grad_(False)
            for one in weight:
                one.normal_(0, 0.02)

    for implementation in ("eager", "grouped_mm"):
        config._experts_implementation = implementation
        experts.config = config

        def calls(batch):
            as_torch = lambda a: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)  # noqa: E731
            x, dy, idx = as_torch(batch.x), as_torch(batch.dy), torch.from_numpy(batch.idx.astype(np.int64))
            gate = torch.from_numpy(batch.gate).bfloat16()
            leaf = x.clone().requires_grad_(True)

            def forward():
                with torch.no_grad():
                    experts(x, idx, gate)

            return {
                "forward": forward,
                "forward+backward": lambda: torch.autograd.grad(experts(leaf, idx, gate), leaf, dy),
            }

        yield f"transformers {implementation}", calls


PEERS = {"transformers": transformers}
