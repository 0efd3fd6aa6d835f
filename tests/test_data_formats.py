"""Formats: what is read from alpaca, sharegpt and messages rows, and what each wrong row is told."""

import json

import pytest

from kjax import config
from kjax.data import load_conversations
from kjax.errors import ConfigError, DataError


def write(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("[" + ",\n".join(lines) + "]" if path.suffix == ".json" else "\n".join(lines) + "\n")
    return str(path)


def turns(conversation):
    return [(m.role, m.content) for m in conversation.messages]


def read(dataset, select=None, **settings):
    return load_conversations(dataset, config.Data(dataset=dataset, **settings), select)


ALPACA = {"instruction": "add", "input": "1 and 2", "output": "3"}
SHAREGPT = {"conversations": [{"from": "system", "value": "be brief"}, {"from": "human", "value": "hi"},
                              {"from": "gpt", "value": "ho"}]}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"},
                         {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"}]}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_formats_are_detected(tmp_path, suffix):
    [alpaca] = read(write(tmp_path / f"a.{suffix}", [ALPACA]))
    assert turns(alpaca) == [("user", "add\n1 and 2"), ("assistant", "3")]
    [sharegpt] = read(write(tmp_path / f"s.{suffix}", [SHAREGPT]))
    assert turns(sharegpt) == [("system", "be brief"), ("user", "hi"), ("assistant", "ho")]
    [messages] = read(write(tmp_path / f"m.{suffix}", [MESSAGES]))
    assert turns(messages) == [("user", "hi"), ("assistant", "ho"), ("user", "and?"), ("assistant", "no")]
    [mixed] = read(write(tmp_path / f"c.{suffix}", [{"conversations": MESSAGES["messages"]}]))
    assert turns(mixed) == turns(messages)


def test_alpaca_joins_prompt_and_query_and_keeps_history(tmp_path):
    path = write(tmp_path / "a.json", [
        {"instruction": "", "input": "only input", "output": "x"},
        {"instruction": "only prompt", "input": None, "output": ""},
        {"instruction": "third", "output": "y", "history": [["a", "b"], ["c", "d"]], "system": "s"}])
    first, second, third = read(path)
    assert turns(first) == [("user", "only input"), ("assistant", "x")]
    assert turns(second) == [("user", "only prompt"), ("assistant", "")]
    assert turns(third) == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
                            ("user", "third"), ("assistant", "y")]


def test_dataset_info_maps_columns_and_tags(tmp_path):
    write(tmp_path / "qa.jsonl", [{"question": "q", "answer": "a", "note": 1}, {"question": "r", "answer": "b"}])
    write(tmp_path / "chat.json", [{"log": [{"who": "me", "said": "hi"}, {"who": "bot", "said": "ho"}], "sys": "s"}])
    (tmp_path / "dataset_info.json").write_text(json.dumps({
        "qa": {"file_name": "qa.jsonl", "columns": {"prompt": "question", "response": "answer"}, "num_samples": 1},
        "chat": {"file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "log", "system": "sys"},
                 "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "me", "assistant_tag": "bot"}}}))
    [qa] = read("qa", dataset_dir=str(tmp_path))
    assert turns(qa) == [("user", "q"), ("assistant", "a")]
    [chat] = read("chat", dataset_dir=str(tmp_path))
    assert turns(chat) == [("system", "s"), ("user", "hi"), ("assistant", "ho")]
    with pytest.raises(ConfigError, match="entry of dataset_info.json says 'sharegpt'"):
        read("chat", dataset_dir=str(tmp_path), format="alpaca")


def test_alpaca_entry_uses_history_only_when_mapped(tmp_path):
    row = ALPACA | {"history": [["a", "b"]]}
    write(tmp_path / "h.json", [row])
    (tmp_path / "dataset_info.json").write_text(json.dumps({
        "plain": {"file_name": "h.json"}, "mapped": {"file_name": "h.json", "columns": {"history": "history"}}}))
    assert len(read("plain", dataset_dir=str(tmp_path))[0].messages) == 2
    assert len(read("mapped", dataset_dir=str(tmp_path))[0].messages) == 4


@pytest.mark.parametrize("entry, message", [
    ({"hf_hub_url": "a/b"}, "hf_hub_url is not supported"),
    ({"ms_hub_url": "a/b", "file_name": "d.json"}, "ms_hub_url is not supported"),
    ({"script_url": "x.py"}, "remote code"),
    ({"file_name": "d.json", "ranking": True}, "ranking is not supported"),
    ({"file_name": "d.json", "subset": "x"}, "subset is not supported"),
    ({"file_name": "d.json", "colums": {}}, "unknown key 'colums'"),
    ({"file_name": "d.json", "columns": {"promt": "instruction"}}, "did you mean 'prompt'"),
    ({"file_name": "d.json", "columns": {"images": "i"}}, "'images' is not supported"),
    ({"file_name": "d.json", "columns": {"kto_tag": "good"}}, r"data.select = {'good': True}.*not name 'good'"),
    ({"file_name": "d.json", "columns": {"prompt": "question"}}, "no column 'question'.*instruction, input, output"),
    ({"file_name": "d.json", "columns": {"system": "sys"}}, "no column 'sys'"),
    ({"file_name": "d.json", "formatting": "kto"}, "'kto' is not one of"),
    ({"file_name": "d.json", "num_samples": 5}, "num_samples = 5, but there are 1 rows"),
    ({"file_name": "d.json", "num_samples": 0}, "positive whole number"),
    ({"file_name": "../d.json"}, "leaves"),
    ({"file_name": "link.json"}, "leaves"),
    ({"file_name": "/etc/passwd"}, "leaves"),
    ({"file_name": "none.json"}, "is no file"),
    ({"file_name": "d.csv"}, "only .json and .jsonl"),
    ({}, "file_name must name a file"),
    ([], "must be an object"),
])
def test_wrong_entries(tmp_path, entry, message):
    inside = tmp_path / "data"
    inside.mkdir()
    write(inside / "d.json", [ALPACA])
    (inside / "d.csv").write_text("a,b\n")
    write(tmp_path / "d.json", [ALPACA])
    (inside / "link.json").symlink_to(tmp_path / "d.json")
    (inside / "dataset_info.json").write_text(json.dumps({"set": entry}))
    with pytest.raises(DataError, match=message):
        read("set", dataset_dir=str(inside))


def test_unknown_dataset_names(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"identity": {"file_name": "x.json"}}))
    with pytest.raises(DataError, match="did you mean 'identity'"):
        read("idenity", dataset_dir=str(tmp_path))
    with pytest.raises(DataError, match="data.dataset_dir"):
        read("identity")
    with pytest.raises(DataError, match="no such file"):
        read(str(tmp_path / "gone.jsonl"))
    (tmp_path / "dataset_info.json").write_text("[1]")
    with pytest.raises(DataError, match="object of entries"):
        read("identity", dataset_dir=str(tmp_path))


@pytest.mark.parametrize("text, message", [
    ("", "holds no rows"),
    ("[]", "holds no rows"),
    ("\n\n", "holds no rows"),
    ('{"output": "a", "input": "b"}\n{"output": }\n', "line 2: invalid JSON"),
    ('[{"output": "a", "input": "b"},]', "invalid JSON"),
    ('[{"output": "a", "input": "b"}, 3]', "row 2: a row must be an object"),
    ('["a"]', "row 1: a row must be an object"),
    ('"text"', "line 1: a row must be an object"),
    ('[{"output": "a", "input": "b"}, {"output": "a", "input": "b", "score": NaN}]', "row 2: NaN"),
    ('{"output": "a", "input": "b", "more": {"deep": [-Infinity]}}', "line 1: -Infinity"),
    ('{"output": "a", "input": "b", "more": 1e999}', "line 1: 1e999"),
    ('{"output": "a", "input": ' + '[' * 100_000, "invalid JSON"),
    ('{"output": 3, "input": "b"}', "line 1: column 'output' must be text, not int"),
    ('{"output": null, "input": "b"}', "column 'output' must be text, not null"),
    ('{"output": "a", "input": ["b"]}', "column 'input' must be text, not list"),
    ('{"output": "a", "input": "b"}\n{"input": "b"}', "line 2: no column 'output'; the row has: input"),
    ('{"output": "a", "input": "", "instruction": ""}', "no prompt: 'instruction' and 'input' empty"),
    ('{"output": "\\ud800", "input": "b"}', "half of a surrogate pair"),
    ('{"output": "a", "input": "b", "history": [["x"]]}', "history pair 1"),
    ('{"output": "a", "input": "b", "history": "x"}', "history must be a list"),
    ('{"question": "a", "answer": "b"}', "cannot tell the format from its columns: question, answer"),
])
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        read(str(path))
    assert "d.jsonl" in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(ALPACA).encode() + b"\n\xff\xfe")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read(str(path))
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ALPACA).encode())
    assert len(read(str(path))) == 1


