"""`kjax eval` and `kjax predict`: the loss is that of training, replies are those of one row alone, and what was
interrupted goes on."""

import importlib
import json

import jax
import numpy as np
import pytest
import tiny

import kjax
from kjax import cli, judged, metrics, progress, step
from kjax import run as runs
from kjax.config import Config
from kjax.errors import CheckpointError, ConfigError, DataError, RunError
from kjax.load import Model

evaluating = importlib.import_module("kjax.evaluate")
predicting = importlib.import_module("kjax.predict")
NEW = {"max_new_tokens": 6, "batch": 3}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A run with eight rows held out."""
    directory = tmp_path_factory.mktemp("judged")
    run = kjax.train(tiny.settings(directory, data__val_size=8.0, train__save_steps=2), console=tiny.quiet())
    return directory, run


def test_the_loss_is_that_of_training(job, capsys):
    directory, run = job
    found = kjax.evaluate(run, console=tiny.quiet())
    assert (found.loss, found.rows, found.dropped) == (run.eval_losses[-1], 8, 0)
    assert found.perplexity == pytest.approx(2.718281828459045 ** found.loss)
    log = [json.loads(line) for line in (run.directory / "trainer_log.jsonl").read_text().splitlines()]
    assert round(found.accuracy, 6) == [entry["eval_accuracy"] for entry in log if "eval_loss" in entry][-1]
    # The same from whole forward passes.
    config, right = settings_of(run), 0
    with kjax.load(config.model.directory, run.adapter, "float32") as model:
        rows = kjax.data.tokenize(kjax.data.held_out(config.data, config.train.seed), model.tokenizer, config.data)
        for ids, trained in rows.examples:
            best = np.asarray(model.logits(ids[None])).argmax(-1)[0, :-1]
            right += int(((best == ids[1:]) & trained[1:]).sum())
    assert found.accuracy == right / found.targets and found.targets == rows.report.trained_tokens
    # Of the base, of an earlier state, by the command line, of settings.
    assert kjax.evaluate(run.directory, base=True, console=tiny.quiet()).loss == run.eval_losses[0]
    earlier = kjax.evaluate(run, adapter=run.directory / "checkpoints/2/adapter", console=tiny.quiet())
    assert earlier.loss not in run.eval_losses and "checkpoints/2" in earlier.model
    assert cli.main(["eval", "--run", str(run.directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == run.eval_losses[-1]
    settings = tiny.settings(directory, data__val_size=8.0, model__adapter=str(run.adapter))
    assert kjax.evaluate(settings, console=tiny.quiet()).loss == run.eval_losses[-1]


def test_other_rows_and_settings(job, capsys):
    directory, run = job
    other = tiny.rows(directory / "other.jsonl", 5, seed=9)
    assert cli.main(["eval", "--run", str(run.directory), "--dataset", str(other), "--gin.Data.limit=3"]) == 0
    assert "rows          3" in capsys.readouterr().out
    # What the run said of its own rows does not count for others, neither does a bracket in a name for a style.
    limited = tiny.settings(directory, model__adapter=str(run.adapter), data__limit=2, data__format="messages")
    assert kjax.evaluate(limited, dataset=other, console=tiny.quiet()).rows == 5
    console = tiny.quiet()
    console.print(evaluating.Evaluation("/[v2]model[/x]", 1.0, 0.5, 4, 2, 0, 0))
    assert "/[v2]model[/x]" in console.file.getvalue()
    arguments = ["eval", "--model", str(directory / "model"), "--dataset", str(other), "--json"]
    assert cli.main([*arguments, "--gin.Model.dtype='float32'"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 5 and "no adapter" in told["model"]
    assert cli.main([*arguments, "--adapter", str(run.adapter), "--gin.Model.dtype='float32'"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] != told["loss"]


@pytest.mark.variant
def test_the_loss_with_experts_on_the_host_and_4_bits(tmp_path):
    """Experts' adapters that live on the host, and an embedding table that does."""
    settings = tiny.settings(tmp_path, model__weights="nf4", lora__targets=("experts", "q_b_proj"),
                             lora__experts_home="host", train__steps=2, train__micro_rows=2)
    run = kjax.train(settings, console=tiny.quiet())
    assert kjax.evaluate(run, console=tiny.quiet()).loss == run.eval_losses[-1]


