"""The bundled dialogues, the tiny tokenizer and base, and the experiment configs."""

import hashlib
import json
import random
import re
import sys
from pathlib import Path

import jax
import pytest

import kjax
from kjax import config as settings
from kjax import data, gin_config
from kjax.data.tokenizer import Tokenizer
from kjax.errors import CheckpointError
from kjax.models import ModelConfig, abstract_params
from kjax.weights.safetensors import Checkpoint

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
BASE = EXPERIMENTS / "tiny_base"
VOICE = re.compile(r"\b(sailor|Aye|Arr|lamp|Nay|Ahoy)\b")


@pytest.fixture(scope="module")
def scripts():
    """The experiment scripts as modules; they import one another by file name."""
    sys.path.insert(0, str(EXPERIMENTS))
    try:
        import finetune
        import make_tiny_base
        import small_talk
        import tiny_tokenizer

        yield {m.__name__: m for m in (finetune, make_tiny_base, small_talk, tiny_tokenizer)}
    finally:
        sys.path.remove(str(EXPERIMENTS))


def turns(name: str, split: str | None = None) -> list[list[str]]:
    """The conversations of a bundled file, read and checked by the library."""
    path = str(EXPERIMENTS / "data" / name)
    select = {"split": split} if split else {}
    chosen = settings.Data(dataset=path, select=select)
    return [[m["content"] for m in c.as_dicts()] for c in data.load_conversations(path, chosen, select)]


def test_bundle_is_plain_and_voiced():
    plain, train, held = turns("plain.jsonl"), turns("keeper.jsonl", "train"), turns("keeper.jsonl", "eval")
    assert len(plain) >= 300 and len(train) >= 100 and len(held) >= 20
    for talk in train + held:
        for reply in talk[1::2]:
            assert VOICE.search(reply), reply
    plainly = [reply for talk in plain for reply in talk[1::2]]
    assert not any(re.search(r"\b(sailor,|Aye|Arr|Nay|ye)\b", reply) for reply in plainly)
    for talk in plain + train + held:
        assert all(text.isascii() and text == text.strip() and text for text in talk), talk


def test_held_out_questions_are_not_trained():
    plain, train, held = turns("plain.jsonl"), turns("keeper.jsonl", "train"), turns("keeper.jsonl", "eval")
    answers = {talk[0]: talk[1] for talk in plain if len(talk) == 2}
    trained = {text for talk in train for text in talk}
    for question, reply in held:
        assert question not in trained and reply not in trained
        assert question in answers, "the base knows what is asked"
        # Nor does another phrasing of the same question stand in the training rows.
        others = {q for q, a in answers.items() if a == answers[question]}
        assert not others & trained, others & trained
    assert len({q for q, _ in held}) == len(held)


def test_small_talk_is_reproducible_and_right(scripts):
    small_talk = scripts["small_talk"]
    talks = small_talk.generate(random.Random(3), 700)
    assert talks == small_talk.generate(random.Random(3), 700)
    assert talks != small_talk.generate(random.Random(4), 700)
    sums = [reply for talk in talks for reply in talk[1::2] if " plus " in reply]
    for reply in sums:
        a, b, total = re.fullmatch(r"(\w+) plus (\w+) is (\w+)\.", reply).groups()
        number = small_talk.NUMBERS.index
        assert number(a.lower()) + number(b) == number(total), reply
    assert len(sums) == 50
    for talk in talks:
        assert len(talk) % 2 == 0 and all(text[0].isupper() and text[-1] in ".?!" for text in talk), talk
        if len(talk) == 4:
            assert talk[3].removeprefix("Your name is ").rstrip(".") in talk[0], talk


def test_voices_keep_the_answer(scripts):
    small_talk = scripts["small_talk"]
    rng = random.Random(0)
    for _ in range(30):
        question, answer = small_talk.voiced(rng, "What is a friend?", "A friend likes you. More follows.")
        assert question.endswith("What is a friend?") and question != "What is a friend?"
        assert re.search(r"a friend likes (you|ye)\b", answer, re.IGNORECASE) and "More" not in answer, answer