def message_rows(*roles_and_texts):
    return {"messages": [{"role": r, "content": t} for r, t in roles_and_texts]}


def reasoned(reasoning, text, key="reasoning_content", **more):
    """A row whose reply holds its reasoning beside its text; nulls in the user's message, as some files have them."""
    return {"messages": [{"role": "user", "content": "a", "thinking": None},
                         {"role": "assistant", key: reasoning, "content": text, **more}]}


@pytest.mark.parametrize("row, message", [
    (message_rows(("assistant", "a")), "message 1 is from 'assistant', expected 'user'"),
    (message_rows(("user", "a"), ("user", "b"), ("assistant", "c")), "message 2 is from 'user', expected 'assistant'"),
    (message_rows(("user", "a"), ("assistant", "b"), ("assistant", "c")), "message 3 is from 'assistant'"),
    (message_rows(("user", "a"), ("system", "b"), ("assistant", "c")), "message 2 is from system"),
    (message_rows(("system", "a"), ("system", "b")), "message 2 is from system"),
    (message_rows(("user", "a")), "last message is from user"),
    (message_rows(("system", "a")), "last message is from system"),
    (message_rows(("user", "a"), ("bot", "b")), "from 'bot'; known roles: 'system', 'user', 'assistant'"),
    (message_rows(("user", "a"), ("assistant", "b"), ("tool", "c")), "tool calls are not supported"),
    (message_rows(("user", None), ("assistant", "b")), "message 1 must be text, not null"),
    (message_rows(("user", [{"type": "text"}]), ("assistant", "b")), "message 1 must be text, not list"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}, "weight 0"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [1]}]},
     "message 2 holds tool_calls"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "message 2 has no 'content'"),
    ({"messages": [{"role": "user", "content": "a"}, "b"]}, "message 2 must be an object"),
    ({"messages": [{"role": "user", "content": "a", "reasoning_content": "r"}, {"role": "assistant", "content": "b"}]},
     "message 1 is from 'user' and holds reasoning_content"),
    (reasoned(["r"], "b"), "message 2: reasoning_content must be text, not list"),
    (reasoned([], "b"), "message 2: reasoning_content must be text, not list"),
    (reasoned("r", "\n<think>q</think>b"), "message 2 holds reasoning_content, but also <think>"),
    (MESSAGES | {"label": False}, "column 'label' is not supported"),
    (reasoned("r", "b", thinking="s"), "message 2 holds reasoning_content and thinking, which differ"),
    (reasoned("r", "q</think>b"), "keep its reasoning in one of the two"),
    (reasoned("r</think>", "b"), "keep its reasoning in one of the two"),
    (MESSAGES | {"tools": [{"type": "function"}]}, "column 'tools' is not supported.*dataset_info.json"),
    (MESSAGES | {"tools": '[{"name": "f"}]'}, "column 'tools' is not supported"),
    (MESSAGES | {"chosen": {"role": "assistant", "content": "a"}}, "column 'chosen' is not supported"),
    (MESSAGES | {"rejected": "a"}, "column 'rejected' is not supported"),
    (MESSAGES | {"images": ["a.png"]}, "column 'images' is not supported"),
    (MESSAGES | {"kto_tag": False}, "column 'kto_tag' is not supported"),
    ({"messages": []}, "must be a list of messages"),
    ({"messages": None}, "must be a list of messages"),
])
def test_wrong_turns(tmp_path, row, message):
    path = write(tmp_path / "m.json", [MESSAGES, row])
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert "m.json, row 2" in str(error.value)


