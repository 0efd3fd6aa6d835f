"""kjax.load: checkpoints that transformers writes give transformers' logits; adapters attach; misuse is explained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_goldens import CASES, draw
from weights_cases import BYTE_VOCABULARY, V3, rewrite, tensors_of, write, write_tokenizer

from kjax import adapters, config, lora, lora_targets
from kjax.errors import CheckpointError, ConfigError, DataError
from kjax.load import load
from kjax.models import ModelConfig, linears

# fp32 has eps 6e-8; sums of some tens of numbers in another order through three layers stay two orders above it.
TOLERANCE = 2e-5
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 19))


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    return write(tmp_path_factory.mktemp("v3") / "model", V3)[0]


@pytest.mark.parametrize("case", CASES)
def test_saved_by_transformers(case, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    _, _, tokens, _, oracle = draw(case, seed=1)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(tokens).long()).logits.numpy()
    oracle.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    if case == "k2":  # transformers has no class of that name; the arithmetic is DeepSeek-V3's
        content = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(content | {"model_type": "kimi_k2"}))
    for shards in (1, 4):
        rewrite(tmp_path, tensors_of(tmp_path), shards=shards)
        with load(tmp_path, dtype="float32") as model:
            assert model.store is not None and model.tokenizer is None
            logits = model.logits(tokens)
        assert logits.dtype == jnp.float32 and logits.shape == expected.shape
        assert relative_error(logits, expected) <= TOLERANCE


def test_experts_on_host_and_device_agree(v3):
    host = load(v3, dtype="float32")
    with load(v3, dtype="float32", experts="device") as device:
        assert device.store is None
        assert relative_error(host.logits(TOKENS), device.logits(TOKENS)) <= TOLERANCE
    host.close()
    host.close()
    with pytest.raises(jax.errors.JaxRuntimeError, match="store .* is closed"):
        host.logits(TOKENS)


def test_bfloat16_is_the_default(v3):
    with load(v3) as model, load(v3, dtype="float32") as exact:
        assert model.params["norm"]["weight"].dtype == jnp.bfloat16
        assert model.params["moe_layers"]["mlp"]["gate"]["weight"].dtype == jnp.float32
        logits, expected = model.logits(TOKENS), exact.logits(TOKENS)
    assert logits.dtype == jnp.float32
    # bf16 keeps 8 bits, so activations carry errors of 2^-9; about 30 roundings in a row add up like a random walk.
    # A route may flip here and change single tokens altogether, hence the median over tokens.
    errors = np.abs(np.asarray(logits) - np.asarray(expected)).max(-1) / np.abs(np.asarray(expected)).max()
    assert np.median(errors) < 2**-9 * 30


@pytest.mark.parametrize(("tokens", "message"), [
    ([[1, 96]], r"token id 96 at \[0, 1\] is outside the embedding table of 96 rows"),
    ([[1, 2], [-1, 0]], r"token id -1 at \[1, 0\]"),
    ([1, 2, 3], "expected whole numbers"),
    ([[1.0, 2.0]], "expected whole numbers"),
])  # fmt: skip
def test_tokens_that_do_not_fit(v3, tokens, message):
    with load(v3, dtype="float32") as model, pytest.raises(DataError, match=message):
        model.logits(tokens)


def random_adapter(directory, base):
    """A PEFT directory for V3 with random B, and W + scale * B A of every adapted tensor by its checkpoint name."""
    sizes = linears(ModelConfig.from_json(V3))
    spec = lora_targets.resolve(config.Lora(targets=("attention", "shared", "dense"), rank=3, alpha=6.0,
                                    rank_pattern={"shared": 2}), sizes)
    rng = np.random.default_rng(1)
    tree = {}
    for path, adapter in spec.entries:
        layers, width_in, width_out, _ = sizes[path]
        node = tree
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node["lora_A"] = 0.3 * rng.standard_normal((layers, adapter.rank, width_in), np.float32)
        node["lora_B"] = 0.3 * rng.standard_normal((layers, width_out, adapter.rank), np.float32)
    adapters.save(directory, tree, spec, sizes, base=base)
    deltas = {}
    for path, adapter in spec.entries:
        node = tree
        for part in path.split("/"):
            node = node[part]
        for i, name in enumerate(lora.module_names(path, sizes)):
            deltas[f"{name}.weight"] = adapter.scale * node["lora_B"][i] @ node["lora_A"][i]
    return deltas


def test_adapter_equals_merged_weights(v3, tmp_path):
    with load(v3, dtype="float32") as model:
        base, plain = model.base, model.logits(TOKENS)
    deltas = random_adapter(tmp_path / "adapter", base)
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "config.json").write_text(json.dumps(V3))
    rewrite(merged, {name: array + deltas.get(name, 0) for name, array in tensors_of(v3).items()})

    with load(v3, tmp_path / "adapter", dtype="float32") as model, load(merged, dtype="float32") as expected:
        assert model.spec.get("moe_layers/mlp/shared_experts/up_proj").rank == 2
        adapted = model.logits(TOKENS)
        assert relative_error(adapted, expected.logits(TOKENS)) <= TOLERANCE
        assert relative_error(adapted, plain) > 0.1
        # The cached decode folds B A into the weights, the prefill does not.
        reply = list(model.tokens(TOKENS[0][:15], 4))
        whole = model.logits(np.concatenate([TOKENS[0][:15], reply])[None])[0, 14:-1]
        assert reply == np.argmax(whole, axis=-1).tolist()


def test_adapter_of_another_base(v3, tmp_path):
    other, _ = write(tmp_path / "other", V3, seed=7)
    with load(other, dtype="float32") as model:
        random_adapter(tmp_path / "adapter", model.base)
    with pytest.raises(CheckpointError, match=str(tmp_path / "adapter")):
        load(v3, tmp_path / "adapter")


def test_missing_adapter(v3, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        load(v3, tmp_path / "nothing")


def test_wrong_settings(v3):
    with pytest.raises(ConfigError, match="dtype = 'float16'"):
        load(v3, dtype="float16")
    with pytest.raises(ConfigError, match="experts = 'disk'"):
        load(v3, experts="disk")


def test_directory_without_config(v3, tmp_path):
    rewrite(tmp_path, tensors_of(v3))
    with pytest.raises(CheckpointError, match="no config.json"):
        load(tmp_path)


def test_unknown_model_type(v3, tmp_path):
    rewrite(tmp_path, tensors_of(v3))
    (tmp_path / "config.json").write_text(json.dumps(V3 | {"model_type": "deepseek_v9"}))
    with pytest.raises(CheckpointError, match="model_type.*deepseek_v9"):
        load(tmp_path)


def test_config_that_contradicts_the_tensors(v3, tmp_path):
    rewrite(tmp_path, tensors_of(v3))
    (tmp_path / "config.json").write_text(json.dumps(V3 | {"kv_lora_rank": 20, "n_routed_experts": 12}))
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "missing: model.layers.{1-2}.mlp.experts.{8-11}.gate_proj.weight (8)" in message
    assert "wrong shape: [16], expected [20]: model.layers.{0-2}.self_attn.kv_a_layernorm.weight (3)" in message


def test_tokenizer_of_a_larger_vocabulary(v3, tmp_path):
    rewrite(tmp_path, tensors_of(v3))
    (tmp_path / "config.json").write_text(json.dumps(V3))
    write_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=f"ids up to {BYTE_VOCABULARY - 1}, the embedding table 96 rows"):
        load(tmp_path)


def test_generate_without_a_tokenizer(v3):
    with load(v3, dtype="float32") as model, pytest.raises(CheckpointError, match="no tokenizer"):
        model.generate("hello")


def test_template_of_the_adapter_goes_before_the_model_s(tmp_path):
    directory, _ = write(tmp_path / "model", V3 | {"vocab_size": BYTE_VOCABULARY})
    write_tokenizer(directory)
    with load(directory, dtype="float32") as model:
        assert model.tokenizer.render([{"role": "user", "content": "a"}])[0][0] == 256
        base = model.base
    sizes = linears(ModelConfig.from_json(V3))
    spec = lora_targets.resolve(config.Lora(targets=("o_proj",)), sizes)
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}"
    adapters.save(tmp_path / "adapter", lora.init(spec, sizes, jax.random.key(0)), spec, sizes, base=base,
                  chat_template=template)
    with load(directory, tmp_path / "adapter", dtype="float32") as model:
        assert model.tokenizer.render([{"role": "user", "content": "a"}])[0][0] == 258
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<reply>{{ m.content }}{% endfor %}")
    with load(directory, tmp_path / "adapter", dtype="float32", template=tmp_path / "own.jinja") as model:
        assert model.tokenizer.render([{"role": "user", "content": "a"}])[0][0] == 259
