"""From settings to token rows: splits, cuts, reports, hashes, and ids that the model does not have."""

import json

import data_toy
import numpy as np
import pytest

from kjax import config, data
from kjax.data.dataset import split, tokenize
from kjax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return data.Tokenizer.load(data_toy.write(tmp_path_factory.mktemp("toy")), "deepseek3")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def alpaca(count, prompts=None, **extra):
    return [{"instruction": f"say {i % (prompts or count)}", "input": "", "output": f"the cat sat on {i}"} | extra
            for i in range(count)]


def test_load(toy, tmp_path):
    path = write(tmp_path / "d.jsonl", alpaca(20))
    train, evaluation = data.load(config.Data(dataset=path), toy)
    assert evaluation is None
    report = train.report
    assert report.rows == len(train) == 20 and report.truncated == report.dropped == 0
    assert report.tokens == sum(len(ids) for ids, _ in train.examples)
    assert report.trained_tokens == sum(int(mask.sum()) for _, mask in train.examples)
    assert sum(report.histogram.values()) == 20
    first = train.examples[0]
    assert toy.decode(first.ids[first.trained]) == f"the cat sat on 0{data_toy.EOS}"
    assert first.where.endswith("d.jsonl, line 1")


def test_truncation_is_counted_and_empty_rows_are_dropped(toy, tmp_path):
    long = "the cat sat on the mat and said: " * 20
    rows = [*alpaca(3), {"instruction": "say", "output": long}, {"instruction": long, "output": "x"}]
    path = write(tmp_path / "d.jsonl", rows)
    train, _ = data.load(config.Data(dataset=path, max_length=40), toy)
    report = train.report
    assert (report.rows, report.truncated, report.dropped) == (4, 2, 1)
    assert report.truncated_share == 2 / 5
    assert report.dropped_where == (f"{path}, line 5",)
    assert max(len(e.ids) for e in train.examples) == 40
    assert train.examples[3].length > 40 and train.examples[3].trained[-1]
    assert report.histogram[256] == 2 or report.histogram[512] == 2
    with pytest.raises(DataError, match="no token is left to train on: data.max_length = 3 cuts every row .* shortest"):
        data.load(config.Data(dataset=path, max_length=3), toy)


def test_what_is_trained(toy, tmp_path):
    row = {"messages": [{"role": r, "content": c} for r, c in
                        (("user", "hello"), ("assistant", "cat"), ("user", "and"), ("assistant", "mat"))]}
    path = write(tmp_path / "d.jsonl", [row])

    def trained(**settings):
        [example] = data.load(config.Data(dataset=path, **settings), toy)[0].examples
        return toy.decode(example.ids[example.trained])

    assert trained() == f"cat{data_toy.EOS}mat{data_toy.EOS}"
    assert trained(mask_history=True) == f"mat{data_toy.EOS}"
    assert trained(train_on_prompt=True).startswith(f"{data_toy.BOS}<｜User｜>hello")
    with pytest.raises(ConfigError, match="choose one"):
        trained(train_on_prompt=True, mask_history=True)


def test_evaluation_sets(toy, tmp_path):
    rows = [row | {"split": "eval" if i % 5 == 0 else "train"} for i, row in enumerate(alpaca(20, prompts=6))]
    path, other = write(tmp_path / "d.jsonl", rows), write(tmp_path / "e.jsonl", alpaca(4))
    train, evaluation = data.load(
        config.Data(dataset=path, select={"split": "train"}, eval_select={"split": "eval"}), toy)
    assert (len(train), len(evaluation)) == (16, 4)
    assert evaluation.report.shared_prompts == 4 and train.report.shared_prompts == 0
    assert len(data.load(config.Data(dataset=path, eval_dataset=other), toy)[1]) == 4
    train, evaluation = data.load(config.Data(dataset=path, val_size=0.3), toy)
    assert len(train) + len(evaluation) == 20 and evaluation.report.shared_prompts == 0
    with pytest.raises(ConfigError, match="choose one"):
        data.load(config.Data(dataset=path, eval_dataset=other, val_size=0.1), toy)


