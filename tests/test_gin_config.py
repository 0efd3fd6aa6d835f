"""Gin files: what they may hold, what is refused with file and line, and the way back to text."""

import math
import re
import threading
import typing
import warnings
from dataclasses import replace

import pytest

from kjax import config, gin_config, gin_names, gin_reader
from kjax.errors import ConfigError

COMPLETE = "Model.directory = 'base'\nData.dataset = 'rows.jsonl'\nTrain.run_dir = 'runs/x'\n"
GIVEN = ("Model.directory=base", "Data.dataset=rows.jsonl", "Train.run_dir=runs/x")


@pytest.fixture
def gin(tmp_path):
    """Writes a gin file and returns its path; bytes go in as they are."""
    def write(content, name="run.gin"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return write


def test_files_then_command_line(gin):
    base = gin("RANK = 4\nLora.rank = %RANK\nLora.alpha = 8.0\n" + COMPLETE, "base.gin")
    later = gin("Lora.alpha = 9.0\nOptimizer:\n  learning_rate = 2e-4\n  beta1 = 0.8\n", "later.gin")
    resolved = gin_config.resolve([base, later], ["RANK=16", "--gin.Optimizer.beta1=0.7"])
    assert resolved.config.lora == config.Lora(rank=16, alpha=9.0)
    assert resolved.config.optimizer == config.Optimizer(learning_rate=2e-4, beta1=0.7)
    assert resolved.origins["Lora.alpha"] == f"{later}:1"
    assert resolved.origins["Optimizer.learning_rate"] == f"{later}:3"
    assert resolved.origins["Lora.rank"] == f"{base}:2, %RANK from --gin.RANK=16"
    assert resolved.origins["Optimizer.beta1"] == "--gin.Optimizer.beta1=0.7"
    assert "Lora.dropout" not in resolved.origins


def test_bindings_from_python():
    given = {"Model.directory": "m", "Data.dataset": "d", "Train.run_dir": "r"}
    loaded = gin_config.load(bindings=given | {"Lora.rank": 2})
    assert (loaded.model.directory, loaded.lora.rank) == ("m", 2)


def test_include_beside_the_file_and_packaged(gin, tmp_path):
    gin("RANK = 3\n", "parts/rank.gin")
    run = gin("include 'lora.gin'\ninclude 'parts/rank.gin'\nMODEL = 'm'\nDATASET = 'd'\nRUN_DIR = 'r'\n")
    loaded = gin_config.load(run)
    assert loaded.lora.rank == 3 and loaded.model.directory == "m"
    assert gin_config.resolve(run).origins["Lora.rank"].endswith(f"%RANK from {tmp_path}/parts/rank.gin:1")


@pytest.mark.parametrize("name", [p.name for p in sorted(gin_reader.PACKAGED.glob("*.gin"))])
def test_packaged_configs_load_by_name(name):
    loaded = gin_config.load(name, ["MODEL=m", "DATASET=d", "RUN_DIR=r"])
    assert loaded.data.dataset == "d"
    with pytest.raises(ConfigError) as error:
        gin_config.load(name)
    assert all(f"{macro} has no value" in str(error.value) for macro in ("MODEL", "DATASET", "RUN_DIR"))


@pytest.mark.parametrize("line, message", [
    ("import os", r"`import os`: .*imports and dynamic registration are refused"),
    ("from os import path", r"`from os import path`"),
    ("from __gin__ import dynamic_registration", "dynamic registration are refused"),
    ("Lora.rank = @os.system()", r"Lora.rank = @os.system\(\): .*calls nothing"),
    ("Lora.rank = @Model", "Lora.rank = @Model: .*calls nothing"),
    ("Data.select = {'a': [@x()]}", r"@x\(\)"),
    ("UNUSED = @x()", r"@x\(\)"),
    ("Lora.alpha = 1e400", "not finite"),
    ("Lora.alpha = -1e400", "not finite"),
    ("Data.select = {'a': [1e999]}", "not finite"),
    ("Lora.alpha = float('inf')", "cannot read float: .*calls and arithmetic"),
    ("Lora.alpha = inf", "cannot read inf"),
    ("Lora.rslora = true", "True, False and None are capitalised"),
    ("Lora.rank = 2 * 4", "Expected newline"),
    ("Lora.rank = 1j", "neither text nor a real number"),
    ("Lora.rank = " + "9" * 5000, "cannot read 9{40}[.]{3}:"),
    ("Lora.targets = " + "(" * 5000, "nested brackets"),
    ("Lora.rank_pattern = {'a': 1, 'a': 2}", "key 'a' is given twice"),
    ("Lora.rank_pattern = {[1]: 2}", "dictionary key"),
    ("lora.rank = 3", "unknown name 'lora'; did you mean Lora"),
    ("Loar.rank = 3", "did you mean Lora"),
    ("something.rank = 3", "did you mean Lora.rank"),
    ("Lora.rnk = 3", "no setting 'rnk'; did you mean rank"),
    ("Train.rank = 3", "did you mean Lora.rank"),
    ("Train.lr = 3", "did you mean Optimizer.learning_rate"),
    ("Lora:\n  rank = 2\n  rnk = 3", None),
    ("train/Lora.rank = 3", "scopes"),
    ("Lora.rank = ", "Unable to parse value"),
    ("Lora.rank", "expected ':' or '='"),
    ("Lora.exclude = 'q_proj", "."),
    ("Lora.rank = $", "."),
    ("'a' = 3", "."),
    ("include 3", "file path as string"),
    ("include 'gone.gin'", "not found in"),
    ("include '../run.gin'", "absolute paths and '..' are refused"),
    ("include '/etc/passwd'", "absolute paths and '..' are refused"),
    ("include 'run.gin'", "includes itself"),
    ("A = %B\nB = %A\nLora.rank = %A", None),
])
def test_refused_with_file_and_line(gin, line, message):
    path = gin(COMPLETE + line + "\n")
    with pytest.raises(ConfigError) as error:
        gin_config.load(path)
    where = {"Lora:\n  rank = 2\n  rnk = 3": (6, "no setting 'rnk'"),
             "A = %B\nB = %A\nLora.rank = %A": (5, "%A -> %B -> %A"),
             "include 'run.gin'": (1, message)}.get(line, (4, message))
    assert str(error.value).startswith(f"{path}:{where[0]}: "), error.value
    if message:
        assert error.match(message)
    else:
        assert where[1] in str(error.value)


def test_nothing_is_executed(gin, tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for line in ("import trap", "from trap import x", "Lora.rank = @trap.x()",
                 "from __gin__ import dynamic_registration\nimport trap"):
        with pytest.raises(ConfigError):
            gin_config.load(gin(COMPLETE + line + "\n"))


@pytest.mark.parametrize("content, message", [
    (b"\xef\xbb\xbfLora.rank = 1\n", ":1: starts with a byte-order mark"),
    (b"\xff\xfeL\x00", ":1: starts with a byte-order mark"),
    (b"Lora.rank = 1\nLora.alpha = \xff\n", ":2: not UTF-8"),
    (b"# a\n\nLora.rank = \x00 1\n", ":3: holds a NUL"),
    (b"# " + b"x" * (1 << 20), ":1: larger than"),
    (b"Lora.rank = 1\nLora.targets = (\n'a',\n\n\n", ":2: a bracket or a quote is not closed"),
    (b"Lora.rank = 1\nLora:\n  rank = 2\n", ":3: Lora.rank is already bound at"),
    (b"RANK = 1\nRANK = 2\n", ":2: RANK is already bound at"),
    (b"kjax.Lora.rank = 1\nLora.rank = 2\n", ":2: Lora.rank is already bound at"),
])
def test_broken_files(gin, content, message):
    path = gin(content)
    with pytest.raises(ConfigError) as error:
        gin_config.load(path, GIVEN)
    assert f"{path}{message}" in str(error.value)


def test_includes_do_not_leave_the_directory(gin, tmp_path):
    outside = gin("RANK = 1\n", "outside.gin")
    run = gin("include 'linked.gin'\n", "inner/run.gin")
    (run.parent / "linked.gin").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"run.gin:1: include 'linked.gin': the link leads out of"):
        gin_config.load(run, GIVEN)
    gin("include 'run.gin'\n", "inner/other.gin")
    gin("include 'other.gin'\n", "inner/run.gin")
    with pytest.raises(ConfigError, match="run.gin -> other.gin -> run.gin"):
        gin_config.load(run, GIVEN)


def test_an_include_that_takes_a_value_away_is_told(gin):
    gin("A = %gin.REQUIRED\nLora.rank = %A\nLora.alpha = %gin.REQUIRED\n", "base.gin")
    path = gin("A = 4\nLora.alpha = 2.0\ninclude 'base.gin'\n")
    with pytest.raises(ConfigError) as error:
        gin_config.load(path, GIVEN)
    told, also = sorted(str(error.value).splitlines())
    assert f"base.gin:1: A has no value (Lora.rank needs it); it overrides {path}:1, because later lines win" in told
    assert f"base.gin:3: Lora.alpha has no value; it overrides {path}:2, because" in also
    path = gin("include 'base.gin'\nA = 4\nLora.alpha = 2.0\n")
    assert gin_config.load(path, GIVEN).lora.rank == 4


def test_all_missing_values_at_once_and_wrong_ones_beside_them(gin):
    path = gin("A = %gin.REQUIRED\nLora.rank = %A\nLora.alpha = %B\nOptimizer.beta1 = 2.0\n"
               "Train.run_dir = %gin.REQUIRED\n")
    with pytest.raises(ConfigError) as error:
        gin_config.load(path)
    assert str(error.value).splitlines() == [
        f"{path}:1: A has no value (Lora.rank needs it); add A = ... or --gin.A=...",
        f"{path}:3: B has no value (Lora.alpha needs it); add B = ... or --gin.B=...",
        f"{path}:5: Train.run_dir has no value; add Train.run_dir = ... or --gin.Train.run_dir=...",
        "Model.directory is not set; add Model.directory = ... or --gin.Model.directory=...",
        "Data.dataset is not set; add Data.dataset = ... or --gin.Data.dataset=...",
        f"{path}:4: Optimizer.beta1 = 2.0: must be in [0, 1)",
    ]


@pytest.mark.parametrize("line, message", [
    ("Lora.rank = 'sixteen'", "run.gin:4: Lora.rank = 'sixteen': expected int"),
    ("Optimizer.learning_rate = '1e-4'", "run.gin:4: Optimizer.learning_rate = '1e-4': expected float"),
    ("Lora.targets = 'attention'", "run.gin:4: Lora.targets = 'attention': expected tuple"),
    ("Model.dtype = 'float16'", "run.gin:4: Model.dtype = 'float16': expected Literal"),
    ("Lora.rank = 0", "run.gin:4: Lora.rank = 0: must be positive"),
    ("R = True\nLora.rank = %R", "run.gin:5, %R from {0}:4: Lora.rank = True: expected int"),
])
def test_type_errors_name_the_binding(gin, line, message):
    path = gin(COMPLETE + line + "\n")
    with pytest.raises(ConfigError) as error:
        gin_config.load(path)
    assert message.format(path) in str(error.value)


@pytest.mark.parametrize("binding, key, value", [
    ("Model.directory=/models/base", "Model.directory", "/models/base"),
    ("Model.directory='quoted'", "Model.directory", "quoted"),
    ("Train.run_dir=2026", "Train.run_dir", "2026"),
    ("Model.adapter=None", "Model.adapter", None),
    ("Data.rows=grouped", "Data.rows", "grouped"),
    ("Lora.targets=attention,shared", "Lora.targets", ("attention", "shared")),
    ("Lora.targets=dense", "Lora.targets", ("dense",)),
    ("Lora.targets=('a', 'b')", "Lora.targets", ("a", "b")),
    ("Lora.targets='q_(a|b)_proj'", "Lora.targets", ("q_(a|b)_proj",)),
    ("Lora.rank_pattern={'dense': 4}", "Lora.rank_pattern", {"dense": 4}),
    ("Optimizer.clip_norm=None", "Optimizer.clip_norm", None),
    ("Optimizer.learning_rate=2e-4", "Optimizer.learning_rate", 2e-4),
])
def test_command_line_values(binding, key, value):
    assert gin_config.flat(gin_config.load(bindings=[*GIVEN, binding]))[key] == value


@pytest.mark.parametrize("binding, message", [
    ("Lora.rank=sixteen", "--gin.Lora.rank=sixteen: not a value of type int"),
    ("Lora.rank=16.5", "--gin.Lora.rank=16.5: Lora.rank = 16.5: expected int"),
    ("Lora.rank", "--gin.Lora.rank: give a value"),
    ("Lora.rnk=2", "did you mean rank"),
    ("Lora.alpha=1e400", "not finite"),
    ("Lora.rank=@x()", r"@x\(\): .*calls nothing"),
    ("a/Lora.rank=2", "is not a name"),
    ("Model.directory='open", "keep the quotes from the shell"),
    ("RANK=3", "no setting uses the macro RANK; did you mean Lora.rank"),
    ("Lora.rank=%RANK", r"--gin.Lora.rank=%RANK: RANK has no value"),
    ("include 'x'=3", "is not a name"),
])
def test_command_line_refusals(binding, message):
    with pytest.raises(ConfigError, match=message):
        gin_config.load(bindings=[*GIVEN, binding])


def test_macro_text_has_the_type_of_what_it_fills(gin):
    path = gin("Model.directory = %PLACE\nLora.targets = [%WHAT]\nRANK = 1\nRANKK = %RANK\nLora.rank = %RANKK\n")
    loaded = gin_config.load(path, ["Data.dataset=d", "Train.run_dir=r", "PLACE=a/b", "WHAT=shared", "RANK=7"])
    assert (loaded.model.directory, loaded.lora.targets, loaded.lora.rank) == ("a/b", ("shared",), 7)
    with pytest.raises(ConfigError, match="--gin.RANK=many: not a value of type int"):
        gin_config.load(path, ["RANK=many"])


def test_unused_macros(gin):
    path = gin(COMPLETE + "RANK = 4\nLora.rank = %RANK\nRNAK = 8\n")
    with pytest.warns(UserWarning, match=rf"{path}:6: nothing uses the macro RNAK; did you mean RANK"):
        assert gin_config.load(path).lora.rank == 4
    with pytest.raises(ConfigError, match="no setting uses the macro RANKK; did you mean RANK"):
        gin_config.load(path, ["RANKK=4"])


def test_a_macro_whose_setting_is_overridden_was_used(gin):
    path = gin(COMPLETE + "RANK = 4\nLora.rank = %RANK\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gin_config.load(path, ["Lora.rank=2"]).lora.rank == 2
    with pytest.raises(ConfigError, match="no setting uses the macro RANK"):  # which would have no effect
        gin_config.load(path, ["Lora.rank=2", "RANK=3"])


def test_unknown_file_names_the_packaged_ones():
    with pytest.raises(ConfigError, match="no such gin file; did you mean lora.gin"):
        gin_config.load("lorra.gin")


AWKWARD = config.Config(
    model=config.Model(directory="a 'b' \"c\"\n\\%A ü \ufeff\x00", adapter=None, stash_gb=2),
    data=config.Data(dataset="x", select={"split": "train", "n": [1, 2.5, None, True, {"k": ()}], "": ("a",)},
                     eval_select={"@x()": "%Y"}, val_size=3),
    train=config.Train(run_dir="r", epochs=3, steps=None),
    lora=config.Lora(targets=("attention", r"mlp\..*_proj$"), exclude=("o_proj",), rank_pattern={"dense": 3},
                     alpha_pattern={"shared": 4}),
    optimizer=config.Optimizer(learning_rate=1, epsilon=1e-30, clip_norm=None))


@pytest.mark.parametrize("defaults", [True, False])
def test_text_round_trip(gin, defaults):
    written = gin_config.text(AWKWARD, defaults)
    loaded = gin_config.load(gin(written))
    assert loaded == AWKWARD
    assert gin_config.text(loaded, defaults) == written
    floats = replace(AWKWARD, train=replace(AWKWARD.train, epochs=3.0), optimizer=replace(
        AWKWARD.optimizer, learning_rate=1.0), lora=replace(AWKWARD.lora, alpha_pattern={"shared": 4.0}))
    assert floats == AWKWARD and gin_config.text(floats, defaults) == written  # equal configs, equal texts
    every = sum(len(typing.get_type_hints(cls)) for cls in gin_names.CLASSES.values())
    bindings = [line for line in written.splitlines() if line and not line.startswith("#")]
    assert (len(bindings) == every) is defaults


def test_text_refuses_what_gin_cannot_read():
    for value in (math.nan, {1, 2}, b"x", object()):
        bad = replace(AWKWARD, data=replace(AWKWARD.data, select={"a": value}))
        with pytest.raises(ConfigError, match="Data.select"):
            gin_config.text(bad)


def test_changes_lists_differing_settings():
    other = replace(AWKWARD, lora=replace(AWKWARD.lora, rank=9))
    assert gin_config.changes(AWKWARD, other) == {"Lora.rank": (8, 9)}


def test_loads_do_not_see_each_other(gin):
    paths = [gin(COMPLETE + f"R = {n}\nLora.rank = %R\n", f"{n}.gin") for n in range(1, 9)]
    ranks, errors = {}, []

    def many(n):
        try:
            ranks[n] = {gin_config.load(paths[n - 1]).lora.rank for _ in range(20)}
        except Exception as error:  # noqa: BLE001  a thread's failure must reach the test
            errors.append(error)

    threads = [threading.Thread(target=many, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and ranks == {n: {n} for n in range(1, 9)}
    assert gin_config.load(bindings=GIVEN).lora == config.Lora()  # nothing is left of the files


def test_fallback_fills_only_what_is_missing(gin):
    path = gin("Train.run_dir = %RUN\nModel.directory = 'm'\n")
    loaded = gin_config.load(path, fallback={"Train.run_dir": "none", "Data.dataset": "none", "Model.directory": "x"})
    assert (loaded.train.run_dir, loaded.data.dataset, loaded.model.directory) == ("none", "none", "m")


def test_annotated_text_loads_again(gin):
    resolved = gin_config.resolve(gin(COMPLETE + "Lora.rank = 3\n"))
    shown = gin_config.annotated(resolved)
    assert re.search(r"^Lora.rank = 3 +# .*run.gin:4$", shown, re.MULTILINE)
    assert re.search(r"^Lora.alpha = 16.0 +# default$", shown, re.MULTILINE)
    assert "tokens per step: at most 32,768 (16 rows of 2048)" in shown
    assert gin_config.load(gin(shown, "again.gin")) == resolved.config
