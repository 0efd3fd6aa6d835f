"""PEFT adapter files: what is written, what is read back, what is refused and in which words."""

import errno
import json
import logging
import os
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from kjax import adapters, lora, lora_targets, peft_config
from kjax.config import Lora
from kjax.errors import CheckpointError, ConfigError, RunError
from kjax.lora import Adapter, LoraSpec, Size

LINEARS = {
    "dense_layers/self_attn/q_proj": Size(1, 16, 24),
    "dense_layers/self_attn/o_proj": Size(1, 8, 16),
    "moe_layers/self_attn/q_proj": Size(2, 16, 24),
    "moe_layers/self_attn/o_proj": Size(2, 8, 16),
    "dense_layers/mlp/up_proj": Size(1, 16, 40),
    "moe_layers/mlp/shared_experts/up_proj": Size(2, 16, 12),
}
BASE = adapters.Base("models/tiny", "c0", "70", "33")


def make(*targets, seed=0, **settings):
    """A spec, and a tree without zeros."""
    spec = lora_targets.resolve(Lora(targets=targets, **settings), LINEARS)
    rng = np.random.default_rng(seed)
    return spec, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), lora.abstract(spec, LINEARS))


def write(directory, tensors: dict, **settings):
    """Files as another program would write them."""
    directory.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
              "some_later_key": {"of": ["PEFT"]}} | settings
    (directory / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


def q_proj(rank=4, layers=(0, 1, 2), dtype=np.float32):
    rng = np.random.default_rng(0)
    return {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{m}.weight": rng.normal(size=size).astype(dtype)
            for i in layers for m, size in (("A", (rank, 16)), ("B", (24, rank)))}


def refusal(directory, base=None) -> str:
    with pytest.raises(CheckpointError) as error:
        adapters.load(directory, LINEARS, base)
    assert str(directory) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("targets, settings, modules", [
    (("attention",), {}, ["o_proj", "q_proj"]),
    (("attention", "shared"), {}, ["o_proj", "q_proj", "shared_experts.up_proj"]),
    (("dense",), {}, ["mlp.up_proj"]),
    (("up_proj",), {}, ["mlp.up_proj", "shared_experts.up_proj"]),  # `up_proj` alone would take the routed experts
    ((r"layers\.[12]\.self_attn\.o_proj",), {}, [f"model.layers.{i}.self_attn.o_proj" for i in (1, 2)]),
    (("attention",), {"exclude": (r"layers\.0\..*",)},
     [f"model.layers.{i}.self_attn.{p}_proj" for i in (1, 2) for p in ("o", "q")]),
])
def test_target_modules_are_as_short_as_exact(tmp_path, targets, settings, modules):
    spec, tree = make(*targets, **settings)
    adapters.save(tmp_path / "a", tree, spec, LINEARS, base=BASE)
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"] == modules


@pytest.mark.parametrize("targets, settings", [
    (("attention",), {}),
    (("attention", "shared", "dense"), {"rslora": True, "dropout": 0.25, "alpha": 7.5}),
    (("attention", "shared"), {"rank_pattern": {"shared": 2, "o_proj": 3}, "alpha_pattern": {"shared": 5.0}}),
    (("attention",), {"rank_pattern": {r"layers\.0\..*": 2}, "alpha_pattern": {r"layers\.[12]\.self_attn\.q_.*": 9.0}}),
    ((r"layers\.[12]\.self_attn\..*", "dense"), {"rank": 1}),
])
def test_round_trip(tmp_path, targets, settings):
    spec, tree = make(*targets, **settings)
    assert adapters.save(tmp_path / "a", tree, spec, LINEARS, base=BASE) == tmp_path / "a"
    found, again = adapters.load(tmp_path / "a", LINEARS, BASE)
    assert found == spec
    jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_the_files(tmp_path):
    spec, tree = make("attention", rank=3, rank_pattern={"o_proj": 2})
    adapters.save(tmp_path / "a", tree, spec, LINEARS, base=BASE, chat_template="{{ messages }}\n")
    assert sorted(os.listdir(tmp_path / "a")) == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "kjax_adapter.json"]
    assert os.listdir(tmp_path) == ["a"]
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "models/tiny", "inference_mode": True,
        "r": 2, "rank_pattern": {"q_proj": 3}, "lora_alpha": 16, "alpha_pattern": {}, "lora_dropout": 0.0,
        "use_rslora": False, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "target_modules": ["o_proj", "q_proj"]}
    assert (tmp_path / "a/chat_template.jinja").read_text() == "{{ messages }}\n"
    assert json.loads((tmp_path / "a/kjax_adapter.json").read_text())["base"] == {
        "name": "models/tiny", "config": "c0", "tensors": "70", "weights": "33", "prefix": ""}
    with safetensors.safe_open(tmp_path / "a/adapter_model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert len(file.keys()) == 2 * 2 * 3
        b = file.get_tensor("base_model.model.model.layers.2.self_attn.o_proj.lora_B.weight")
    np.testing.assert_array_equal(b, tree["moe_layers"]["self_attn"]["o_proj"]["lora_B"][1])


def test_a_whole_alpha_is_an_int_and_another_a_float(tmp_path):
    assert type(peft_config.write(make("attention", alpha=16.0)[0], LINEARS, "")["lora_alpha"]) is int
    assert peft_config.write(make("attention", alpha=0.5)[0], LINEARS, "")["lora_alpha"] == 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_a_foreign_adapter(tmp_path, dtype):
    tensors = q_proj(rank=6, dtype=dtype)
    spec, tree = adapters.load(write(tmp_path / "a", tensors, r=4, rank_pattern={"q_proj": 6}, lora_dropout=0.1,
                                     alpha_pattern={r".*\.(q|k)_proj": 3.0}, use_rslora=True), LINEARS, BASE)
    adapter = Adapter(6, 3.0, 0.1, True)
    assert spec == LoraSpec((("dense_layers/self_attn/q_proj", adapter), ("moe_layers/self_attn/q_proj", adapter)))
    leaves = flatten_dict(tree, sep="/")
    assert all(leaf.dtype == np.float32 for leaf in leaves.values())
    np.testing.assert_array_equal(
        leaves["moe_layers/self_attn/q_proj/lora_A"][0],
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].astype(np.float32))


