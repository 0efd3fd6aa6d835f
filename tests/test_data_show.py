"""What is shown of the data: trained tokens coloured, special tokens visible, nothing a row could act with."""

import dataclasses
import json

import data_toy
import pytest
from rich.console import Console

from kjax import config, data
from kjax.data import show

ROW = {"instruction": "hello [bold]you[/bold] <b>", "output": "<think>the</think>cat 喵 \x1b[31m & <i>"}


@pytest.fixture
def settings(tmp_path):
    rows = [ROW, {"instruction": "a", "output": "the cat sat on the mat " * 30},
            {"instruction": "cat " * 200, "output": "a"}]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    data_toy.write(tmp_path / "toy")
    return config.Config(model=config.Model(directory=str(tmp_path / "toy")),
                         data=config.Data(dataset=str(tmp_path / "d.json"), template="deepseekr1", max_length=128),
                         train=config.Train(run_dir="unused"))


def printed(settings, colour):
    console = Console(width=100, force_terminal=colour, color_system="truecolor" if colour else None, record=True,
                      file=open("/dev/null", "w"))
    show.show(settings, rows=2, console=console)
    console.file.close()
    return console.export_text(styles=colour)


def test_samples_and_report(settings):
    text = " ".join(printed(settings, colour=False).split())
    assert "hello [bold]you[/bold] <b><｜Assistant｜>⟦<think>the</think>cat 喵 \\x1b[31m & <i>" in text
    assert "<i><｜end▁of▁sentence｜>⟧" in text
    assert "d.json, row 1" in text and "d.json, row 2: 128 tokens, cut from" in text
    for fact in ("rows │ 2 ", "2 of 3 rows (66.67%) to 128 tokens", "dropped │ 1 rows",
                 "steps per epoch │ 1 of 2 packed rows (the data do not fill 16), "):
        assert fact in text, fact


def test_rows_are_shown_with_the_template_of_the_adapter_that_is_trained_on(settings, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}as the adapter has it: "
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}")
    model = dataclasses.replace(settings.model, adapter=str(tmp_path / "adapter"))
    without = dataclasses.replace(settings, model=model, data=dataclasses.replace(settings.data, template=None))
    assert "as the adapter has it: ⟦<think>the" in printed(without, colour=False)
    assert "as the adapter has it" not in printed(dataclasses.replace(settings, model=model), colour=False)


def test_rows_are_held_out_as_the_run_does(settings, tmp_path):
    rows = [{"instruction": f"a {number}", "output": "the cat"} for number in range(20)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    shown = {}
    for seed in (0, 3):
        made = dataclasses.replace(settings, data=dataclasses.replace(settings.data, val_size=2.0),
                                   train=dataclasses.replace(settings.train, seed=seed))
        tokenizer = data.Tokenizer.load(made.model.directory, "deepseekr1")
        _, held = data.load(made.data, tokenizer, seed)
        shown[seed] = printed(made, colour=False).rsplit("padding", 1)[1]
        assert all(f"{example.where}:" in shown[seed] for example in held.examples)
    assert shown[0] != shown[3]


def test_colours(settings):
    text = printed(settings, colour=True)
    assert "\x1b[32mthe" in text  # trained: green
    assert "\x1b[2mhello" in text  # prompt: dim
    assert "\x1b[1;7;32m<｜end▁of▁sentence｜>" in text
    assert "\x1b[36m<｜User｜>" in text
    assert "\x1b[31m" not in text  # the row's own escape sequence is spelled out


def test_html(settings):
    tokenizer = data.Tokenizer.load(settings.model.directory, "deepseekr1")
    dataset, _ = data.load(settings.data, tokenizer)
    page = show.preview(dataset, tokenizer, rows=[0], title="a < b")._repr_html_()
    assert "&lt;b&gt;" in page and "<b>hello" not in page and "<i>" not in page and "a &lt; b" in page
    assert "&lt;｜end▁of▁sentence｜&gt;" in page
    assert page.count("<pre") == 1 and "2 of 3 rows" in page


def test_spans_cover_the_ids(settings):
    tokenizer = data.Tokenizer.load(settings.model.directory, "deepseekr1")
    [example, *_] = data.load(settings.data, tokenizer)[0].examples
    shown = list(show.spans(example, tokenizer))
    assert "".join(s.text for s in shown) == tokenizer.decode(example.ids).replace("\x1b", "\\x1b")
    assert "".join(s.text for s in shown if s.trained) == tokenizer.decode(
        example.ids[example.trained]).replace("\x1b", "\\x1b")
    assert [s.text for s in shown if s.special] == [
        data_toy.BOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", data_toy.EOS]
