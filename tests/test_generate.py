"""Generation: cached decoding equals whole forward passes and transformers; sampling, stopping, streaming."""

import family_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_goldens import CASES, torch_model
from weights_cases import BYTE_VOCABULARY, V2, V3, random_params, write, write_tokenizer

import kjax.generate
from kjax.errors import ConfigError, DataError, RunError
from kjax.generate import LONG, Generator, TextStream, cache_places, chunks, sample
from kjax.load import load
from kjax.models import Cache, ModelConfig, Transformer, abstract_params, unembed

# All prompts here fit into chunks of 16 and a cache of 128: few compilations.
SHORT = {"max_position_embeddings": 50}
CONTENT = {"v2": V2 | SHORT, "v3": V3 | SHORT | {"rope_scaling": CASES["v3"]["rope_scaling"]}, "long": V3}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(kjax.generate, "LARGEST_CHUNK", 16)


def generator(config_json, params=None, vocabulary=None):
    config = ModelConfig.from_json(config_json)
    variables = {"params": random_params(config_json) if params is None else params}
    return Generator(Transformer(config), vocabulary or config.vocab_size), variables


@pytest.fixture(scope="module")
def v3():
    return generator(CONTENT["v3"])


@pytest.fixture(scope="module")
def v2():
    return generator(CONTENT["v2"])


@pytest.fixture(scope="module")
def long():
    return generator(CONTENT["long"])


@pytest.mark.parametrize(("family", "length"), [("v3", 1), ("v3", 37), ("v2", 1), ("v2", 37), ("long", 123)])
def test_greedy_is_the_argmax_of_a_whole_forward(request, family, length):
    """37 tokens are three chunks of 16, the first padded; 123 fill the first places, and a reply needs more."""
    run, variables = request.getfixturevalue(family)
    prompt = list(np.random.default_rng(length).integers(0, 96, length))
    tokens = list(run.tokens(variables, prompt, 8))

    row = jnp.asarray([prompt + tokens], jnp.int32)
    hidden = jax.jit(run.model.apply)(variables, row, jnp.arange(row.shape[1])[None], jnp.ones_like(row))
    logits = np.asarray(unembed(variables["params"], hidden)[0, length - 1 : -1])
    assert tokens == logits.argmax(axis=-1).tolist()
    best = np.sort(logits, axis=-1)
    assert (best[:, -1] - best[:, -2]).min() > 1e-4  # no near tie that would make the comparison void


@pytest.mark.parametrize("family", ["v3", "v2"])
def test_greedy_equals_transformers(request, family):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    run, variables = request.getfixturevalue(family)
    prompt = np.random.default_rng(3).integers(0, 96, (1, 21))
    expected = torch_model(CONTENT[family], variables["params"]).generate(
        torch.from_numpy(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert list(run.tokens(variables, prompt[0], 24)) == expected[0, 21:].tolist()


def test_a_cache_has_room_for_every_write():
    for prompt in [*range(1, 80), 511, 512, 513, 1000, 4095, 4096, 4097, 9999]:
        padded = sum(chunks(prompt))
        assert prompt <= padded <= max(2 * prompt, kjax.generate.SMALLEST_CHUNK)
        assert max(chunks(prompt)) <= kjax.generate.LARGEST_CHUNK
        for new in (1, 7, 300, 5000):
            assert padded + new <= cache_places(padded, new) <= max(2 * (padded + new), padded + new + LONG)


def test_lengths_share_compiled_steps(v3):
    run, variables = v3
    for length in (1, 3, 9, 16, 40):
        assert len(list(run.tokens(variables, [5] * length, 4, temperature=length % 2))) == 4
    assert run._advance._cache_size() == 2  # a chunk of 16, and one token


def test_padded_ids_are_never_drawn(v3):
    """An embedding table with more rows than the tokenizer has ids."""
    run, variables = v3
    params = random_params(V3)
    params["lm_head"]["weight"][48:] *= 9
    assert max(run.tokens({"params": params}, [1, 2, 3], 8)) >= 48
    run, _ = generator(CONTENT["v3"], params, vocabulary=48)
    assert max(run.tokens({"params": params}, [1, 2, 3], 8)) < 48
    assert max(run.tokens({"params": params}, [1, 2, 3], 8, temperature=5.0)) < 48


def test_sampling_is_repeatable_by_seed(v3):
    run, variables = v3
    draws = [list(run.tokens(variables, [1, 2, 3], 12, temperature=1.0, seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    flat = {"params": variables["params"] | {"lm_head": {"weight": np.zeros((96, 32), np.float32)}}}
    assert len(set(run.tokens(flat, [1, 2, 3], 12, temperature=1.0))) > 6  # equal odds: every step has its own draw
    greedy = list(run.tokens(variables, [1, 2, 3], 12, seed=5))
    assert greedy == list(run.tokens(variables, [1, 2, 3], 12))
    assert greedy == list(run.tokens(variables, [1, 2, 3], 12, temperature=3.0, top_p=1e-6))


sample_all = jax.jit(jax.vmap(sample, (None, 0, None, None)))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_sampled_frequencies(temperature, top_p):
    logits = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.25, 0.2]))
    probs = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    order = np.argsort(-probs)
    kept = order[: 1 + int(np.searchsorted(np.cumsum(probs[order]), top_p))]
    expected = np.zeros(5)
    expected[kept] = probs[kept] / probs[kept].sum()

    count = 20_000
    draws = sample_all(logits, jax.random.split(jax.random.key(0), count), temperature, top_p)
    found = np.bincount(draws, minlength=5) / count
    assert not found[expected == 0].any()
    # Five standard deviations of a share that is counted `count` times.
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count))
    if top_p < 1:
        assert len(kept) == 4


