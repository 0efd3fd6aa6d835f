"""The command line end to end on a tiny model, its exit codes, and that errors are one message without traceback."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
import warnings

import pytest
import tiny

from kjax import chat, cli, gin_config, run
from kjax.errors import ConfigError, RunError


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A directory with a model, rows, and a gin file for a run of two steps; and the run itself."""
    directory = tmp_path_factory.mktemp("cli")
    config = tiny.settings(directory, "run", train__steps=2)
    (directory / "run.gin").write_text(gin_config.text(config, defaults=False))
    assert cli.main(["train", "--gin_file", str(directory / "run.gin")]) == 0
    return directory


def test_train_wrote_a_run(job, capsys):
    assert {"config.gin", "operative_config.gin", "env.json", "adapter"} <= set(os.listdir(job / "run"))
    assert cli.main(["train", "--gin_file", str(job / "run.gin")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kjax: error: ") and "--resume" in error and "Traceback" not in error


@pytest.mark.parametrize("flag, code", [("--resume", 0), ("--overwrite", 130), (None, 143)])
def test_train_passes_flags_in_and_the_exit_code_out(job, monkeypatch, flag, code):
    """A run stopped by SIGINT or SIGTERM tells so; what it does then is tested with the run itself."""
    asked = []

    def fake(config, resume, overwrite):
        asked.append((config.lora.rank, resume, overwrite))
        return run.Run(job, "interrupted", 1, 2, [1.0], [], [], code)
    monkeypatch.setattr(sys.modules["kjax.train"], "train", fake)
    arguments = ["train", "--gin_file", str(job / "run.gin"), "--gin.Lora.rank=7"]
    assert cli.main([*arguments, flag] if flag else arguments) == code
    assert asked == [(7, flag == "--resume", flag == "--overwrite")]


def test_chat_once(job, capsys):
    arguments = ["--message", "say river", "--max_new_tokens", "4", "--system", "be brief"]
    assert cli.main(["chat", "--run", str(job / "run"), *arguments]) == 0
    by_run = capsys.readouterr().out
    assert cli.main(["chat", "--model", str(job / "model"), "--adapter", str(job / "run" / "adapter"), "--dtype",
                     "float32", *arguments]) == 0
    assert by_run.endswith("\n") and capsys.readouterr().out == by_run


@pytest.mark.parametrize(("flags", "thinking"), [([], None), (["--thinking"], True), (["--no-thinking"], False)])
def test_chat_asks_for_reasoning_or_none(job, monkeypatch, flags, thinking):
    asked = []
    monkeypatch.setattr(importlib.import_module("kjax.load").Model, "generate", lambda self, messages, **options:
                        asked.append(options["thinking"]) or "x")
    assert cli.main(["chat", "--model", str(job / "model"), "--message", "x", *flags]) == 0
    assert asked == [thinking]


def test_chat_refuses(job, tmp_path, capsys):
    assert cli.main(["chat", "--run", str(tmp_path), "--message", "x"]) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert cli.main(["chat", "--run", str(job / "run"), "--adapter", "x", "--message", "x"]) == 2
    assert "--adapter goes with --model" in capsys.readouterr().err
    assert cli.main(["chat", "--model", str(tmp_path / "gone"), "--message", "x"]) == 2
    assert "gone" in capsys.readouterr().err
    (tmp_path / "config.gin").write_text(gin_config.text(tiny.settings(job)))
    with pytest.raises(RunError, match="has not saved an adapter yet"):
        run.settings(tmp_path)


def test_conversation():
    asked = []

    def generate(messages, stream):
        asked.append([m["content"] for m in messages])
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        for piece in ("he", "llo"):
            stream(piece)
        return "hello"

    out = io.StringIO()
    lines = "one\n\n/help\nstop\ntwo\n/reset\nthree\n/quit\nnever\n"
    chat.converse(generate, [{"role": "system", "content": "s"}], io.StringIO(lines), out)
    assert asked == [["s", "one"], ["s", "one", "hello", "stop"], ["s", "one", "hello", "two"], ["s", "three"]]
    assert out.getvalue() == f"hello\n{chat.HELP}\n\n(stopped)\nhello\nhello\n"


def test_conversation_ends_with_the_input():
    out = io.StringIO()
    chat.converse(lambda messages, stream: "x", [], io.StringIO(""), out)
    assert out.getvalue() == ""


def test_data_show(job, capsys):
    assert cli.main(["data", "show", "--model", str(job / "model"), "--dataset", str(job / "rows.jsonl"), "--rows",
                     "1", "--gin.Data.max_length=64"]) == 0
    shown = capsys.readouterr().out
    assert "as you wish." in shown and "trained" in shown
    assert cli.main(["data", "show", "--model", str(job / "model")]) == 2
    assert "Data.dataset is not set" in capsys.readouterr().err


def test_config_show(job, capsys):
    assert cli.main(["config", "show", "--gin_file", str(job / "run.gin"), "--gin.Lora.rank=5"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^Lora.rank = 5 +# --gin.Lora.rank=5$", shown, re.MULTILINE)
    assert re.search(rf"^Train.steps = 2 +# {job}/run.gin:\d+$", shown, re.MULTILINE)


def test_plan(job, capsys):
    arguments = ["plan", "--model", str(job / "model"), "--gin.Data.max_length=64", "--gin.Lora.rank=2"]
    assert cli.main([*arguments, "--host_gb", "64", "--device_gb", "64"]) == 0
    assert "fits" in capsys.readouterr().out
    assert cli.main([*arguments, "--json", "--host_gb", "1"]) == 2
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert cli.main([*arguments, "--host_gb", "1"]) == 2
    assert "does not fit" in capsys.readouterr().out
    assert cli.main([*arguments, "--machine", "epyc-9654-4090", "--pcie_gbs", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["machine"]["pcie"] == 1e9 and facts["time"]["transfers"] > 0
    assert cli.main([*arguments, "--machine", "nothing"]) == 2
    assert "epyc-9654-4090" in capsys.readouterr().err
    assert cli.main(["plan"]) == 2
    assert "Model.directory is not set" in capsys.readouterr().err


def test_plan_of_a_published_model(shared_data, capsys):
    path = shared_data / "configs" / "deepseek_r1.json"
    assert cli.main(["plan", "--model", str(path), "--gin_file", "deepseek_v3.gin", "--json",
                     "--host_gb", "1000", "--device_gb", "80"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == 671_026_419_200 and facts["work"]["tokens"] == 8192


def test_env(capsys):
    assert cli.main(["env"]) == 0
    assert "isa" in capsys.readouterr().out
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["kjax"]


@pytest.mark.parametrize("arguments, message", [
    (["train", "--gin.Lora.rnk=3"], "kjax: error: --gin.Lora.rnk=3: Lora has no setting 'rnk'; did you mean rank?"),
    (["train", "--gin.Lora.rank"], "kjax: error: --gin.Lora.rank: give a value"),
    (["train", "--gin_file", "gone.gin"], "kjax: error: gone.gin: no such gin file"),
    (["config", "show", "--gin.Lora.rank=x"], "not a value of type int"),
])
def test_wrong_settings_exit_with_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""


@pytest.mark.parametrize("arguments", [
    [], ["fly"], ["train", "--resume", "--overwrite"], ["chat"], ["chat", "--model", "a", "--run", "b"],
    ["env", "--gin.Lora.rank=3"], ["data"], ["train", "--gin_fil", "x"], ["chat", "--model", "a", "--max_new_tokens=0"],
])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2 and "usage: kjax" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("KJAX_DEBUG", "1")
    with pytest.raises(ConfigError):
        cli.main(["train", "--gin.Lora.rnk=3"])


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(tmp_path, capsys):
    (tmp_path / "run.gin").write_text("Model.directory = 'm'\nData.dataset = 'd'\nTrain.run_dir = 'r'\nRANKS = 4\n")
    assert cli.main(["config", "show", "--gin_file", str(tmp_path / "run.gin")]) == 0
    assert capsys.readouterr().err == f"kjax: warning: {tmp_path}/run.gin:4: nothing uses the macro RANKS; " \
        "did you mean Lora.rank?\n"
    assert warnings.showwarning is not cli._show_warning


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(gin_config, "resolve", interrupted)
    assert cli.main(["config", "show"]) == 130
    assert capsys.readouterr().err == "kjax: interrupted\n"


def run_module(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "kjax", *arguments], capture_output=True, text=True, timeout=120,
                          check=False, **options)


def test_module_and_help_import_nothing_heavy():
    done = run_module("--help")
    assert done.returncode == 0 and "train" in done.stdout
    program = ("import sys\nfrom kjax import cli\ntry:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
               "heavy = {'jax', 'numpy', 'flax', 'gin', 'rich'} & set(sys.modules)\n"
               "sys.exit(str(heavy) if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_platforms_without_cpu_stop_a_chat(job):
    done = run_module("chat", "--model", str(job / "model"), "--message", "x",
                      env=os.environ | {"JAX_PLATFORMS": "cuda"})
    assert done.returncode == 2
    assert done.stderr.startswith("kjax: error: JAX_PLATFORMS=cuda leaves out the CPU backend")


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(f"{sys.executable} -m kjax env | head -n 1", shell=True, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.stdout.startswith("versions") and done.stderr == ""