@pytest.mark.parametrize("targets", [["q_proj"], r".*self_attn\.q_proj", "all-linear", None,
                                     r"(?:.*?(?:attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.\d+\.q_proj)"])
def test_targets_of_a_foreign_adapter(tmp_path, targets):
    spec, _ = adapters.load(write(tmp_path / "a", q_proj(), target_modules=targets), LINEARS)
    assert spec.paths == ("dense_layers/self_attn/q_proj", "moe_layers/self_attn/q_proj")


@pytest.mark.parametrize("excluded", [["o_proj"], r".*\.o_proj"])
def test_excluded_modules_of_a_foreign_adapter(tmp_path, excluded):
    spec, _ = adapters.load(write(tmp_path / "a", q_proj(), target_modules=["q_proj", "o_proj"],
                                  exclude_modules=excluded), LINEARS)
    assert spec.paths == ("dense_layers/self_attn/q_proj", "moe_layers/self_attn/q_proj")


def test_patterns_match_in_pefts_order(tmp_path):
    spec, _ = adapters.load(write(tmp_path / "a", q_proj(), alpha_pattern={"q_proj": 1, ".*": 2}), LINEARS)
    assert spec.entries[0][1].alpha == 1
    spec, _ = adapters.load(write(tmp_path / "a", q_proj(), alpha_pattern={".*": 2, "q_proj": 1}), LINEARS)
    assert spec.entries[0][1].alpha == 2
    spec, _ = adapters.load(write(tmp_path / "a", q_proj(), alpha_pattern={"q_pro": 1, "proj": 2}), LINEARS)
    assert spec.entries[0][1].alpha == 8


