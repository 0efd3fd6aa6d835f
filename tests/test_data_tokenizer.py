"""Tokenizers: known ids, equality with tiktoken, text that imitates special tokens, wrong files."""

import base64
import json
import random

import data_toy
import pytest

from kjax.data import Tokenizer, tiktoken_file
from kjax.errors import DataError


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Tokenizer.load(data_toy.write(tmp_path_factory.mktemp("toy")), "deepseekr1")


@pytest.fixture(scope="module")
def deepseek(shared_data):
    return Tokenizer.load(shared_data / "tokenizers" / "deepseek_r1")


@pytest.fixture(scope="module")
def kimi(shared_data):
    return Tokenizer.load(shared_data / "tokenizers" / "kimi_k2")


def dialogue(user, assistant="ok", system=None):
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def specials_of(tokenizer, ids):
    return [tokenizer.decode([i]) for i in ids if tokenizer.is_special(int(i))]


def test_deepseek_ids(deepseek):
    assert deepseek.encode("Hello! 毕老师!1 + 1 = 2")[:5] == [19923, 3, 223, 5464, 5008]
    messages = [{"role": "system", "content": "SYS"}, {"role": "user", "content": "你好"},
                {"role": "assistant", "content": "<think>r</think>喵"}, {"role": "user", "content": "再见"}]
    ids, trained = deepseek.render(messages, add_generation_prompt=True)
    assert ids.tolist() == [0, 53, 20842, 128803, 30594, 128804, 62654, 1, 128803, 50732, 128804]
    assert not trained.any()
    assert (deepseek.vocab_size, deepseek.bos_id, deepseek.eos_ids) == (128815, 0, {1})
    assert deepseek.encode("hi") == [6366]


def test_kimi_ids(kimi):
    assert kimi.encode("Hello, world! 你好，世界！") == [19180, 11, 2695, 0, 220, 33845, 378, 2243, 856]
    ids, trained = kimi.render([{"role": "system", "content": "s"}, *dialogue("hi")])
    assert ids.tolist()[5:10] == [163587, 2482, 163601, 9663, 163586]
    assert kimi.decode(ids[trained]) == "ok<|im_end|>"
    assert (kimi.vocab_size, kimi.bos_id, kimi.eos_ids) == (163840, 163584, {163585, 163586})
    assert kimi.decode([163600]) == "<|reserved_token_163600|>"


def texts(shared_data):
    """Every string of the shared datasets."""
    for path in sorted(shared_data.glob("*.json*")):
        text = path.read_text()
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        pending = list(rows)
        while pending:
            value = pending.pop()
            if isinstance(value, str):
                yield value
            elif isinstance(value, dict):
                pending.extend(value.values())
            elif isinstance(value, list):
                pending.extend(value)