@pytest.mark.parametrize("reasoning, text, content", [
    ("Let me add: 4.", "4", "<think>\nLet me add: 4.\n</think>\n\n4"),
    ("\nr\n", "\n\nb ", "<think>\nr\n</think>\n\nb "),
    ("", " b", " b"), ("\n", "b", "b"), (None, "<think>q</think>b", "<think>q</think>b"),
])  # fmt: skip
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_a_reply_goes_before_it(tmp_path, reasoning, text, content, key):
    row = reasoned(reasoning, text, key)
    assert turns(read(write(tmp_path / "m.json", [row]))[0])[1] == ("assistant", content)
    turn = {"from": "gpt", key: reasoning, "value": text}
    row = {"conversations": [{"from": "human", "value": "a"}, turn]}
    assert turns(read(write(tmp_path / "s.json", [row]))[0])[1] == ("assistant", content)


@pytest.mark.parametrize("column, value", [("kto_tag", False), ("images", ["a.png"]), ("label", True)])
def test_an_alpaca_row_that_is_no_text_dialogue(tmp_path, column, value):
    with pytest.raises(DataError, match=f"a.json, row 2: column '{column}' is not supported.*dataset_info.json"):
        read(write(tmp_path / "a.json", [ALPACA, ALPACA | {column: value}]))