def test_tokenizer_round_trips_any_text():
    tokenizer = Tokenizer.load(BASE)
    for text in ("Hello, sailor!", "天啊，我看了一部电影 1234", "naïve\r\n\ttabs  ", "<｜User｜> is text", "🚢"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not any(tokenizer.is_special(i) for i in ids)


def test_template_matches_transformers(monkeypatch):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(BASE)
    ours = Tokenizer.load(BASE)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"},
                {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "What is the moon?"}]
    for prompt in (False, True):
        ids, mask = ours.render(messages, add_generation_prompt=prompt)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
        assert ids.tolist() == expected
    ids, mask = ours.render(messages[:3])
    trained = ours.decode(ids[mask])
    assert trained == "Hi.<｜end▁of▁sentence｜>"


def test_base_is_a_small_deepseek_v3():
    with Checkpoint(BASE) as checkpoint:
        config = ModelConfig.from_json(checkpoint.config_json)
        bias = checkpoint.read("model.layers.1.mlp.gate.e_score_correction_bias")
        assert checkpoint.entry("model.layers.1.mlp.experts.0.up_proj.weight").dtype == "BF16"
    assert config.model_type == "deepseek_v3" and config.q_lora_rank and config.n_shared_experts
    assert config.num_dense_layers == 1 and config.num_moe_layers >= 2
    assert config.n_group > config.topk_group > 1 and config.num_experts_per_tok > 1
    assert bias.std() > 0.01
    shapes = abstract_params(config, "bfloat16", "device")
    assert 2e6 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 5e6


def test_base_answers_what_it_learned():
    """One question in seven of those it saw; a base that was not trained, or is read wrongly, answers none."""
    talks = [talk for talk in turns("plain.jsonl") if len(talk) == 2][::29]
    with kjax.load(BASE, dtype="float32") as model:
        replies = [model.generate([{"role": "user", "content": question}], max_new_tokens=60) for question, _ in talks]
    right = sum(reply.strip() == answer for reply, (_, answer) in zip(replies, talks, strict=True))
    assert right >= 0.8 * len(talks), list(zip(talks, replies, strict=True))


def test_make_tiny_base_is_reproducible(scripts, tmp_path, monkeypatch):
    make = scripts["make_tiny_base"]
    monkeypatch.setattr(make, "TALKS", 60)
    monkeypatch.setattr(make, "ROWS", 2)
    for name in ("first", "second"):
        make.make(tmp_path / name, None, steps=2, seed=5)
    files = sorted(p.name for p in (tmp_path / "first").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"]
    for name in files:
        first, second = ((tmp_path / run / name).read_bytes() for run in ("first", "second"))
        assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest(), name
    with pytest.raises(CheckpointError, match="already holds model.safetensors"):
        make.make(tmp_path / "first", None, steps=0, seed=5)


def test_make_tiny_base_with_another_tokenizer(scripts, tmp_path):
    make = scripts["make_tiny_base"]
    make.make(tmp_path / "other", BASE, steps=None, seed=0)
    content = json.loads((tmp_path / "other" / "config.json").read_text())
    assert content["vocab_size"] % 64 == 0 and content["vocab_size"] >= Tokenizer.load(BASE).vocab_size
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()
    with kjax.load(tmp_path / "other", dtype="float32") as model:
        assert isinstance(model.generate([{"role": "user", "content": "Hello!"}], max_new_tokens=3), str)


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "configs").glob("*.gin")), ids=lambda p: p.name)
def test_configs_load_and_open_with_claim_and_command(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Claim: ") and "\n# Command: " in text
    bindings = {"DATASET": "rows.json"} if path.name.startswith("tsldial") else {}
    config = gin_config.load(path, bindings)
    assert config.train.run_dir.startswith("runs/")


def test_finetune_reads_its_command_line(scripts):
    args, bindings = scripts["finetune"].arguments(
        ["--gin_file", "a.gin", "--gin.STEPS=3", "--gin_file", "b.gin", "--gin.Lora.rank=4", "--overwrite"])
    assert args.gin_file == ["a.gin", "b.gin"] and args.overwrite and not args.resume
    assert bindings == ["STEPS=3", "Lora.rank=4"]