def test_kimi_equals_tiktoken(kimi, shared_data):
    """On all texts at hand, and on random strings of characters where scripts, spaces and quotes meet."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = tiktoken_file.read_ranks(shared_data / "tokenizers" / "kimi_k2" / "tiktoken.model")
    oracle = tiktoken.Encoding("kimi", pat_str=tiktoken_file.PATTERN, mergeable_ranks=ranks, special_tokens={})
    draw = random.Random(0)
    alphabet = "aabcdeIi  \n\r\t'sStT.,!?-_12345é中文字かなカ한국ابпри👩‍🚀\u0301ǅªaaaaaaaa"
    alphabet += "".join(map(chr, range(128, 192)))
    fuzz = ["".join(draw.choices(alphabet, k=draw.randrange(1, 60))) for _ in range(5000)]
    fuzz += [c * n for c in "a中 \n=-1" for n in range(1, 40)]
    cases = sorted({*texts(shared_data), *fuzz})
    assert len(cases) > 20_000
    ours = kimi.bpe.encode_batch(cases, add_special_tokens=False)
    wrong = [case for case, mine, theirs in zip(cases, ours, oracle.encode_ordinary_batch(cases), strict=True)
             if mine.ids != theirs]
    assert not wrong, wrong[:3]


def test_deepseek_equals_the_library(deepseek, shared_data):
    """Taking the special tokens out of tokenizer.json changes nothing for text without them."""
    import tokenizers

    oracle = tokenizers.Tokenizer.from_file(str(shared_data / "tokenizers" / "deepseek_r1" / "tokenizer.json"))
    cases = sorted(set(texts(shared_data)))[::5]
    theirs = oracle.encode_batch(cases, add_special_tokens=False)
    ours = deepseek.bpe.encode_batch(cases, add_special_tokens=False)
    assert [e.ids for e in ours] == [e.ids for e in theirs]


@pytest.mark.parametrize("which", ["toy", "deepseek", "kimi"])
def test_text_never_produces_a_special_token(which, request):
    tokenizer = request.getfixturevalue(which)
    honest = specials_of(tokenizer, tokenizer.render(dialogue("x", system="x"))[0])
    named = sorted(tokenizer.specials, key=lambda text: ("reserved" in text or "place" in text, text))[:40]
    attacks = [*named, "".join(named), " ".join(named), *(f"a{text}b" for text in named[:9]),
               *(text[:cut] for text in named[:9] for cut in (1, 2, -1)), "<<think>", "[[EOS]]"]
    for text in attacks:
        assert not specials_of(tokenizer, tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == tokenizer.bpe.encode(text, add_special_tokens=False).ids
    rendered = tokenizer.render_all([dialogue(t, system=t) for t in attacks], attacks)
    for text, (ids, _) in zip(attacks, rendered, strict=True):
        assert specials_of(tokenizer, ids) == honest, text
        assert tokenizer.decode(ids).count(text) >= 2
    replies = [text for text in attacks if "think>" not in text]
    for text, (ids, trained) in zip(replies, tokenizer.render_all([dialogue("x", t, "x") for t in replies], replies),
                                    strict=True):
        assert specials_of(tokenizer, ids) == honest, text
        assert tokenizer.decode(ids[trained]).startswith(text)


def test_texts_that_meet_make_no_special_token(tmp_path):
    """The end of one message and the start of the next may spell one together."""
    (tmp_path / "t.jinja").write_text("{{ messages | map(attribute='content') | join }}{{ eos_token }}")
    tokenizer = Tokenizer.load(data_toy.write(tmp_path / "toy"), str(tmp_path / "t.jinja"))
    cuts = [(special[:cut], special[cut:]) for special in ("<think>", data_toy.EOS, "<|im_end|>")
            for cut in range(1, len(special))]
    rendered = tokenizer.render_all([dialogue(*cut) for cut in cuts], [str(cut) for cut in cuts])
    for (left, right), (ids, _) in zip(cuts, rendered, strict=True):
        assert specials_of(tokenizer, ids) == [data_toy.BOS, data_toy.EOS]
        assert tokenizer.decode(ids) == data_toy.BOS + left + right + data_toy.EOS


def test_a_vocabulary_that_lists_special_tokens(tmp_path):
    """Words that stand in the vocabulary are taken whole where ignore_merges says so: special ones must not be."""
    directory = data_toy.write(tmp_path, specials=["<think>"])

    def add(content):
        content["model"]["vocab"]["zebra"] = 999
        content["model"]["ignore_merges"] = True
        content["added_tokens"].append(content["added_tokens"][0] | {"content": "zebra", "id": 999})

    tokenizer = Tokenizer.load(rewrite(directory, add))
    assert tokenizer.specials["zebra"].id == 999
    assert 999 not in tokenizer.encode("zebra") and tokenizer.decode(tokenizer.encode("zebra")) == "zebra"


def test_only_a_reply_may_think(toy):
    think = toy.specials["<think>"].id
    assert think in toy.render(dialogue("x", "<think>a</think>b"))[0]
    assert think not in toy.render(dialogue("<think>a</think>b"))[0]
    assert think not in toy.render(dialogue("x", system="<think>"))[0]


def test_noncharacters_pass_through(toy):
    for text in ("\ufdd0", "a\ufdd0\ufdd1\ufdd2b<think>", "".join(map(chr, range(0xFDD0, 0xFDED)))):
        ids, trained = toy.render(dialogue(text, text.replace("<think>", "")))
        assert toy.decode(ids[trained]) == text.replace("<think>", "") + data_toy.EOS
        assert text in toy.decode(ids)
    with pytest.raises(DataError, match="noncharacters U\\+FDD0"):
        toy.render(dialogue("".join(map(chr, range(0xFDD0, 0xFDF0)))))


@pytest.mark.parametrize("message, error", [
    ({"role": "user"}, "must have a role"), ("hello", "must have a role"),
    ({"role": "tool", "content": "x"}, "must have a role"),
    ({"role": "user", "content": "x", "name": "<|im_end|>"}, "nothing else"),
    ({"role": "user", "content": None}, "content must be text"), ({"role": "user", "content": "\ud800"}, "surrogate"),
])
def test_wrong_messages(toy, message, error):
    with pytest.raises(DataError, match=error):
        toy.render([message], add_generation_prompt=True)


@pytest.mark.parametrize("add, written, leading", [
    (True, 0, 1), (True, 1, 1), (True, 2, 1), (False, 0, 0), (False, 1, 1), (False, 2, 1)])
def test_first_token_once(tmp_path, add, written, leading):
    directory = data_toy.write(tmp_path, "{{ bos_token * " + str(written) + " }}{% for m in messages %}"
                               "{{ m.content + eos_token }}{% endfor %}", add_bos_token=add)
    tokenizer = Tokenizer.load(directory)
    for prompt in (False, True):
        ids = tokenizer.render(dialogue("a"), add_generation_prompt=prompt)[0].tolist()
        assert ids[:leading] == [tokenizer.bos_id] * leading
        assert tokenizer.bos_id not in ids[leading:]


def test_stop_ids_come_from_all_files(tmp_path):
    directory = data_toy.write(tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    tokenizer = Tokenizer.load(directory, "kimi_k2")
    assert tokenizer.eos_ids == {7, 8, tokenizer.specials[data_toy.EOS].id, tokenizer.specials["<|im_end|>"].id}


def test_white_space_that_belongs_to_a_special_token(tmp_path):
    directory = data_toy.write(tmp_path, "{% for m in messages %}{{ m.content + ' <|im_end|> ' }}{% endfor %}")
    content = json.loads((directory / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["lstrip"] = token["rstrip"] = token["content"] == "<|im_end|>"
    (directory / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode(tokenizer.render(dialogue("a", "b "))[0]) == data_toy.BOS + "a<|im_end|>b<|im_end|>"


def test_decode(toy):
    ids = [*toy.encode("a喵"), toy.specials["<think>"].id, *toy.encode("b")]
    assert toy.decode(ids) == "a喵<think>b"
    assert toy.decode(ids, skip_special=True) == "a喵b"
    assert toy.decode(toy.encode("喵")[:-1]).endswith("\ufffd") or len(toy.encode("喵")) == 1
    assert toy.decode([]) == ""


def test_hash_names_what_ids_depend_on(tmp_path):
    first, other = (Tokenizer.load(data_toy.write(tmp_path / name), template)
                    for name, template in (("a", "deepseek3"), ("b", "deepseekr1")))
    assert first.hash == Tokenizer.load(tmp_path / "a", "deepseek3").hash != other.hash


def rewrite(directory, change):
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("change, message", [
    (lambda c: c["model"].update(type="Unigram"), "not a BPE tokenizer"),
    (lambda c: c.update(model=None), "not a BPE tokenizer"),
    (lambda c: c["added_tokens"].append({"content": "x"}), "malformed added_tokens"),
    (lambda c: c["added_tokens"].append({"content": "the", "id": 999}), "merges produce the special token 'the'"),
    (lambda c: c["added_tokens"].append({"content": "<x>", "id": c["added_tokens"][0]["id"]}), "share an id"),
    (lambda c: c["added_tokens"].append({"content": "", "id": 999}), "needs a text and an id"),
    (lambda c: c.update(normalizer={"type": "Lowercase"}), "does not give a text back: 'Hello! "),
    (lambda c: c.update(decoder=None), "does not give a text back"),
    (lambda c: c.update(pre_tokenizer={"type": "Nonsense"}), "tokenizer.json"),
    (lambda c: c["model"]["merges"].append(["zzz", "yyy"]), "tokenizer.json"),
])
def test_wrong_tokenizer_json(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        Tokenizer.load(rewrite(data_toy.write(tmp_path), change))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DataError, match="no tokenizer.json and no tiktoken.model"):
        Tokenizer.load(tmp_path)
    directory = data_toy.write(tmp_path / "toy")
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json"):
        Tokenizer.load(directory)
    (directory / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(DataError, match="chat_template must be text"):
        Tokenizer.load(directory)
    (directory / "tokenizer.json").write_text('{"model"')
    with pytest.raises(DataError, match="tokenizer.json"):
        Tokenizer.load(directory)


def tiktoken_lines():
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"he", b"the"]
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


def test_a_small_tiktoken_file(tmp_path):
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(tiktoken_lines()))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("the") == [258]
    assert tokenizer.encode("hthe") == [ord("h"), 256, ord("e")] or tokenizer.encode("hthe") == [ord("h"), 258]
    assert tokenizer.vocab_size == 259 + 256


def test_small_vocabularies_equal_tiktoken():
    """Vocabularies full of ties, of tokens with several splits, and of tokens that no merge reaches."""
    tiktoken = pytest.importorskip("tiktoken")
    draw = random.Random(1)
    for _ in range(60):
        tokens = [bytes([b]) for b in range(256)]
        while len(tokens) < 256 + 12:
            pool = [token for token in tokens if set(token) <= set(b"ab")]
            token = draw.choice(pool) + draw.choice(pool) if draw.random() < 0.8 else bytes(draw.choices(b"ab", k=4))
            if token not in tokens and len(token) < 9:
                tokens.append(token)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        ours = tiktoken_file.convert(ranks)
        oracle = tiktoken.Encoding("small", pat_str=tiktoken_file.PATTERN, mergeable_ranks=ranks, special_tokens={})
        words = ["".join(draw.choices("ab", k=draw.randrange(1, 14))) for _ in range(40)]
        words += [token.decode() for token in tokens[256:]]
        assert [e.ids for e in ours.encode_batch(words)] == oracle.encode_ordinary_batch(words)


def test_how_kimi_cuts_text():
    text = "I've 12345 中文abc  x\n\n don't!? WHO'S  end  "
    cut = tiktoken_file.convert({bytes([b]): b for b in range(256)}).pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in cut] == [
        "I've", " ", "123", "45", " ", "中文", "abc", " ", " x", "\n\n", " don't", "!?", " WHO'S", " ", " end", "  "]


@pytest.mark.parametrize("change, message", [
    (lambda lines: [*lines[:300], b"!! 259"], "line 260: not a base64 token"),
    (lambda lines: [*lines, b"AAA="], "not a base64 token and its rank"),
    (lambda lines: [*lines, lines[-1]], "line 260: rank 258 is out of order"),
    (lambda lines: [*lines, base64.b64encode(b"the") + b" 259"], "its token was there before"),
    (lambda lines: lines[:200], "no token for byte 0xc8: truncated"),
    (lambda lines: [], "no token for byte 0x00"),
])
def test_wrong_tiktoken_files(tmp_path, change, message):
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(change(tiktoken_lines())))
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(b"\n".join(tiktoken_lines()))
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"9999": {"content": "[BOS]"}}}')
    with pytest.raises(DataError, match="'9999' is not one of the 256 ids from 259 on"):
        Tokenizer.load(tmp_path)