def test_the_template_is_that_of_training(job, tmp_path):
    """Also for the base alone; Data.template goes first."""
    directory, run = job
    template = run.adapter / "chat_template.jinja"
    for base in (False, True):
        assert judged.settings(run, base=base).data.template == str(template)
    assert judged.settings(tiny.settings(directory, data__template="chatml")).data.template == "chatml"


@pytest.mark.variant
def test_what_cannot_be_evaluated(job, tmp_path, monkeypatch, capsys):
    directory, run = job
    settings = tiny.settings(directory, data__val_size=0.0)
    with pytest.raises(DataError, match="no rows to evaluate on: name a dataset"):
        kjax.evaluate(settings, console=tiny.quiet())
    with pytest.raises(ConfigError, match="--base"):
        kjax.evaluate(settings, base=True, dataset=directory / "rows.jsonl")
    with pytest.raises(RunError, match="not a run directory"):
        kjax.evaluate(tmp_path)
    assert cli.main(["eval", "--model", str(directory / "model"), "--gin.Data.val_size=3"]) == 2
    assert "name a dataset (--dataset FILE)" in capsys.readouterr().err
    monkeypatch.setattr(evaluating, "_score", lambda *_: step.Score(float("nan"), 1.0, 0.0))
    with pytest.raises(RunError, match="a loss of nan; try Model.dtype"):
        kjax.evaluate(run, console=tiny.quiet())


def replies(directory):
    return [json.loads(line) for line in (directory / predicting.REPLIES).read_text().splitlines()]


def test_replies_are_those_of_each_row_alone(job, tmp_path):
    _, run = job
    console = tiny.quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "LINE_SECONDS", 0.0)
        found = kjax.predict(run, tmp_path / "out", console=console, **NEW)
    assert "replying 0/8 rows, token 1 of up to 6" in console.file.getvalue()
    rows = kjax.data.held_out(settings_of(run).data, settings_of(run).train.seed)
    assert [line["label"] for line in found.replies] == [row.messages[-1].content for row in rows]
    assert found.replies == replies(tmp_path / "out") and len(rows) == 8
    with kjax.load(settings_of(run).model.directory, run.adapter, "float32") as model:
        for line, row in zip(found.replies, rows, strict=True):
            assert line["predict"] == model.generate(row.as_dicts()[:-1], max_new_tokens=6)
            assert row.messages[0].content in line["prompt"] and row.messages[-1].content not in line["prompt"]
    results = json.loads((tmp_path / "out" / predicting.RESULTS).read_text())
    assert results == found.results and results["predict_samples"] == 8
    assert results["predict_tokens"] == sum(line["tokens"] for line in found.replies)
    if not metrics.missing():
        assert {"predict_bleu-4", "predict_rouge-l", "predict_exact"} < set(results)


def settings_of(run) -> Config:
    return runs.settings(run.directory)[0]


@pytest.mark.variant
def test_an_interrupted_call_goes_on(job, tmp_path, monkeypatch, capsys):
    """Whole groups are kept, a group that was not complete is made again, with the same draws."""
    _, run = job
    options = ["predict", "--run", str(run.directory), "--max_new_tokens", "6", "--batch", "3", "--temperature", "1",
               "--seed", "5"]
    assert cli.main([*options, "--out", str(tmp_path / "whole")]) == 0
    original, calls = Model.tokens_of_all, []

    def interrupted(self, prompts, *args, **kwargs):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Model, "tokens_of_all", interrupted)
    out = tmp_path / "parts"
    assert cli.main([*options, "--out", str(out)]) == 130
    assert "the same command goes on" in capsys.readouterr().err and not (out / predicting.REPLIES).exists()
    lines = (out / predicting.PARTIAL).read_text().splitlines(keepends=True)
    assert len(lines) == 6
    (out / predicting.PARTIAL).write_text("".join(lines[:5]) + lines[5][:9])  # cut short in the second group
    assert cli.main([*options, "--out", str(out)]) == 0
    assert calls == [3, 3, 2, 3, 2], "the second group and the third"
    assert replies(out) == replies(tmp_path / "whole")
    assert cli.main([*options, "--out", str(out)]) == 0 and len(calls) == 5, "nothing is left to do"
    assert not (out / predicting.PARTIAL).exists()
    monkeypatch.undo()
    options[options.index("--batch") + 1] = "8"
    assert cli.main([*options, "--out", str(tmp_path / "together")]) == 0
    assert replies(tmp_path / "together") == replies(out), "a row draws by its number, not by its company"


