"""A whole run with adapters on the routed experts: both homes alike, resumed to equal bits, and used by chat."""

import shutil

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

import kjax
from kjax import checkpoint
from kjax.errors import ConfigError
from kjax.offload import host_lora
from kjax.train import train

pytestmark = pytest.mark.plain_xla

# One adapter besides those of the experts: each more takes seconds to compile.
TARGETS = {"lora__targets": ("o_proj", "experts"), "lora__dropout": 0.1, "train__save_steps": 2,
           "lora__rank_pattern": {"experts.up_proj": 3}, "optimizer__clip_norm": 0.05, "optimizer__loraplus_ratio": 4.0}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hosted")
    tiny.model(directory / "model", first_k_dense_replace=0, num_hidden_layers=2)  # one stack to compile
    return directory


@pytest.fixture(scope="module")
def runs(workshop):
    """The same run with the adapters of the experts in either home."""
    return {home: train(tiny.settings(workshop, home, lora__experts_home=home, **TARGETS), console=tiny.quiet())
            for home in ("device", "host")}


def adapter(run) -> dict:
    import safetensors.numpy

    return safetensors.numpy.load_file(run.adapter / "adapter_model.safetensors")


def test_both_homes_train_alike(runs):
    """Gradients have equal bits; the norm that clips them is summed in another order, a few eps of it."""
    device, host = runs["device"], runs["host"]
    np.testing.assert_allclose(host.losses, device.losses, rtol=1e-5)
    assert device.losses[-1] < 0.99 * device.losses[0]
    one, other = adapter(device), adapter(host)
    assert sorted(one) == sorted(other) and any(".mlp.experts.7.down_proj.lora_B" in name for name in one)
    for name, array in one.items():
        # Adam's first steps are the sign of the gradient: where that is rounding alone, so is the sign.
        assert np.mean(np.abs(other[name] - array) > 1e-4) < 0.01, name


@pytest.mark.parametrize("home", ["device", "host"])
def test_a_resumed_run_has_equal_bits(home, runs, workshop):
    """Two steps of four done again, from the state that the run saved on its way."""
    shutil.copytree(workshop / home, workshop / f"{home}_resumed")
    checkpoint.Checkpoints(workshop / f"{home}_resumed" / "checkpoints", 2).remove(4)
    again = train(tiny.settings(workshop, f"{home}_resumed", lora__experts_home=home, **TARGETS), resume=True,
                  console=tiny.quiet())
    assert again.losses == runs[home].losses and len(again.losses) == 4
    for name, array in adapter(again).items():
        np.testing.assert_array_equal(array, adapter(runs[home])[name])


def test_the_home_belongs_to_the_saved_state(runs, workshop):
    with pytest.raises(Exception, match="experts_home"):
        train(tiny.settings(workshop, "host", lora__experts_home="device", **TARGETS), resume=True,
              console=tiny.quiet())


def test_experts_on_the_device_have_their_adapters_there(workshop):
    with pytest.raises(ConfigError, match="experts_home = 'host' needs Model.experts = 'host'"):
        train(tiny.settings(workshop, "refused", model__experts="device", lora__experts_home="host", **TARGETS),
              console=tiny.quiet())


def test_logits_do_not_depend_on_the_home(runs, workshop):
    tokens = np.arange(12).reshape(1, 12)
    logits = {}
    for home in ("device", "host"):
        with kjax.load(workshop / "model", runs["host"].adapter, "float32", experts_home=home) as model:
            logits[home] = np.asarray(model.logits(tokens))
            assert len(list(model.tokens([1, 2, 3], 4))) <= 4
    with kjax.load(workshop / "model", dtype="float32") as model:
        assert np.abs(np.asarray(model.logits(tokens)) - logits["host"]).max() > 1e-3  # it acts
    np.testing.assert_array_equal(logits["device"], logits["host"])


def test_split_and_merge():
    tree = {"moe_layers": {"mlp": {"experts": {"up_proj": {"lora_A": 1}},
                                   "shared_experts": {"up_proj": {"lora_A": 2}}}}}
    device, host = host_lora.split(tree)
    assert host == {"up_proj": {"lora_A": 1}} and flatten_dict(device, sep="/") == {
        "moe_layers/mlp/shared_experts/up_proj/lora_A": 2}
    assert host_lora.merge(device, host) == tree and jax.tree.leaves(host_lora.split({})) == []