@pytest.mark.parametrize("key, value, says", [
    ("use_dora", True, "DoRA"),
    ("bias", "lora_only", "trained biases"),
    ("modules_to_save", ["lm_head"], "fully trained modules"),
    ("fan_in_fan_out", True, "transposed weights"),
    ("target_parameters", ["mlp.gate.weight"], "of parameters only the experts' gate_up_proj and down_proj"),
    ("layers_to_transform", [1], "some layers only"),
    ("init_lora_weights", "pissa_niter_4", "changes the base weights"),
    ("peft_type", "LOHA", "kjax reads LORA adapters"),
    ("r", 0, "expected a positive whole number"),
    ("r", True, "expected a positive whole number"),
    ("lora_alpha", "16", "expected a number"),
    ("lora_dropout", 1.5, "expected a number in [0, 1)"),
    ("use_rslora", "yes", "expected true or false"),
    ("rank_pattern", {"q_proj": 2.5}, "with positive whole numbers"),
    ("alpha_pattern", ["q_proj"], "with numbers"),
    ("target_modules", [1], "a list of names"),
    ("alpha_pattern", {"(a+)+b": 1}, "too involved"),
    ("alpha_pattern", {"(a|a)" * 20: 1}, "too involved"),
    ("alpha_pattern", {".*.*.*.*x": 1}, "too involved"),
    ("alpha_pattern", {"a?" * 30: 1}, "too involved"),
    ("alpha_pattern", {f"x{i}*": 1 for i in range(33)}, "at most 32 of them regular expressions"),
    ("rank_pattern", {"[": 1}, "no regular expression"),
])
def test_settings_that_cannot_be_followed(tmp_path, key, value, says):
    text = refusal(write(tmp_path / "a", q_proj(), **{key: value}))
    assert key in text or "pattern" in key
    assert says in text and "adapter_config.json" in text


def test_neutral_values_of_unsupported_settings_pass(tmp_path):
    adapters.load(write(tmp_path / "a", q_proj(), use_dora=False, modules_to_save=None, target_parameters=[],
                        layers_to_transform=None, bias="none", init_lora_weights="gaussian", lora_bias=False), LINEARS)


def test_all_that_does_not_fit_is_listed(tmp_path):
    tensors = q_proj()
    tensors.pop("base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 17), np.float32)
    tensors["base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 16), np.float32)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"] = np.zeros((24, 4), np.int32)
    text = refusal(write(tmp_path / "a", tensors, base_model_name_or_path="another/base"))
    assert "'another/base'" in text
    assert "layers.2.self_attn.q_proj.lora_B.weight is missing" in text
    assert "layers.1.self_attn.q_proj.lora_A.weight is [4, 17], the model and rank 4 need [4, 16]" in text
    assert "layers.1.self_attn.q_proj.lora_B.weight has dtype I32" in text
    assert "layers.3.self_attn.q_proj.lora_A.weight' belongs to no linear layer of this model" in text


def test_a_rank_that_config_and_tensors_tell_differently(tmp_path):
    assert "is [6, 16], the model and rank 4 need [4, 16]" in refusal(write(tmp_path / "a", q_proj(rank=6)))


def test_a_target_without_tensors(tmp_path):
    text = refusal(write(tmp_path / "a", q_proj(), target_modules=["q_proj", "o_proj"]))
    assert "layers.0.self_attn.o_proj.lora_A.weight is missing" in text


def test_tensors_that_target_modules_does_not_name(tmp_path):
    text = refusal(write(tmp_path / "a", q_proj(), target_modules=["o_proj"]))
    assert "q_proj has tensors, but target_modules in adapter_config.json does not name it" in text


def test_some_layers_only(tmp_path):
    text = refusal(write(tmp_path / "a", q_proj(layers=(0, 1)), target_modules=[
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]))
    assert "moe_layers/self_attn/q_proj is adapted in 1 of 2 layers" in text


def test_many_plain_names_are_no_regular_expressions(tmp_path):
    pattern = {rf"model\.layers\.{i}\.self_attn\.q_proj": 3 for i in range(61)}
    assert adapters.load(write(tmp_path / "a", q_proj(), alpha_pattern=pattern), LINEARS)[0].entries[0][1].alpha == 3


def test_layers_of_different_alpha(tmp_path):
    text = refusal(write(tmp_path / "a", q_proj(), alpha_pattern={r"layers\.2\..*": 4}))
    assert "moe_layers/self_attn/q_proj has layers of different rank or alpha" in text


@pytest.mark.parametrize("key, says", [
    ("mlp.experts.3.up_proj.lora_A.weight", "belongs to no linear layer"),
    ("mlp.experts.base_layer.lora_A.weight", "belongs to no linear layer"),
    ("mlp.gate.lora_B.weight", "1 tensors adapt the router"),
    ("self_attn.q_proj.lora_magnitude_vector.weight", "belongs to no linear layer"),
])
def test_tensors_of_other_kinds(tmp_path, key, says):
    assert says in refusal(write(tmp_path / "a", q_proj() | {
        f"base_model.model.model.layers.1.{key}": np.zeros((2, 2), np.float32)}))


def test_nan_is_refused_on_reading_and_writing(tmp_path):
    tensors = q_proj()
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][0, 0] = np.nan
    assert "NaN or Inf in base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight" in refusal(
        write(tmp_path / "a", tensors))
    spec, tree = make("o_proj")
    tree["moe_layers"]["self_attn"]["o_proj"]["lora_A"] = np.full((2, 8, 8), np.inf)
    with pytest.raises(RunError, match="moe_layers/self_attn/o_proj/lora_A holds NaN or Inf"):
        adapters.save(tmp_path / "b", tree, spec, LINEARS, base=BASE)
    assert not (tmp_path / "b").exists()