@pytest.mark.variant
def test_predictions_are_not_mixed_or_lost(job, tmp_path, monkeypatch):
    _, run = job
    out = tmp_path / "out"
    kjax.predict(run, out, console=tiny.quiet(), **NEW)
    before = replies(out)
    with pytest.raises(RunError, match="something else .other: adapter.; .*--overwrite"):
        kjax.predict(run, out, base=True, **NEW)
    with pytest.raises(RunError, match="other: max_new_tokens"):
        kjax.predict(run, out, max_new_tokens=7, batch=3)
    with pytest.raises(RunError, match="other: adapter"):  # and a call that fails takes nothing away
        kjax.predict(run, out, base=True, **NEW)
    monkeypatch.setattr(judged, "load", lambda *_, **__: pytest.fail("the replies are there"))
    assert kjax.predict(run, out, console=tiny.quiet(), max_new_tokens=6, batch=5).replies == before
    monkeypatch.undo()
    kjax.predict(run, out, base=True, overwrite=True, console=tiny.quiet(), **NEW)
    assert replies(out) != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="holds no predictions; give a new directory"):
            kjax.predict(run, tmp_path / "mine", overwrite=overwrite, **NEW)
    lines = (out / predicting.REPLIES).read_text().splitlines(keepends=True)
    first = json.dumps(json.loads(lines[0]) | {"predict": 5}) + "\n"
    for damaged, said in (("".join(lines[1:]), "does not hold the rows"), ("".join(lines)[:-9], "cannot be read"),
                          (first + "".join(lines[1:]), "does not hold the rows")):
        (out / predicting.REPLIES).write_text(damaged)
        with pytest.raises(RunError, match=f"{said}.*--overwrite makes it anew"):
            kjax.predict(run, out, base=True, **NEW)
    found = kjax.predict(run, out, base=True, overwrite=True, console=tiny.quiet(), **NEW)
    assert "".join(lines) == (out / predicting.REPLIES).read_text() and len(found.replies) == 8
    (out / predicting.SETTINGS).write_text('{"identity": ["a"]}')
    with pytest.raises(RunError, match="something else"):
        kjax.predict(run, out, base=True, **NEW)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/below: Not a directory"):
        kjax.predict(run, tmp_path / "file" / "below", **NEW)


def test_texts_with_line_breaks_of_all_kinds(job, tmp_path, monkeypatch):
    directory, run = job
    odd = "one\u2028two\x85three\nfour\r\nfive\x0c"
    (directory / "odd.jsonl").write_text(json.dumps({"instruction": odd, "output": odd}) + "\n")
    monkeypatch.setattr(Model, "tokens_of_all", lambda self, prompts, *_, **__: [self.tokenizer.encode(odd)])
    for _ in range(2):
        (line,) = kjax.predict(run, tmp_path / "out", dataset=directory / "odd.jsonl", console=tiny.quiet(),
                               **NEW).replies
        assert line["predict"] == line["label"] == odd and odd in line["prompt"]


def test_a_call_that_ran_out_of_memory_can_be_mended(job, tmp_path, monkeypatch):
    _, run = job
    original, sizes = Model.tokens_of_all, []

    def failing(self, prompts, *args, **kwargs):
        sizes.append(len(prompts))
        if len(prompts) > 3 or len(sizes) == 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return original(self, prompts, *args, **kwargs)

    monkeypatch.setattr(Model, "tokens_of_all", failing)
    for new in (7, 6):  # a call that has made nothing does not stand in the way of others
        sizes.clear()
        with pytest.raises(RunError, match=f"memory ran out for 4 rows with prompts of up to .* of {new}; .*--batch"):
            kjax.predict(run, tmp_path / "out", max_new_tokens=new, batch=4)
    with pytest.raises(RunError, match="memory ran out for 3 rows"):
        kjax.predict(run, tmp_path / "out", max_new_tokens=6, batch=3)
    found = kjax.predict(run, tmp_path / "out", max_new_tokens=6, batch=2, console=tiny.quiet())
    assert sizes == [4, 3, 3, 2, 2, 2] and found.results["predict_samples"] == 8, "three were kept"


