"""Machines: named, described, measured; and the time of a step on one, by hand and against a real step."""

import dataclasses
import json

import jax
import pytest
import tiny

from kjax import plan
from kjax.errors import ConfigError
from kjax.planning import machine as machines
from kjax.planning import probe

MODEL = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8,
         "q_lora_rank": 192, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
         "moe_intermediate_size": 512, "n_routed_experts": 16, "num_experts_per_tok": 4}


def test_memory_of_this_machine_and_of_others(monkeypatch):
    monkeypatch.delenv(plan.FRACTION, raising=False)
    assert plan.machine(host_gb=2, device_gb=1).host == int(2e9)
    assert plan.machine().host > 0 and not plan.machine().timed
    # 1 GiB stays for the CUDA context whatever JAX may take.
    assert plan.machine(host_gb=2, device_gb=24).usable == int(0.9 * 24e9)
    assert plan.machine(host_gb=2, device_gb=4).usable == int(4e9) - 2**30
    monkeypatch.setenv(plan.FRACTION, "0.5")
    assert plan.machine(host_gb=2, device_gb=24).usable == int(12e9)
    monkeypatch.setenv(plan.FRACTION, "most")
    with pytest.raises(ConfigError, match="XLA_PYTHON_CLIENT_MEM_FRACTION=most"):
        plan.machine(host_gb=2)


@pytest.mark.parametrize("name", machines.PRESETS)
def test_named_machines_are_whole(name):
    made = plan.machine(name)
    assert made.timed and made.source
    assert plan.machine(name, host_gb=7, device_gb=0, host_peak=5.0).host_peak == 5.0
    assert plan.machine(name, device_gb=0).device is None


def test_a_machine_from_a_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"host": 5e9, "device": 2e10, "host_peak": 1e12, "source": "mine"}))
    made = plan.machine(str(path))
    assert made.host == 5e9 and made.host_peak == 1e12 and not made.timed
    for content, message in (({"device": 1}, "host"), ({"host": 1, "speed": 2}, "expected an object"),
                             ({"host": "much"}, "host = 'much'"), ("[", "JSON")):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            plan.machine(str(path))
    with pytest.raises(ConfigError, match="xeon-8488c-2s-4090"):
        plan.machine("my-machine")


def test_time_by_hand(shared_data):
    from test_plan import settings
    on = plan.Machine(int(2e12), int(80e9), host_peak=1e13, host_bandwidth=1e12, device_peak=1e14,
                      device_bandwidth=1e12, pcie=1e10)
    made = plan.plan(settings(shared_data / "configs" / "deepseek_r1.json"), on)
    seconds, work = ({row.name: row.amount for row in rows} for rows in (made.time, made.work))
    assert seconds["experts, forward"] == work["host operations"] / 2 / 1e13  # 256 tokens per expert: arithmetic
    assert seconds["device, products"] == work["device operations"] / 1e14
    # Each of 61 layers makes at least scores, exponentials and gradients of them in fp32, for 16 rows.
    assert 61 * 3 * 16 * 128 * 512 * 512 * 4 < seconds["device, memory"] * 1e12 < 1e13
    assert seconds["transfers"] == 5 * 8192 * 7168 * 2 * 58 / 1e10
    slow = plan.plan(settings(shared_data / "configs" / "deepseek_r1.json"),
                     dataclasses.replace(on, host_bandwidth=1e9))
    assert {row.name: row.amount for row in slow.time}["experts, forward"] == work["expert bytes read"] / 2 / 1e9


def test_the_probe_measures(monkeypatch):
    monkeypatch.setattr(probe, "TOKENS", 256)
    monkeypatch.setattr(probe, "READ", 1 << 24)
    speeds = probe.speeds()
    assert 1e9 < speeds["host_peak"] < 1e15 and 1e8 < speeds["host_bandwidth"] < 1e13
    assert 1e8 < speeds["device_peak"] < 1e15
    assert plan.Machine(int(1e9), None, **speeds).timed or jax.default_backend() != "cpu"


def test_the_predicted_time_of_a_real_step(tmp_path):
    """On a quiet machine a step takes 1.7 times the prediction (docs/plans.md): XLA's products of single heads and its
    exponentials stay below the peaks. Other work may slow the step or the measurement of the peaks."""
    from kjax.train import train
    tiny.model(tmp_path / "model", "bfloat16", **MODEL)
    tiny.rows(tmp_path / "rows.jsonl", 300)
    settings = tiny.settings(tmp_path, train__steps=3, train__rows_per_step=4, data__max_length=256)
    train(settings)
    log = [json.loads(line) for line in (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()]
    measured = min(entry["step_seconds"] for entry in log if "step_seconds" in entry)
    predicted = sum(row.amount for row in plan.plan(settings, plan.machine("here")).time)
    assert 0.5 * predicted < measured < 5 * predicted