def test_damaged_and_missing_files(tmp_path):
    assert "no such directory" in refusal(tmp_path / "nowhere")
    directory = write(tmp_path / "a", q_proj())
    whole = (directory / "adapter_model.safetensors").read_bytes()
    for damaged in (whole[:-5], b"\xff" * 40, b"", (10**12).to_bytes(8, "little") + whole[8:]):
        (directory / "adapter_model.safetensors").write_bytes(damaged)
        assert "not readable as safetensors" in refusal(directory)
    (directory / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refusal(directory)
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04")
    assert "adapter_model.bin is a pickle" in refusal(directory)
    for text in ("{", "[]", '{"r": NaN}'):
        (directory / "adapter_config.json").write_text(text)
        assert "adapter_config.json" in refusal(directory)
    (directory / "adapter_config.json").unlink()
    assert "no adapter_config.json" in refusal(directory)


def test_an_adapter_of_another_base(tmp_path):
    spec, tree = make("attention")
    adapters.save(tmp_path / "a", tree, spec, LINEARS, base=BASE)
    other = adapters.Base("models/sibling", "c0", "70", "99")
    text = refusal(tmp_path / "a", other)
    assert "trained on another base model, 'models/tiny'" in text and "models/sibling" in text
    with pytest.warns(UserWarning, match="config.json of models/moved is not the one"):
        adapters.load(tmp_path / "a", LINEARS, adapters.Base("models/moved", "c1", "71", "33"))
    adapters.load(tmp_path / "a", LINEARS)
    larger = LINEARS | {"moe_layers/self_attn/q_proj": Size(2, 32, 24)}
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*layers.1.self_attn.q_proj.lora_A.weight is "
                                              r"\[8, 16\], the model and rank 8 need \[8, 32\]"):
        adapters.load(tmp_path / "a", larger)


class FakeCheckpoint:
    """As much of weights.safetensors.Checkpoint as an identity needs."""

    directory = "models/fake"

    def __init__(self, tensors, config=None):
        self.tensors = tensors
        self.config_json = {"num_hidden_layers": 2} | (config or {})

    def names(self):
        return self.tensors.keys()

    def entry(self, name):
        return SimpleNamespace(name=name, dtype=str(self.tensors[name].dtype), shape=self.tensors[name].shape)

    def read(self, name):
        assert name.endswith("norm.weight"), "an identity reads nothing large"
        return self.tensors[name]