def test_stop_tokens_end_the_reply(v3):
    run, variables = v3
    free = list(run.tokens(variables, [1, 2, 3], 10))
    stop = free[4]
    assert list(run.tokens(variables, [1, 2, 3], 10, stop={stop})) == free[: free.index(stop)]


def test_generation_ends_with_the_model_context(v3):
    run, variables = v3
    with pytest.warns(UserWarning, match="cut after 5 tokens: .* reached max_position_embeddings = 50"):
        assert len(list(run.tokens(variables, [1] * 45, 100))) == 5
    assert len(list(run.tokens(variables, [1] * 45, 5))) == 5, "what was asked for, and no warning"
    with pytest.raises(DataError, match="50 tokens, the model reads max_position_embeddings = 50"):
        next(run.tokens(variables, [1] * 50, 1))


def test_nan_logits_stop_with_the_token_number(v3):
    run, _ = v3
    params = random_params(V3)
    params["norm"]["weight"] = params["norm"]["weight"] * np.float32(np.nan)
    with pytest.raises(RunError, match="logits of token 1 hold NaN or Inf"):
        next(run.tokens({"params": params}, [1, 2], 3))


def together(run, variables, prompts, new, **options):
    """Each prompt's tokens when all are continued at once."""
    steps = list(run.batch(variables, prompts, new, **options))
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]


@pytest.mark.parametrize("family", ["v3", "v2"])
def test_prompts_in_company_continue_as_alone(request, family):
    """Of three lengths, one of which needs a chunk more; one ends before the others, by a token or by the context."""
    run, variables = request.getfixturevalue(family)
    random = np.random.default_rng(9)
    prompts = [list(random.integers(0, 96, length)) for length in (3, 21, 9)]
    alone = [list(run.tokens(variables, prompt, 12)) for prompt in prompts]
    assert together(run, variables, prompts, 12) == alone
    stop = alone[1][4]
    ended = [list(run.tokens(variables, prompt, 12, stop={stop})) for prompt in prompts]
    assert len(ended[1]) < max(map(len, ended))
    assert together(run, variables, prompts, 12, stop={stop}) == ended
    full = [1] * 45
    with pytest.warns(UserWarning, match="cut after 5 tokens"):
        cut = list(run.tokens(variables, full, 12))
    assert together(run, variables, [prompts[0], full], 12) == [alone[0], cut]
    assert together(run, variables, prompts, 12, stop=set(range(96))) == [[], [], []]


@pytest.mark.parametrize("content", [V3, family_cases.content("qwen3_moe", 0)], ids=["mla", "gqa"])
def test_prompts_in_company_in_bfloat16(content):
    """XLA's CPU backend refuses some products of bf16 with fp32 results when they run, and only for several rows."""
    config = ModelConfig.from_json(content)
    params = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), random_params(content),
                          abstract_params(config, "bfloat16", "device"))
    run = Generator(Transformer(config, dtype=jnp.bfloat16), config.vocab_size)
    found = together(run, {"params": params}, [[1, 2, 3], list(range(40)), [7]], 3)
    assert [len(tokens) for tokens in found] == [3, 3, 3]


def test_prompts_in_company_take_the_memory_of_one(v3):
    """Of scores with many places, that is, several MB here; what grows with the rows is the cache, a third of that."""
    run, variables = v3

    def needed(rows: int) -> int:
        cache, keys = Cache.empty(run.model.config, rows, 4096, jnp.float32), jax.random.split(jax.random.key(0), rows)
        arguments = (np.zeros((rows, 16), np.int32), np.zeros(rows, np.int32), np.ones(rows, bool), keys, np.int32(0),
                     np.float32(0), np.float32(1))
        return run._advance.lower(variables, cache, *arguments).compile().memory_analysis().temp_size_in_bytes

    assert needed(8) < 4 * needed(1)


def test_prompts_draw_by_their_number(v3):
    run, variables = v3
    prompts = [[1, 2, 3], [1, 2, 3], [4, 5]]
    first, second, third = together(run, variables, prompts, 12, temperature=1.0, rows=[7, 8, 9])
    assert first != second
    assert together(run, variables, [[4, 5], [1, 2, 3]], 12, temperature=1.0, rows=[9, 7]) == [third, first]
    assert together(run, variables, prompts[:1], 12, temperature=1.0) == [list(run.tokens(variables, [1, 2, 3], 12,
                                                                                          temperature=1.0))]


