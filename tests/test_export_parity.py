"""Adapters and merged checkpoints against transformers and peft: ours there, theirs here, in both layouts."""

import json

import adapter_cases as cases
import jax
import make_goldens
import numpy as np
import pytest

import kjax
from kjax import adapter_layouts, adapters
from kjax.merge import merge

LOGITS = 1e-5  # fp32 in another order of sums, see test_peft_parity
CASES = ("v2_greedy", "v3")
EVERY = ("attention", "shared", "dense", "experts")


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


@pytest.fixture(scope="module", params=CASES)
def case(request, peft, tmp_path_factory):
    """(content of config.json, directory of the base, tokens) of a draw that keeps clear of ties."""
    content, _, tokens, seed, _ = make_goldens.draw(request.param, 0)
    base = cases.write_base(tmp_path_factory.mktemp(request.param) / "base", content, seed, shards=3)
    return content, base, tokens


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def torch_of(directory):
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager",
                                                              dtype=torch.float32)
    model.config._experts_implementation = "eager"
    return model.eval()


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()


def saved(directory, content, spec, layout, seed=0, **kwargs):
    found = cases.sizes(content)
    tree = cases.random_tree(spec, found, seed)
    adapters.save(directory, tree, spec, found, base=adapters.Base("base"), layout=layout, **kwargs)
    return tree


@pytest.mark.parametrize("layout, groups, ranks", [
    ("experts", ("attention", "experts"), {}),
    ("experts", ("attention", "experts"), {"down_proj": 2, "o_proj": 5}),
    ("fused", ("attention", "experts"), {}),
    ("fused", ("attention", "experts"), {"gate_proj": 2, "down_proj": 4, "o_proj": 5}),
    ("fused", EVERY, {}),
])
def test_peft_reads_ours_and_the_merged_checkpoint_is_the_same(case, peft, tmp_path, layout, groups, ranks):
    content, base, tokens = case
    spec = cases.spec_of(content, groups, ranks.items())
    saved(tmp_path / "a", content, spec, layout)
    model = torch_of(base)
    plain = torch_logits(model, tokens)
    if "shared" in groups:  # what the note says
        assert "model_type" in " ".join(adapters.notes(spec, layout))
        model.config.model_type = "a_type_peft_does_not_convert"
    adapted = torch_logits(peft.PeftModel.from_pretrained(model, tmp_path / "a").eval(), tokens)
    assert relative_error(plain, adapted) > 0.05
    merge(base, tmp_path / "a", tmp_path / "m", progress=False)
    assert relative_error(torch_logits(torch_of(tmp_path / "m"), tokens), adapted) <= LOGITS
    with kjax.load(tmp_path / "m", dtype="float32", progress=False) as merged:
        assert relative_error(merged.logits(tokens), adapted) <= LOGITS


@pytest.mark.parametrize("targets", ["rewritten", "parameters", "down_only"])
def test_we_read_what_peft_made(case, peft, tmp_path, targets):
    import torch

    content, base, tokens = case
    attention = [path.split("/")[-1] for path in cases.spec_of(content, ("attention",)).paths]
    torch.manual_seed(0)
    settings = {"rewritten": {"target_modules": [*attention, "gate_proj", "up_proj", "down_proj"]},
                "parameters": {"target_modules": attention, "target_parameters": [
                    "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                    "rank_pattern": {"experts.down_proj": 4}, "use_rslora": True},
                "down_only": {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.down_proj"]}}[targets]
    model = peft.get_peft_model(torch_of(base), peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False,
                                                               task_type="CAUSAL_LM", **settings)).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.1 if "lora_B" in name else 0.15)
    adapted = torch_logits(model, tokens)
    model.save_pretrained(tmp_path / "theirs")
    found = cases.sizes(content)
    spec, tree = adapters.load(tmp_path / "theirs", found)
    assert spec.get(adapter_layouts.DOWN).rank == (4 if targets == "parameters" else 2)
    if targets != "down_only":  # one A for gate and up, which have nothing of their own
        assert spec.get(adapter_layouts.UP).rank == (4 if targets == "rewritten" else 2)
    merge(base, tmp_path / "theirs", tmp_path / "m", progress=False)
    assert relative_error(torch_logits(torch_of(base), tokens), adapted) > 0.05
    assert relative_error(torch_logits(torch_of(tmp_path / "m"), tokens), adapted) <= LOGITS
    # Written again in our layout it is the same to peft.
    adapters.save(tmp_path / "again", tree, spec, found, base=adapters.Base("base"), layout="fused")
    again = peft.PeftModel.from_pretrained(torch_of(base), tmp_path / "again").eval()
    assert relative_error(torch_logits(again, tokens), adapted) <= LOGITS


def test_what_the_notes_say_of_peft_is_so(case, peft, tmp_path):
    content, base, tokens = case
    for layout in ("experts", "fused"):
        spec = cases.spec_of(content, EVERY)
        saved(tmp_path / layout, content, spec, layout)
        model = peft.PeftModel.from_pretrained(torch_of(base), tmp_path / layout)
        names = {name for name, _ in model.named_parameters() if ".lora_" in name}
        assert any(".mlp.experts." in name for name in names)
        assert not any("shared_experts" in name or "layers.0.mlp" in name for name in names)
        dropped = [note for note in adapters.notes(spec, layout) if "drops the adapters on" in note]
        assert len(dropped) == 1 and "mlp.shared_experts.up_proj" in dropped[0] and "mlp.up_proj" in dropped[0]
    spec = cases.spec_of(content, ("experts",), {"up_proj": 2}.items())
    assert "one rank and alpha" in adapters.notes(spec)[0] and adapters.notes(cases.spec_of(content)) == ()


def test_a_model_saved_by_transformers_5_loads(case, tmp_path):
    content, base, tokens = case
    model = torch_of(base)
    model.save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads((tmp_path / "theirs/config.json").read_text())
    with kjax.load(tmp_path / "theirs", dtype="float32", progress=False) as ours:
        assert relative_error(ours.logits(tokens), torch_logits(model, tokens)) <= LOGITS


@pytest.mark.parametrize("layout, dtype", [("experts", "float32"), ("fused", "float32"), ("fused", "bfloat16")])
def test_round_trip(tmp_path, layout, dtype):
    content = make_goldens.CASES["v3"]
    spec = cases.spec_of(content, EVERY, {"gate_proj": 2, "down_proj": 4}.items() if layout == "experts" else ())
    tree = saved(tmp_path / "a", content, spec, layout, dtype=dtype)
    found, again = adapters.load(tmp_path / "a", cases.sizes(content))
    assert found == spec
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8 if dtype == "bfloat16" else 0), again, tree)