def test_wanted_replies_are_selected_by_their_label(tmp_path):
    path = write(tmp_path / "kto.json", [MESSAGES | {"label": label} for label in (True, False, True)])
    with pytest.raises(DataError, match=r"kto.json, row 1: column 'label'.*data.select = {'label': True} keeps"):
        read(path)
    assert [c.where[-5:] for c in read(path, {"label": True})] == ["row 1", "row 3"]


def test_the_same_reasoning_under_two_keys_is_read_once(tmp_path):
    path = write(tmp_path / "m.json", [reasoned("r", "b", thinking="r\n")])
    assert turns(read(path)[0])[1] == ("assistant", "<think>\nr\n</think>\n\nb")


def test_columns_of_an_ordinary_alpaca_file_are_passed_over(tmp_path):
    more = ({"label": "positive"}, {"label": 1}, {"images": []}, {"rejected": "worse"}, {"source": True})
    assert len(read(write(tmp_path / "a.json", [ALPACA | row for row in more]))) == 5


def test_columns_that_hold_nothing_are_passed_over(tmp_path):
    rows = [MESSAGES | {"tools": value, "chosen": None} for value in (None, "", [], "[]")]
    assert len(read(write(tmp_path / "m.json", rows))) == 4
    write(tmp_path / "d.json", [MESSAGES | {"tools": "x"}])
    entry = {"file_name": "d.json", "formatting": "sharegpt", "columns": {"messages": "messages"},
             "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"d": entry}))
    assert len(read("d", dataset_dir=str(tmp_path))) == 1


def test_select_and_limit(tmp_path):
    rows = [ALPACA | {"output": str(i), "split": "train" if i % 2 else "eval", "hard": i > 2} for i in range(6)]
    path = write(tmp_path / "a.json", rows)
    assert [c.messages[-1].content for c in read(path, {"split": "train"})] == ["1", "3", "5"]
    assert [c.messages[-1].content for c in read(path, {"split": "train"}, limit=2)] == ["1", "3"]
    assert [c.messages[-1].content for c in read(path, {"split": "eval", "hard": True})] == ["4"]
    with pytest.raises(DataError, match="no column 'spilt' to select rows by; the file has: instruction, .*, hard"):
        read(path, {"spilt": "train"})
    with pytest.raises(DataError, match="no row has split = 'test'; it holds 'eval', 'train'"):
        read(path, {"split": "test"})
    with pytest.raises(DataError, match="no row has hard = 1"):
        read(path, {"hard": 1})


def test_explicit_format(tmp_path):
    path = write(tmp_path / "a.json", [ALPACA])
    with pytest.raises(DataError, match="no column 'messages' for format messages; the file has"):
        read(path, format="messages")
    assert len(read(path, format="alpaca")) == 1


def test_real_files(shared_data):
    for name, rows in (("nekoqa.json", 1960), ("tsldial.json", 11743)):
        assert len(read(str(shared_data / name))) == rows
    [row, *_] = read(str(shared_data / "tsldial.json"))
    assert turns(row)[0] == ("user", "你有最近看过什么好电影吗？")
    assert [c.messages[0].role for c in read(str(shared_data / "nekoqa.json"), {"split": "eval"})] == ["user"] * 96