def test_identity():
    tensors = {"model.norm.weight": np.array([1, 2], ml_dtypes.bfloat16), "model.embed_tokens.weight": np.zeros((9, 2)),
               "model.layers.1.input_layernorm.weight": np.array([3, 4], ml_dtypes.bfloat16)}
    base = adapters.identify(FakeCheckpoint(tensors))
    assert base.name == "models/fake" and len({base.config, base.tensors, base.weights}) == 3
    assert adapters.identify(FakeCheckpoint(dict(reversed(tensors.items()))), "it") == adapters.Base(
        "it", base.config, base.tensors, base.weights)
    wider = adapters.identify(FakeCheckpoint({name: t.astype(np.float32) for name, t in tensors.items()}))
    assert wider.weights == base.weights and wider.tensors != base.tensors
    without_head = adapters.identify(FakeCheckpoint(tensors | {"model.layers.2.enorm.weight": np.ones(2)}))
    assert without_head.weights == base.weights
    oversized = adapters.identify(FakeCheckpoint(tensors | {"model.norm.norm.weight": np.zeros(2**20 + 1, np.int8)}))
    assert oversized.weights == base.weights
    trained = tensors | {"model.layers.1.input_layernorm.weight": np.array([3, 5], ml_dtypes.bfloat16)}
    assert adapters.identify(FakeCheckpoint(trained)).weights != base.weights
    assert adapters.identify(FakeCheckpoint(tensors, {"rms_norm_eps": 1e-5})).config != base.config


def test_saving_again_replaces_all_of_the_old_files(tmp_path):
    spec, tree = make("attention")
    adapters.save(tmp_path / "a", tree, spec, LINEARS, base=BASE, chat_template="old")
    (tmp_path / "a/README.md").write_text("mine")
    spec, tree = make("o_proj", seed=1)
    adapters.save(tmp_path / "a", tree, spec, LINEARS, base=BASE)
    found, again = adapters.load(tmp_path / "a", LINEARS, BASE)
    assert found == spec
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    assert not (tmp_path / "a/chat_template.jinja").exists() and (tmp_path / "a/README.md").read_text() == "mine"


@pytest.mark.parametrize("failing", ["fsync", "mkdir"])
def test_a_full_disk_leaves_the_previous_adapter(tmp_path, monkeypatch, failing):
    spec, tree = make("attention")
    adapters.save(tmp_path / "a", tree, spec, LINEARS, base=BASE)
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    for directory in ("a", "b"):
        with pytest.raises(RunError, match=f"{directory}: the adapter could not be written .No space left on device"):
            adapters.save(tmp_path / directory, make("attention", seed=1)[1], spec, LINEARS, base=BASE)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert os.listdir(tmp_path) == ["a"]
    adapters.load(tmp_path / "a", LINEARS, BASE)


def test_remains_of_a_killed_save_do_not_hinder_the_next(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial/adapter_config.json").write_text("{")
    spec, tree = make("attention")
    adapters.save(tmp_path / "a", tree, spec, LINEARS, base=BASE)
    assert adapters.load(tmp_path / "a", LINEARS)[0] == spec and os.listdir(tmp_path) == ["a"]


def test_trees_that_are_not_the_specs(tmp_path):
    spec, tree = make("attention")
    del tree["moe_layers"]["self_attn"]["o_proj"]
    with pytest.raises(ConfigError, match=r"moe_layers/self_attn/o_proj/lora_A is None, not \(2, 8, 8\)"):
        adapters.save(tmp_path / "a", tree, spec, LINEARS, base=BASE)
    mixed = LoraSpec((("dense_layers/self_attn/o_proj", Adapter(4, 1.0)),
                      ("moe_layers/self_attn/o_proj", Adapter(4, 1.0, 0.5))))
    with pytest.raises(ConfigError, match="one dropout and one rslora"):
        peft_config.write(mixed, LINEARS, "")


def test_consumers_that_drop_modules_are_named(tmp_path, caplog):
    assert adapters.notes(make("attention")[0]) == ()
    (note,) = adapters.notes(make("attention", "shared")[0])
    assert "transformers 5 drops" in note and "mlp.shared_experts.up_proj" in note
    adapters._tell_once.cache_clear()
    with caplog.at_level(logging.WARNING, "kjax"):
        for i in range(2):
            spec, tree = make("attention", "shared", "dense")
            adapters.save(tmp_path / str(i), tree, spec, LINEARS, base=BASE)
    assert len(caplog.records) == 1 and "mlp.up_proj" in caplog.text