def test_a_wrong_prompt_or_nan_in_company(v3):
    run, variables = v3
    with pytest.raises(DataError, match="the prompt has 50 tokens"):
        next(run.batch(variables, [[1], [1] * 50], 1))
    with pytest.raises(DataError, match="token id 96"):
        next(run.batch(variables, [[1], [96]], 1))
    params = random_params(V3)
    params["embed_tokens"]["weight"][7] = np.nan
    assert len(next(run.batch({"params": params}, [[1], [2]], 1))) == 2
    with pytest.raises(RunError, match="logits of token 1 hold NaN or Inf"):
        next(run.batch({"params": params}, [[1], [7]], 1))


@pytest.mark.parametrize(("options", "message"), [
    ({"max_new_tokens": 0}, "max_new_tokens = 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5"),
    ({"temperature": -0.1}, "temperature = -0.1"),
    ({"temperature": float("nan")}, "temperature = nan"),
    ({"top_p": 0.0}, "top_p = 0.0"),
    ({"top_p": 1.1}, "top_p = 1.1"),
    ({"seed": -1}, "seed = -1"),
])  # fmt: skip
def test_wrong_settings(v3, options, message):
    with pytest.raises(ConfigError, match=message):
        next(v3[0].tokens(v3[1], [1], **({"max_new_tokens": 1} | options)))


@pytest.mark.parametrize(("prompt", "message"), [([1, 96], "token id 96 at .1. .* 96 rows"), ([-1], "token id -1"),
                                                 ([], "no tokens")])  # fmt: skip
def test_prompts_that_no_model_reads(v3, prompt, message):
    with pytest.raises(DataError, match=message):
        next(v3[0].tokens(v3[1], prompt, 1))


def decode_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "é中文 and 👩‍🚀 in one", "\ufffd is a character too", ""])
def test_streamed_text_comes_in_whole_characters(text):
    stream, pieces = TextStream(decode_bytes), []
    for token in text.encode():
        pieces.append(stream.push(token))
    if "\ufffd" not in text:
        assert stream.flush() == ""
        assert [piece for piece in pieces if piece] == list(text)
    else:
        assert "".join([*pieces, stream.flush()]) == text


def test_streamed_broken_bytes_come_at_the_end():
    stream = TextStream(decode_bytes)
    pieces = [stream.push(token) for token in b"ok\xe4\xb8"]
    assert pieces == ["o", "k", "", ""] and stream.flush() == "\ufffd"
    stream = TextStream(decode_bytes)
    pieces = [stream.push(token) for token in b"\xe4\xb8z\xff!"]
    assert "".join(pieces) + stream.flush() == decode_bytes(b"\xe4\xb8z\xff!")


def test_streaming_does_not_decode_everything_again():
    longest = []
    stream = TextStream(lambda ids: longest.append(len(ids)) or decode_bytes(ids))
    for token in ("long text " * 50).encode():
        stream.push(token)
    assert max(longest) <= 2


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    config_json = V3 | {"vocab_size": BYTE_VOCABULARY + 12}
    directory, _ = write(tmp_path_factory.mktemp("chat") / "model", config_json)
    write_tokenizer(directory)
    with load(directory, dtype="float32") as model:
        yield model


def test_generate_renders_streams_and_stops(chat_model):
    pieces = []
    reply = chat_model.generate([{"role": "user", "content": "Hé"}], max_new_tokens=40, temperature=1.0, seed=1,
                                stream=pieces.append)
    tokenizer = chat_model.tokenizer
    prompt = [256, 258, *tokenizer.encode("Hé"), 259]
    ids = list(chat_model.tokens(prompt, 40, temperature=1.0, seed=1))
    assert len(ids) > 3 and max(ids) < BYTE_VOCABULARY
    assert reply == tokenizer.decode(ids) == "".join(pieces)
    assert all(pieces)
    assert chat_model.generate("Hé", max_new_tokens=40, temperature=1.0, seed=1) == reply
    assert chat_model.generate("Hé", max_new_tokens=40, temperature=1.0, seed=2) != reply


def test_end_of_sentence_ends_the_reply(chat_model, monkeypatch):
    ids = list(chat_model.tokens([256, 258, 70, 259], 12))
    monkeypatch.setattr(chat_model.tokenizer, "eos_ids", frozenset([ids[3]]))
    assert list(chat_model.tokens([256, 258, 70, 259], 12)) == ids[: ids.index(ids[3])]


ASKS = """{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}
{{- "yes" if enable_thinking is not defined or enable_thinking else "no" }}{% endif %}"""


def test_thinking_reaches_the_template(chat_model, monkeypatch, tmp_path):
    template = tmp_path / "asks.jinja"
    template.write_text(ASKS)
    with load(chat_model.directory, dtype="float32", template=template) as model:
        prompts = []
        monkeypatch.setattr(model, "tokens", lambda prompt, *_, **__:
                            prompts.append(model.tokenizer.decode(prompt)) or [])
        for thinking in (None, True, False):
            model.generate("x", thinking=thinking)
    assert [prompt[-3:] for prompt in prompts] == ["yes", "yes", "xno"]
    with pytest.raises(ConfigError, match="thinking = False: the chat template .* does not ask"):
        chat_model.generate("x", thinking=False)
