"""Models that reason: what of a reply is prompt and what is trained; tokenizers in the manner of Qwen3 and GLM."""

import json
import unicodedata
from pathlib import Path

import data_toy
import numpy as np
import pytest
import tokenizers

from kjax.data import Tokenizer, templates
from kjax.errors import DataError

DEEPSEEK, KIMI = data_toy.SPECIALS[:6], data_toy.SPECIALS[4:]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"]
GLM = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>",
       "</think>", "/nothink"]  # fmt: skip
SPECIALS = {"deepseek31": DEEPSEEK, "kimi_k2_thinking": KIMI, "kimi_k25": KIMI, "qwen3": QWEN, "qwen3_nothink": QWEN,
            "glm4_moe": GLM}  # fmt: skip
# How the tokenizers of both cut text: contractions, words with one leading sign, single or few digits, signs, spaces.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
PLAIN = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"},
         {"role": "assistant", "content": "the cat"}, {"role": "user", "content": "and?"},
         {"role": "assistant", "content": "sat"}]
THINK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "<think>the mat</think>the cat"},
         {"role": "user", "content": "and?"}, {"role": "assistant", "content": "<think>\nit is\n</think>\n\nsat"}]


def load(directory, name):
    """A small trained tokenizer with a family's special tokens, normalised and cut as Qwen3's and GLM's are."""
    deepseek = SPECIALS[name] is DEEPSEEK
    data_toy.write(directory, specials=tuple(SPECIALS[name]), add_bos_token=deepseek,
                   bos_token=data_toy.BOS if deepseek else None, eos_token=SPECIALS[name][deepseek])
    if SPECIALS[name] in (QWEN, GLM):
        content = json.loads((directory / "tokenizer.json").read_text())
        content["normalizer"] = {"type": "NFC"} if SPECIALS[name] is QWEN else None
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]}
        (directory / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.load(directory, name)


@pytest.fixture(params=SPECIALS)
def tokenizer(request, tmp_path):
    return load(tmp_path, request.param)


EOS = data_toy.EOS
KIMI_SYSTEM = "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
# Without reasoning, with it, and prompts: as the template asks by itself, with and without reasoning. <off> stands for
# what a prompt without reasoning says in the user's turns.
EXPECTED = {
    "deepseek31": (
        f"{data_toy.BOS}be kind<｜User｜>hello<｜Assistant｜></think>[the cat{EOS}]<｜User｜>and?"
        f"<｜Assistant｜></think>[sat{EOS}]",
        f"{data_toy.BOS}<｜User｜>hello<｜Assistant｜><think>[the mat</think>the cat{EOS}]<｜User｜>and?"
        f"<｜Assistant｜><think>[\nit is\n</think>\n\nsat{EOS}]",
        f"{data_toy.BOS}<｜User｜>hello<｜Assistant｜></think>the cat{EOS}<｜User｜>and?<｜Assistant｜>",
        ("</think>", "<think>", "</think>")),
    "kimi_k2_thinking": (
        "<|im_system|>system<|im_middle|>be kind<|im_end|><|im_user|>user<|im_middle|>hello<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>[the cat<|im_end|>]<|im_user|>user<|im_middle|>and?"
        "<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>[sat<|im_end|>]",
        f"{KIMI_SYSTEM}<|im_user|>user<|im_middle|>hello<|im_end|><|im_assistant|>assistant<|im_middle|>"
        "[<think>the mat</think>the cat<|im_end|>]<|im_user|>user<|im_middle|>and?<|im_end|><|im_assistant|>assistant"
        "<|im_middle|>[<think>\nit is\n</think>\n\nsat<|im_end|>]",
        f"{KIMI_SYSTEM}<|im_user|>user<|im_middle|>hello<|im_end|><|im_assistant|>assistant<|im_middle|>"
        "<think></think>the cat<|im_end|><|im_user|>user<|im_middle|>and?<|im_end|><|im_assistant|>assistant"
        "<|im_middle|>",
        ("", "", "<think></think>")),
    "kimi_k25": (
        "<|im_system|>system<|im_middle|>be kind<|im_end|><|im_user|>user<|im_middle|>hello<|im_end|>"
        "<|im_assistant|>assistant<|im_middle|><think></think>[the cat<|im_end|>]<|im_user|>user<|im_middle|>and?"
        "<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>[sat<|im_end|>]",
        "<|im_user|>user<|im_middle|>hello<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
        "[the mat</think>the cat<|im_end|>]<|im_user|>user<|im_middle|>and?<|im_end|><|im_assistant|>assistant"
        "<|im_middle|><think>[\nit is\n</think>\n\nsat<|im_end|>]",
        "<|im_user|>user<|im_middle|>hello<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>the cat"
        "<|im_end|><|im_user|>user<|im_middle|>and?<|im_end|><|im_assistant|>assistant<|im_middle|>",
        ("<think>", "<think>", "<think></think>")),
    "qwen3": (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n[the cat<|im_end|>]\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n[sat<|im_end|>]\n",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[<think>\nthe mat\n</think>\n\nthe cat<|im_end|>]\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n[<think>\nit is\n</think>\n\nsat<|im_end|>]\n",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe cat<|im_end|>\n<|im_start|>user\nand?<|im_end|>"
        "\n<|im_start|>assistant\n",
        ("", "", "<think>\n\n</think>\n\n")),
    "qwen3_nothink": (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        "[the cat<|im_end|>]\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n[sat<|im_end|>]\n",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[<think>the mat</think>the cat<|im_end|>]\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n[<think>\nit is\n</think>\n\nsat<|im_end|>]\n",
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>the mat</think>the cat<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n",
        ("", "", "")),
    "glm4_moe": (
        "[gMASK]<sop><|system|>\nbe kind<|user|>\nhello/nothink<|assistant|>\n<think></think>[\nthe cat<|user|>]"
        "\nand?/nothink<|assistant|>\n<think></think>[\nsat<|user|>]",
        "[gMASK]<sop><|user|>\nhello<|assistant|>[\n<think>the mat</think>\nthe cat<|user|>]\nand?<|assistant|>"
        "[\n<think>it is</think>\nsat<|user|>]",
        "[gMASK]<sop><|user|>\nhello<off><|assistant|>\n<think></think>\nthe cat<|user|>\nand?<off><|assistant|>",
        ("", "", "\n<think></think>")),
}  # fmt: skip


def bracketed(tokenizer, ids, trained) -> str:
    """The text with [ ] around what is trained, token by token."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
    text, at = "", 0
    for begin, end in edges.reshape(-1, 2):
        text += tokenizer.decode(ids[at:begin]) + "[" + tokenizer.decode(ids[begin:end]) + "]"
        at = end
    return text + tokenizer.decode(ids[at:])


def test_what_is_prompt_and_what_is_trained(tokenizer):
    plain, reasoned, prompt, asked = EXPECTED[tokenizer.template.name]
    for messages, expected in ((PLAIN, plain), (THINK, reasoned)):
        assert bracketed(tokenizer, *tokenizer.render(messages)) == expected
    for thinking, end in zip((None, True, False), asked, strict=True):
        ids, trained = tokenizer.render(THINK[:3], add_generation_prompt=True, thinking=thinking)
        expected = prompt.replace("<off>", "/nothink" if thinking is False else "") + end
        assert tokenizer.decode(ids) == expected and not trained.any()
    assert not tokenizer.bos_id or list(ids).count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("space", ["\n", " \n\n"])
@pytest.mark.parametrize("tokenizer", [name for name in SPECIALS if name != "qwen3_nothink"], indirect=True)
def test_white_space_before_reasoning_does_not_double_its_marker(tokenizer, space):
    """Of the templates that know reasoning from the rest of a reply."""
    question, reply = THINK[2:]
    ids, trained = tokenizer.render([question, dict(reply, content=space + reply["content"])])
    expected_ids, expected_trained = tokenizer.render([question, reply])
    assert ids.tolist() == expected_ids.tolist() and trained.tolist() == expected_trained.tolist()
    assert ids.tolist().count(tokenizer.specials["<think>"].id) == 1


def test_a_reply_is_trained_where_generation_would_write_it(tokenizer):
    ids, trained = tokenizer.render(PLAIN[1:3])
    prompt, _ = tokenizer.render(PLAIN[1:2], add_generation_prompt=True, thinking=False)
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert not trained[: len(prompt)].any() and trained[len(prompt)]
    ids, trained = tokenizer.render(THINK[:2])
    prompt, _ = tokenizer.render(THINK[:1], add_generation_prompt=True, thinking=True)
    assert ids[: len(prompt)].tolist() == prompt.tolist() and trained[len(prompt)]


def test_the_token_that_ends_a_reply_stops_generation(tokenizer):
    ends = {"deepseek31": EOS, "glm4_moe": "<|user|>"}
    end = ends.get(tokenizer.template.name, "<|im_end|>")
    assert tokenizer.specials[end].id in tokenizer.eos_ids


def test_glm_says_nothink_once(tmp_path):
    """Where it is text of the tokenizer; where it is a token, what a user types is not that token."""
    data_toy.write(tmp_path, specials=tuple(GLM[:-1]), add_bos_token=False, bos_token=None, eos_token=GLM[0])
    tokenizer = Tokenizer.load(tmp_path, "glm4_moe")
    for said in ("hello", "hello/nothink"):
        ids, _ = tokenizer.render([{"role": "user", "content": said}], add_generation_prompt=True, thinking=False)
        assert tokenizer.decode(ids) == "[gMASK]<sop><|user|>\nhello/nothink<|assistant|>\n<think></think>"
    mixed = [PLAIN[1], PLAIN[2], THINK[2], THINK[3]]
    assert bracketed(tokenizer, *tokenizer.render(mixed)) == (
        "[gMASK]<sop><|user|>\nhello/nothink<|assistant|>\n<think></think>[\nthe cat<|user|>]\nand?<|assistant|>"
        "[\n<think>it is</think>\nsat<|user|>]")


def test_ids_and_mask_equal_transformers(tokenizer):
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{tokenizer.name}/tokenizer.json", bos_token=data_toy.BOS, eos_token=EOS)
    for messages in (PLAIN, THINK):
        theirs = oracle.apply_chat_template(messages, chat_template=tokenizer.chat_template, return_dict=True,
                                            return_assistant_tokens_mask=True)
        ids, trained = tokenizer.render(messages)
        assert ids.tolist() == theirs["input_ids"]
        assert trained.tolist() == [bool(m) for m in theirs["assistant_masks"]]


def test_reasoning_that_a_template_would_lose_is_refused(tmp_path):
    tokenizer = load(tmp_path, "qwen3")
    twice = [THINK[0], {"role": "assistant", "content": "<think>a</think>b<think>c</think>d"}]
    ids, trained = tokenizer.render(twice)
    assert "a</think>b<think>c" in tokenizer.decode(ids[trained])
    source = tokenizer.chat_template.replace("+ reasoning +", "+ reasoning[2:] +")
    assert source != tokenizer.chat_template
    (tmp_path / "loses.jinja").write_text(source)
    with pytest.raises(DataError, match="drops or changes part of the reply '<think>the mat</think>the cat'"):
        Tokenizer.load(tmp_path, str(tmp_path / "loses.jinja")).render(THINK)


def test_text_never_produces_a_special_token(tokenizer):
    honest = [int(i) for i in tokenizer.render(PLAIN[1:3])[0] if tokenizer.is_special(int(i))]
    for text in [*tokenizer.specials, "".join(tokenizer.specials), "<<think>", "<|im_start|>assistant\n<think>"]:
        assert not any(map(tokenizer.is_special, tokenizer.encode(text)))
        messages = [{"role": "user", "content": text}, PLAIN[2]]
        ids = tokenizer.render(messages)[0]
        assert [int(i) for i in ids if tokenizer.is_special(int(i))] == honest, text


@pytest.mark.parametrize("name", ["qwen3", "glm4_moe"])
def test_ids_of_text_are_those_of_the_library(tmp_path, name):
    """Decomposed letters, which Qwen3's tokenizer composes and GLM's does not, among others."""
    tokenizer = load(tmp_path, name)
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*data_toy.TEXT, "e\u0301te\u0301 \n\n 12345 I've <|im_ end|>", "  \r\n\ttabs", "喵" * 40]:
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids
        kept = unicodedata.normalize("NFC", text) if name == "qwen3" else text
        assert tokenizer.decode(tokenizer.encode(text)) == kept


def test_kimi_thinking_is_not_kimi_k25():
    for name in ("kimi_k2_thinking", "kimi_thinking"):
        found = templates.find(name, Path("."), {}, dict.fromkeys(KIMI, 0))
        assert found.name == "kimi_k2_thinking"


def test_the_template_that_is_suggested(tmp_path):
    for names, tokens in (("deepseekr1 deepseek31", DEEPSEEK), ("kimi_k25 kimi_k2_thinking", KIMI), ("qwen3", QWEN),
                          ("glm4_moe", GLM), ("kimi_k2", KIMI[2:]), ("", ["<bos>"])):  # fmt: skip
        assert templates.suggestions(dict.fromkeys(tokens, 0)) == names.split()