def test_a_full_disk_is_told(job, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predicting.Place, "add", full)
    monkeypatch.setattr(Model, "tokens_of_all", lambda self, prompts, *_, **__: [[5]] * len(prompts))
    with pytest.raises(RunError, match="out: cannot be written .No space left on device.; finished replies are kept"):
        kjax.predict(job[1], tmp_path / "out", **NEW)


def test_only_replies_of_the_same_are_gone_on_from(tmp_path):
    mine, other = {"rows": "a", "seed": 0}, {"rows": "a", "seed": 1}
    place = predicting.Place(tmp_path, mine, False)
    place.begin()
    place.add([{"row": 3, "predict": "x", "tokens": 1, "seconds": 0.5}])
    for overwrite in (False, True):
        assert list(predicting.Place(tmp_path, mine, overwrite).lines) == [3]
    with pytest.raises(RunError, match="other: seed"):
        predicting.Place(tmp_path, other, False)
    anew = predicting.Place(tmp_path, other, True)
    assert not anew.lines
    anew.begin()
    assert not predicting.Place(tmp_path, other, False).lines, "those of the other are gone"


def test_choices_and_a_missing_package(job, tmp_path, monkeypatch):
    directory, run = job
    questions = directory / "questions.jsonl"
    questions.write_text("".join(json.dumps({"instruction": f"question {n}", "output": "ABC"[n % 3]}) + "\n"
                                 for n in range(4)))
    monkeypatch.setattr(Model, "tokens_of_all", lambda self, prompts, *_, **__:
                        [self.tokenizer.encode("The answer is B.")] * len(prompts))
    found = kjax.predict(run, tmp_path / "choices", dataset=questions, console=tiny.quiet(), **NEW)
    assert (found.results["predict_accuracy"], found.results["predict_answered"]) == (25.0, 100.0)
    # Where the template begins the reasoning, what does not end it is no answer.
    template = tmp_path / "reasons.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>\n' if add_generation_prompt }}")
    reasons = tiny.settings(directory, data__template=str(template))
    found = kjax.predict(reasons, tmp_path / "reasons", dataset=questions, console=tiny.quiet(), **NEW)
    assert (found.results["predict_accuracy"], found.results["predict_answered"]) == (0.0, 0.0)
    monkeypatch.setitem(metrics.PACKAGES, "no_such_module", "no-such-package")
    console = tiny.quiet()
    found = kjax.predict(run, tmp_path / "text", console=console, **NEW)
    assert "no-such-package" in console.file.getvalue() and "predict_bleu-4" not in found.results
    with pytest.raises(ConfigError, match="pip install .*no-such-package"):
        kjax.predict(run, tmp_path / "asked", score="text", **NEW)
    assert not (tmp_path / "asked").exists()
    monkeypatch.undo()
    if not metrics.missing():
        found = kjax.predict(run, tmp_path / "text", console=tiny.quiet(), **NEW)
        assert found.results["predict_bleu-4"] >= 0


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"batch": 0}, ConfigError, "batch = 0"), ({"batch": 2.5}, ConfigError, "batch = 2.5"),
    ({"score": "bleu"}, ConfigError, "score = 'bleu'"), ({"temperature": -1.0}, ConfigError, "temperature"),
    ({"thinking": True}, ConfigError, "does not ask whether a reply may reason"),
    ({"adapter": "gone"}, CheckpointError, "gone/adapter_config.json: No such file"),
])  # fmt: skip
def test_wrong_arguments(job, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        kjax.predict(job[1], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_is_too_long_is_named(job, tmp_path):
    directory, run = job
    long = directory / "long.jsonl"
    long.write_text(json.dumps({"instruction": "x", "output": "y"}) + "\n"
                    + json.dumps({"instruction": "x" * 5000, "output": "y"}) + "\n")
    with pytest.raises(DataError, match=r"long.jsonl.*2.*: a prompt of 500\d tokens, the model reads"):
        kjax.predict(run, tmp_path / "out", dataset=long)


def test_progress_without_a_terminal(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    console = tiny.quiet()
    with progress.counted(console, "replying", 5, "rows", 2) as done:
        done(0, "token 7")
        done(1)
        done(2)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "replying 2/5 rows, token 7" and lines[1].startswith("replying 3/5 rows, remaining 0:00:0")
    assert len(lines) == 2, "none for the last: what follows tells"
