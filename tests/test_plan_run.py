"""What a plan counts is what a run takes: the adapter that it goes on from, its stash, its saved states."""

import json
import shutil
import types

import adapter_cases
import pytest
from test_plan import TINY, amounts, settings

from kjax import adapter_layouts, adapters, job, models, plan
from kjax.errors import CheckpointError, RunError
from kjax.fit import saves_to_come
from kjax.lora import LoraSpec
from kjax.offload import stash, storage
from kjax.planning.sizes import PROGRAM
from kjax.run_directory import RunDirectory

WIDE = TINY | {"moe_intermediate_size": 512}
ROOMY = plan.Machine(int(64e9), int(1e12))
NEED = 2 * 512 * 2048 * 512 * 2 * 4 * 2  # gate and up, F, rows, tokens, routes, fp32, layers: 17.2 GB
MANY = ("Train.rows_per_step=2048",)


def adapter(directory, content, dropout: float = 0.0) -> tuple[str, LoraSpec]:
    """The setting of an adapter of rank 8 on attention, 5 and 3 on experts, and its spec."""
    spec = adapter_cases.spec_of(content, rank=8, ranks={"gate_proj": 5, "up_proj": 5, "down_proj": 3})
    spec = spec.with_dropout(dropout)
    linears = adapter_cases.sizes(content)
    adapters.save(directory, adapter_cases.random_tree(spec, linears), spec, linears, base=adapters.Base("base"))
    return f"Model.adapter={str(directory)!r}", spec


