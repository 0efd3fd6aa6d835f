"""Linear layers in few bits: what is stored, what it means, that the model computes with exactly that, and its size."""

import dataclasses
import math
import statistics

import family_cases
import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quantised_cases
import tiny
import weights_cases
from flax.traverse_util import flatten_dict, unflatten_dict
from variant import variant

import kjax
from kjax import config, lora, lora_targets, step
from kjax.errors import ConfigError, DataError
from kjax.models import ModelConfig, Transformer, abstract_params, linears, unembed
from kjax.offload import formats
from kjax.weights import load, lowbit
from kjax.weights.safetensors import Checkpoint

BF16 = ml_dtypes.bfloat16
LOW = ("8bit", "nf4", "int4")
# DeepSeek-R1's config.json, as far as shapes depend on it.
R1 = weights_cases.V3 | {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 3,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "quantization_config": quantised_cases.FP8,
}  # fmt: skip
GLM = family_cases.content("glm4_moe qk_norm", 1) | {"attention_bias": True, "partial_rotary_factor": 0.5}


def weight(shape=(150, 200), seed=0):
    """Normal weights of rows of different size, a block of zeros, one too small for a scale, outliers."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1)))).astype(np.float32)
    w[3, :128] = 0
    w[4, :128] = 1e-44
    w[5, 7], w[6, 9] = 300, -300
    return w


def meaning(form, codes, scales, width):
    """What stored bytes mean, in float64 and number by number, rounded to bf16."""
    rows, columns = lowbit.FORMATS[form].block
    out = np.empty((codes.shape[0], width), np.float64)
    for o, i in np.ndindex(out.shape):
        if form in ("nf4", "int4"):
            nibble = int(codes[o, i // 2]) >> 4 * (i % 2) & 15
            number = float(lowbit.NF4[nibble]) if form == "nf4" else nibble - 8
        else:
            number = float(codes[o, i])
        out[o, i] = number * float(scales[o // rows, i // columns if columns else 0])
    return out.astype(np.float32).astype(BF16)


def device(form, codes, scales, width, dtype="float32"):
    parts = {"codes": jnp.asarray(codes), "scales": jnp.asarray(scales)}
    return np.asarray(jax.jit(lambda p: lowbit.dequantise(form, p, width, dtype))(parts))


def test_nf4_values_are_quantiles_of_the_normal_distribution():
    quantile, edge = statistics.NormalDist().inv_cdf, 0.9677083
    positive = [quantile(edge + (0.5 - edge) * i / 8) for i in range(8)]
    negative = [-quantile(edge + (0.5 - edge) * i / 7) for i in range(7)]
    values = np.sort([*negative, 0.0, *positive])
    np.testing.assert_allclose(lowbit.NF4, values / values.max(), atol=1e-6)


@pytest.mark.parametrize("form", lowbit.FORMATS)
@pytest.mark.parametrize("shape", [(150, 200), (128, 128), (1, 65)])
def test_codes_are_the_nearest_and_mean_what_the_device_reads(form, shape):
    w = weight(shape) if shape[0] > 6 else weight()[10:10 + shape[0], :shape[1]]
    codes, scales = lowbit.quantise(form, w)
    expected = lowbit.shapes(form, shape)
    assert (codes.shape, codes.dtype) == (expected["codes"].shape, expected["codes"].dtype)
    assert (scales.shape, scales.dtype) == (expected["scales"].shape, expected["scales"].dtype)
    meant = meaning(form, codes, scales, shape[1])
    np.testing.assert_array_equal(device(form, codes, scales, shape[1]), meant.astype(np.float32))
    np.testing.assert_array_equal(device(form, codes, scales, shape[1], "bfloat16"), meant)

    # Against the best of all codes: the same distance, but for the rounding of the quotient and of the result.
    rows, columns = lowbit.FORMATS[form].block
    spread = np.repeat(np.repeat(scales.astype(np.float64), rows, 0)[:shape[0]], columns or shape[1], 1)[:, :shape[1]]
    values = {"nf4": lowbit.NF4, "int4": np.arange(-8, 8), "int8": np.arange(-127, 128)}.get(
        form, np.unique(formats._FP8[np.isfinite(formats._FP8)])).astype(np.float64)
    best = np.full(shape, np.inf)
    for value in values:
        best = np.minimum(best, np.abs(value * spread - w))
    error = np.abs(meant.astype(np.float64) - w)
    assert (error <= best + 2**-8 * np.abs(meant.astype(np.float64)) + 2**-22 * np.abs(w) + 1e-40).all()
    # And no number is further off than half a step, of the largest step of the format, or bf16's rounding of a scale.
    step_ = np.diff(np.sort(values)).max() / 2 + 2**-8 * np.abs(values).max()
    clipped = spread if form == "int4" else 0  # its positive side ends at 7
    assert (error <= step_ * np.abs(spread) + np.abs(clipped) + 1e-40).all()


def test_fp8_of_the_device_is_that_of_checkpoints():
    w = weight()
    for form in ("fp8_block", "fp8_channel"):
        codes, scales = lowbit.quantise(form, w)
        out = np.empty(w.shape, np.float32)
        formats.decode(form, codes, scales, out)
        np.testing.assert_array_equal(device(form, codes, scales, w.shape[1]), out)


def quantised(params, weights, quantization=None):
    """(the tree of a device, the whole tree that it means) of a whole fp32 tree."""
    low, meant = {}, {}
    for path, leaf in flatten_dict(params, sep="/").items():
        form = lowbit.of(path, weights, quantization)
        if form is None:
            low[path] = meant[path] = jnp.asarray(leaf)
            continue
        stack = np.asarray(leaf, np.float32).reshape(-1, *leaf.shape[-2:])
        codes, scales = zip(*(lowbit.quantise(form, w) for w in stack), strict=True)
        dense = np.stack([device(form, c, s, leaf.shape[-1]) for c, s in zip(codes, scales, strict=True)])
        meant[path] = jnp.asarray(dense.reshape(leaf.shape))
        for part, arrays in (("codes", codes), ("scales", scales)):
            stacked = np.stack(arrays).reshape(*leaf.shape[:-2], *arrays[0].shape)
            low[f"{lowbit.name(path, form)}/{part}"] = jnp.asarray(stacked)
    return unflatten_dict(low, sep="/"), unflatten_dict(meant, sep="/")


@pytest.mark.parametrize("weights,config_json", [
    pytest.param("8bit", weights_cases.V3, id="8bit-v3"),
    *(variant(weights, weights_cases.V3, id=f"{weights}-v3") for weights in LOW if weights != "8bit"),
    variant("8bit", family_cases.content("qwen3_moe", 1), id="8bit-qwen3_moe"),
    pytest.param("nf4", GLM, id="nf4-glm4_moe"),
    variant("int4", weights_cases.V2 | {"tie_word_embeddings": True}, id="int4-v2 tied"),
])  # fmt: skip
def test_gradients_are_those_of_the_plain_dequantised_model(weights, config_json):
    made = ModelConfig.from_json(config_json)
    low, meant = quantised(weights_cases.random_params(config_json), weights)
    assert jax.tree.map(jnp.shape, {k: v for k, v in low.items() if k != "embed_tokens" or made.tie_word_embeddings}) \
        == jax.tree.map(lambda leaf: leaf.shape, abstract_params(made, "float32", "device", weights))
    groups = {lora.group(path) for path in linears(made)} & {"attention", "shared", "dense"}
    spec = lora_targets.resolve(config.Lora(targets=tuple(sorted(groups)), rank=3), linears(made))
    tree = jax.tree.map(lambda leaf: leaf + 0.02, lora.init(spec, linears(made), jax.random.key(1)))
    tokens = np.random.default_rng(2).integers(0, made.vocab_size, (4, 7)).astype(np.int32)
    table = meant["embed_tokens"]["weight"]
    if not made.tie_word_embeddings:
        low = {name: part for name, part in low.items() if name != "embed_tokens"}
    model = Transformer(made, lora=spec, micro_rows=2)
    batch = {"targets": jnp.asarray(np.roll(tokens, -1, 1)), "segments": jnp.ones_like(tokens),
             "positions": jnp.broadcast_to(jnp.arange(7), tokens.shape)}

    def loss(tree, rows, params):
        total, count = step.batch_loss(model, unembed, 9, tree, params, {**batch, "tokens": rows})
        return total / count

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    found, expected = run(tree, table[tokens], low), run(tree, table[tokens], meant)
    # One arithmetic on equal weights; only how XLA fuses, and so contracts and orders, may differ.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max() + 1e-12
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found))


def traced_step(config_json, weights, layers, dtype="bfloat16", micro_rows=None):
    rows, length = 2, 16
    made = ModelConfig.from_json(config_json | {"num_hidden_layers": layers})
    spec = lora_targets.resolve(config.Lora(rank=2), linears(made))
    params = abstract_params(made, dtype, "device", weights)
    model = Transformer(made, lora=spec, dtype=jnp.dtype(dtype), micro_rows=micro_rows)
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ("targets", "positions", "segments")}
    batch["tokens"] = jax.ShapeDtypeStruct((rows, length, made.hidden_size), dtype)

    def loss(tree, params, batch):
        return step.batch_loss(model, unembed, 32, tree, params, batch)[0]

    return jax.value_and_grad(loss), (lora.abstract(spec, linears(made)), params, batch), made


# Sizes that no activation shares, so that a shape tells a weight.
WIDE = weights_cases.V3 | {"hidden_size": 320, "intermediate_size": 448, "moe_intermediate_size": 192,
                           "q_lora_rank": 136, "kv_lora_rank": 144, "first_k_dense_replace": 1}


@pytest.mark.parametrize("weights", LOW)
def test_no_dequantised_weight_is_saved_for_the_backward_pass(weights):
    """Whatever a scan over layers hands out is saved: none of it has the shape of a weight that was dequantised."""
    layers = 5
    function, arguments, made = traced_step(WIDE, weights, layers, micro_rows=1)
    wide = flatten_dict(abstract_params(made, "bfloat16", "device"), sep="/")
    weights_of = {leaf.shape[-2:] for path, leaf in wide.items() if lowbit.of(path, weights, None)}
    scans, saved = [], []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan" and equation.params["length"] == layers - 1:
                scans.append(equation)
                saved.extend(v.aval for v in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    assert len(scans) == 2, "one forward, one backward"
    stacked = [aval for aval in saved if aval.shape[:1] == (layers - 1,)]
    assert any(aval.shape == (layers - 1, 2, 16, made.hidden_size) for aval in stacked), "the layers' inputs are"
    assert not [aval for aval in saved if aval.shape[-2:] in weights_of or aval.shape[-2:][::-1] in weights_of]


@pytest.mark.plain_xla
@pytest.mark.parametrize("weights", ["nf4", *map(variant, ("8bit", "int4"))])
def test_compiled_memory_holds_one_layer_dequantised(weights):
    """XLA neither hoists the dequantisation out of the scan nor keeps its results: six more layers, and no more
    temporaries than the inputs and the adapter gradients of six layers, of which dequantised ones would be 20 times."""
    sizes = {}
    for layers in (2, 8):
        function, arguments, made = traced_step(WIDE | {"first_k_dense_replace": layers}, weights, layers, "float32")
        memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
        sizes[layers] = memory.temp_size_in_bytes
    wide = flatten_dict(abstract_params(made, "float32"), sep="/")
    layer = sum(math.prod(leaf.shape[1:]) * 4 for path, leaf in wide.items()
                if path.startswith("dense_layers") and lowbit.of(path, weights, None))
    inputs = arguments[2]["tokens"].size * 4
    gradients = sum(leaf.size * 4 for leaf in jax.tree.leaves(arguments[0])) // 8
    assert sizes[8] - sizes[2] <= 6 * (inputs + 2 * gradients) * 1.2 < 6 * layer / 10


def test_deepseek_v3_at_4_bits_fits_in_9_5_gb():
    """All that is outside the routed experts, in exact bytes, from the shapes that the real step takes."""
    made = ModelConfig.from_json(R1)
    numbers = lora.count(abstract_params(made, "bfloat16"))
    assert round(numbers / 1e9, 1) == 17.1
    sizes = {}
    for weights in lowbit.SETTINGS:
        leaves = flatten_dict(abstract_params(made, "bfloat16", weights=weights), sep="/")
        sizes[weights] = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
        if weights != "full":
            assert "embed_tokens/weight" not in leaves and leaves["lm_head/int8/codes"].dtype == jnp.int8
            assert leaves["moe_layers/mlp/gate/weight"].dtype == jnp.float32
            assert leaves["moe_layers/input_layernorm/weight"].dtype == jnp.bfloat16
    assert sizes["nf4"] <= 9.5e9 and sizes["int4"] <= 9.5e9
    assert {name: round(size / 1e9, 2) for name, size in sizes.items()} == {
        "full": 34.45, "8bit": 16.53, "nf4": 9.42, "int4": 9.42}


def write_model(tmp_path, dtype="bfloat16", **changes):
    return tiny.model(tmp_path / "model", dtype, **{"hidden_size": 160, "moe_intermediate_size": 136, **changes})


def params_of(directory, weights, dtype="float32", experts="device"):
    with Checkpoint(directory) as checkpoint:
        made = ModelConfig.from_json(checkpoint.config_json)
        return load.load_params(checkpoint, made, abstract_params(made, dtype, experts), weights)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("weights", LOW)
@pytest.mark.parametrize("kind", [None, "fp8", "channel", "channel_bf16", "int4"])
def test_loading_in_blocks_on_either_path_gives_the_formats_bytes(tmp_path, monkeypatch, weights, kind):
    directory, _ = weights_cases.write(tmp_path / "model", quantised_cases.SIZES)
    if kind is not None:
        directory, *_ = quantised_cases.write(tmp_path, directory, kind)
    full = params_of(directory, "full")
    with Checkpoint(directory) as checkpoint:
        quantization = ModelConfig.from_json(checkpoint.config_json).quantization
        stored = {name: checkpoint.read(name) for name in checkpoint.names()}
    expected, _ = quantised(jax.tree.map(np.asarray, full), weights, quantization)
    monkeypatch.setattr(load, "BLOCK", 150 * 160 * 4)  # 128 rows at a time
    found = {}
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        found[backend] = params_of(directory, weights)
        assert isinstance(found[backend]["embed_tokens"]["weight"], np.ndarray)
    monkeypatch.undo()
    assert_same(found["gpu"], found["cpu"])
    own = lowbit.of("x_proj/weight", weights, quantization)
    if own in ("fp8_block", "fp8_channel"):
        name = "model.layers.1.self_attn.kv_a_proj_with_mqa"
        held = found["cpu"]["moe_layers"]["self_attn"]["kv_a_proj_with_mqa"][own]
        np.testing.assert_array_equal(np.asarray(held["codes"][0]).view(np.uint8),
                                      stored[f"{name}.weight"].view(np.uint8))
        np.testing.assert_array_equal(held["scales"][0], stored[
            f"{name}.weight_scale_inv" if own == "fp8_block" else f"{name}.weight_scale"])
        # So nothing is lost: dequantised, they are the weights of the full format.
        for path, leaf in flatten_dict(found["cpu"], sep="/").items():
            if path.endswith(f"{own}/codes"):
                path = path.removesuffix(f"{own}/codes")
                whole = flatten_dict(full, sep="/")[f"{path}weight"]
                scales = flatten_dict(found["cpu"], sep="/")[f"{path}{own}/scales"]
                for layer in range(len(whole)):
                    meant = device(own, leaf[layer], scales[layer], whole.shape[-1])
                    np.testing.assert_array_equal(meant, whole[layer])
    else:
        assert_same(found["cpu"], expected)


@pytest.mark.parametrize("weights,where", [("nf4", "host"), variant("nf4", "device"), variant("8bit", "host"),
                                           variant("int4", "host")])
def test_a_loaded_model_computes_with_what_its_bytes_mean(tmp_path, weights, where):
    directory = write_model(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    with kjax.load(directory, dtype="float32", experts=where, weights=weights) as model:
        assert model.table is not None and "embed_tokens" not in model.params
        logits = np.asarray(model.logits(tokens))
        reply = list(model.tokens([1, 2, 3], 5))
        with pytest.raises(DataError, match="outside the embedding table"):
            model.logits([[0, 10**6]])
    with kjax.load(directory, dtype="float32", experts=where) as model:
        _, meant = quantised(jax.tree.map(np.asarray, model.params), weights)
        plain, model.params = np.asarray(model.logits(tokens)), meant
        expected = np.asarray(model.logits(tokens))
        assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()
        assert list(model.tokens([1, 2, 3], 5)) == reply
        assert np.abs(logits - plain).max() > 1e-4 * np.abs(plain).max(), "the formats do change the model"


def test_prefill_and_decode_agree_with_whole_rows(tmp_path):
    """Both attention paths over a cache, expanded and absorbed, on quantised weights and adapters."""
    directory = write_model(tmp_path)
    with kjax.load(directory, dtype="float32", weights="nf4") as model:
        prompt = list(range(20))
        reply = list(model.tokens(prompt, 3))
        for number, token in enumerate(reply):
            logits = np.asarray(model.logits([prompt + reply[:number]]))[0, -1]
            assert token == int(logits[:256 + 4].argmax())


@pytest.mark.plain_xla
def test_training_on_low_bit_weights_learns_and_resumes_to_the_same_bits(tmp_path):
    def run(name, **changes):
        settings = tiny.settings(tmp_path, name, **{"train__steps": 4, **changes})
        return dataclasses.replace(settings, model=dataclasses.replace(settings.model, weights="nf4"))

    half = run("half", train__steps=2, optimizer__schedule="constant")
    kjax.train(half)
    longer = dataclasses.replace(half, train=dataclasses.replace(half.train, steps=4))
    resumed = kjax.train(longer, resume=True)
    straight = kjax.train(run("straight", optimizer__schedule="constant"))
    assert straight.losses[-1] < straight.losses[0]
    assert resumed.losses == straight.losses[2:] or resumed.losses == straight.losses
    assert ((resumed.adapter / "adapter_model.safetensors").read_bytes()
            == (straight.adapter / "adapter_model.safetensors").read_bytes())


def test_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="weights = '4bit': expected one of 'full', '8bit', 'nf4', 'int4'"):
        kjax.load(tmp_path, weights="4bit")
    with pytest.raises(ConfigError, match=r"Model\.weights"):
        config.Model(directory="x", weights="4bit")
    assert config.Model.__annotations__["weights"].__args__ == lowbit.SETTINGS