def conversations(prompts):
    return [data.Conversation((data.Message("user", p), data.Message("assistant", str(i))), f"row {i}")
            for i, p in enumerate(prompts)]


def test_split_keeps_prompts_together_and_ignores_order():
    rng = np.random.default_rng(0)
    rows = conversations([f"p{i}" for i in rng.integers(0, 60, 200)])
    train, held = split(rows, 0.2, seed=0)
    assert len(held) == 40 and len(train) == 160
    assert not {c.prompt for c in train} & {c.prompt for c in held}
    shuffled = [rows[i] for i in rng.permutation(200)]
    assert {c.where for c in split(shuffled, 0.2, seed=0)[1]} == {c.where for c in held}
    assert {c.where for c in split(rows, 0.2, seed=1)[1]} != {c.where for c in held}
    assert [c.where for c in train] == [c.where for c in rows if c in train]
    assert len(split(rows, 7.0, seed=0)[1]) == 7
    assert split(rows, 0.0, seed=0) == (rows, [])
    spaced = conversations(["a", " a\n", "b", "c"])
    for seed in range(8):
        held = split(spaced, 1.0, seed)[1]
        assert [c.prompt for c in held] in (["b"], ["c"])  # the twins do not fit into one row, and stay together


@pytest.mark.parametrize("prompts, size, error, message", [
    (["a"] * 4, 0.5, DataError, "every prompt has more rows"),
    (["a", "b"], 2.0, DataError, "leaves nothing to train on"),
    (["a", "b"], 0.1, DataError, "not even one"),
    (["a", "b", "c"], 1.5, ConfigError, "a share below 1, or a whole number"),
])
def test_impossible_splits(prompts, size, error, message):
    with pytest.raises(error, match=message):
        split(conversations(prompts), size, 0)


def test_hash(toy, tmp_path):
    path = write(tmp_path / "d.jsonl", alpaca(5))

    def name(tokenizer=toy, **settings):
        return data.load(config.Data(dataset=settings.pop("dataset", path), **settings), tokenizer)[0].hash

    reference = name()
    assert reference == name() == name(dataset=write(tmp_path / "same.jsonl", alpaca(5)))
    others = [name(limit=4), name(max_length=12), name(train_on_prompt=True),
              name(dataset=write(tmp_path / "other.jsonl", alpaca(5)[::-1])),
              name(data.Tokenizer.load(toy.name, "deepseekr1")), name(data.Tokenizer.load(toy.name, "deepseek2"))]
    assert len({reference, *others}) == 7


def test_ids_beyond_the_vocabulary(toy, tmp_path):
    rows = conversations(["hello", "hello"])
    dataset = tokenize(rows, toy, config.Data(dataset="unused"))
    largest = max(int(ids.max()) for ids, _ in dataset.examples)
    data.check_ids(dataset.examples, largest + 1)
    with pytest.raises(DataError, match=f"row 0: token id {toy.bos_id} is outside the model's vocabulary of 300"):
        data.check_ids(dataset.examples, 300)


@pytest.mark.parametrize("directory, name, mean, rows", [
    ("deepseek_r1", "nekoqa.json", 50, (1864, 96)), ("kimi_k2", "tsldial.json", 46, (10201, 1542))])
def test_real_data(shared_data, directory, name, mean, rows):
    """The splits of real data; the mean length of prompt and reply agrees with a count made without templates."""
    tokenizer = data.Tokenizer.load(shared_data / "tokenizers" / directory)
    settings = config.Data(dataset=str(shared_data / name), select={"split": "train"}, eval_select={"split": "eval"})
    train, evaluation = data.load(settings, tokenizer)
    assert (len(train), len(evaluation)) == rows
    assert train.report.truncated == train.report.dropped == evaluation.report.shared_prompts == 0
    empty = tokenizer.render([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}], train=None)[0]
    assert abs(train.report.tokens / len(train) - len(empty) - mean) < 1