@pytest.fixture
def wide(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    return tmp_path


def stash_row(made):
    return next(row for row in made.host if row.name == "stash")


def test_the_adapter_that_a_run_goes_on_from_is_planned(wide, monkeypatch):
    setting, spec = adapter(wide / "adapter", WIDE)
    monkeypatch.setattr(adapter_layouts.Reader, "matrix", None)  # no weight is read
    assert adapters.spec(wide / "adapter", adapter_cases.sizes(WIDE)) == spec
    going_on = plan.plan(settings(wide, setting), ROOMY)
    same = plan.plan(settings(wide, "Lora.targets=('attention', 'experts')", "Lora.rank=8",
                              "Lora.rank_pattern={'experts': 5, 'experts.down_proj': 3}"), ROOMY)
    assert going_on.trainable == same.trainable and going_on.device == same.device and going_on.disk == same.disk
    assert amounts(going_on.host) == amounts(same.host)
    assert amounts(going_on.host)["expert adapters"] == 16 * 2 * 8 * (5 + 5 + 3) * (64 + 512)


def test_the_dropout_of_an_adapter_is_planned_unless_another_is_set(wide):
    model = models.ModelConfig.from_json(WIDE)
    setting, _ = adapter(wide / "adapter", WIDE, dropout=0.25)

    def planned(*bindings):
        config = settings(wide, setting, *bindings)
        spec = job.lora_spec(config, models.linears(model))
        return {found.dropout for _, found in spec.entries}, plan.traced(config, model, spec, False).working

    kept, working = planned()
    assert kept == {0.25} and planned("Lora.dropout=0.5") == ({0.5}, working)
    none, less = planned("Lora.dropout=0.0")
    assert none == {0.0} and less < working


def test_an_adapter_that_is_missing_is_refused_as_in_training(wide):
    with pytest.raises(CheckpointError, match="nowhere: no such directory; give the one that holds adapter_config"):
        plan.plan(settings(wide, "Model.adapter='nowhere'"), ROOMY)


@pytest.mark.parametrize("device, bindings, loaded", [
    (1e12, (), lambda made: 0),
    (1e12, ("Model.storage='resident'",), lambda made: amounts(made.host)["routed experts"]),
    (1e12, ("Model.weights='nf4'",), lambda made: amounts(made.host)["embedding table"]),
    (0, (), lambda made: amounts(made.device)["weights"]),
    (0, ("Model.weights='nf4'",), lambda made: amounts(made.device)["weights"] + amounts(made.host)["embedding table"]),
    (1e12, ("adapter",), lambda made: amounts(made.host)["expert adapters"] / 4),  # of master, gradient, two moments
])  # fmt: skip
def test_the_stash_is_what_a_run_would_take(wide, monkeypatch, device, bindings, loaded):
    """Its budget is set when weights and adapter are in memory, experts too where they are copied."""
    bindings = [adapter(wide / "adapter", WIDE)[0] if name == "adapter" else name for name in bindings]
    on = plan.Machine(int(12e9), int(device) or None)
    made = plan.plan(settings(wide, *MANY, *bindings), on)
    free = on.host - PROGRAM - int(loaded(made))
    monkeypatch.setattr(storage, "available", lambda: (free, "are free"))
    monkeypatch.setattr(stash, "_ext", types.SimpleNamespace(stash_budget=lambda size: size))
    assert stash_row(made).amount == stash.set_budget() < NEED
    assert loaded(made) > 0 or not bindings and device


def test_where_memory_is_left_the_plan_says_which_stash_to_set(wide):
    """All of it where that fits, else most of what is left, and only where it is more than the run takes by itself."""
    for host, proposed in ((40e9, 18), (16e9, 12)):
        on = plan.Machine(int(host), int(1e12))
        found = stash_row(plan.plan(settings(wide, *MANY), on))
        assert 0 < found.amount < NEED and found.note.endswith(f"memory is left: set Model.stash_gb = {proposed}")
        better = plan.plan(settings(wide, *MANY, f"Model.stash_gb={proposed}"), on)
        assert better.fits and stash_row(better).amount == min(NEED, proposed * 1e9)
        assert "set Model.stash_gb" not in stash_row(better).note
    roomy = stash_row(plan.plan(settings(wide, *MANY), plan.Machine(int(128e9), int(1e12))))
    assert roomy.amount == NEED and "set Model.stash_gb" not in roomy.note


def test_a_stash_that_the_rest_leaves_no_room_for_is_told(wide):
    """A run would take a quarter whatever comes after it, such as the optimiser of adapters on the host."""
    on = plan.Machine(int(7.2e9), int(1e12))
    content = WIDE | {"n_routed_experts": 64}
    (wide / "config.json").write_text(json.dumps(content))
    experts = ("Lora.targets=('experts',)", "Lora.rank=1120")
    crowded = plan.plan(settings(wide, *MANY, *experts), on)
    assert crowded.problems[0].endswith("It fits with Model.stash_gb = 1"), crowded.problems
    assert plan.plan(settings(wide, *MANY, *experts, "Model.stash_gb=1"), on).fits


def test_products_with_the_adapters_of_experts_are_part_of_the_stash(wide):
    made = plan.plan(settings(wide, adapter(wide / "adapter", WIDE)[0]), ROOMY)
    routes = 16 * 512 * 2 * 2  # of all layers
    assert stash_row(made).amount == routes * (2 * 512 * 4 + (5 + 5 + 3) * 4)


@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("save_steps, steps", [(None, None), (None, 9), (5, 9), (1, 4), (1, 9), (1, None)])
def test_saved_states_are_those_that_a_run_makes_room_for(wide, monkeypatch, keep, save_steps, steps):
    config = settings(wide, f"Train.keep={keep}", f"Train.save_steps={save_steps}", f"Train.steps={steps}")
    made = plan.plan(config, ROOMY)
    planned = int(sum(row.amount for row in made.disk if row.name != "checkpoint of the base"))
    saves = saves_to_come(save_steps, 0, steps or 100)
    with RunDirectory(wide / "run", keep=keep, resume=False, overwrite=False) as directory:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=planned))
        directory.require_space(made.trainable.training_bytes, saves)
        planned -= 1
        with pytest.raises(RunError, match="the saved states need"):
            directory.require_space(made.trainable.training_bytes, saves)
