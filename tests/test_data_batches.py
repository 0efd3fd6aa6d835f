"""Batches: every token once, no segment sees another, order from the step number alone, equal losses in every mode."""

import jax
import numpy as np
import pytest
import weights_cases

from kjax import config, models
from kjax.data import IGNORE, Batches, Dataset, Example
from kjax.data.batches import lengths_ladder, pack
from kjax.loss import cross_entropy
from kjax.models.transformer import Transformer, unembed

MODES = ("packed", "grouped", "plain")


def dataset(count=37, longest=40, seed=0, vocabulary=96):
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        length = int(rng.integers(2, longest + 1))
        trained = rng.random(length) < 0.6
        trained[-1] = True
        examples.append(Example(rng.integers(0, vocabulary, length).astype(np.int32), trained, f"row {number}", length))
    return Dataset(tuple(examples), None, "")


def expected_targets(example):
    following = [*zip(example.ids[1:].tolist(), example.trained[1:].tolist(), strict=True), (0, False)]
    return [token if trained else IGNORE for token, trained in following]


def found(batch):
    """(ids, targets) of every segment of a batch; checks layout and positions on the way."""
    for name in ("tokens", "targets", "positions", "segments"):
        assert batch[name].dtype == np.int32 and batch[name].shape == batch["tokens"].shape
    for row in range(len(batch["tokens"])):
        segments = batch["segments"][row]
        count = int((segments > 0).sum())
        assert (np.diff(segments[:count]) >= 0).all() and not segments[count:].any()
        assert (batch["targets"][row, count:] == IGNORE).all()
        for segment in range(1, int(segments.max(initial=0)) + 1):
            at = np.flatnonzero(segments == segment)
            assert batch["positions"][row, at].tolist() == list(range(len(at)))
            yield tuple(batch["tokens"][row, at].tolist()), tuple(batch["targets"][row, at].tolist())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows_per_step", [1, 4, 64])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_holds_every_example_once(mode, rows_per_step, shuffle):
    data = dataset()
    batches = Batches(data, rows_per_step, 48, mode, seed=3, shuffle=shuffle)
    wanted = sorted((tuple(e.ids.tolist()), tuple(expected_targets(e))) for e in data.examples)
    for epoch in (2, 0):
        steps = range(epoch * len(batches), (epoch + 1) * len(batches))
        held = [batches.batch(step) for step in steps]
        assert sorted(segment for batch in held for segment in found(batch)) == wanted
        assert {batch["tokens"].shape[0] for batch in held} == {batches.rows_per_step} <= set(range(rows_per_step + 1))
    total = sum(len(e.ids) for e in data.examples)
    positions = sum(batch["tokens"].size for batch in held)
    assert batches.padded_share() == pytest.approx(1 - total / positions)
    assert len(list(batches)) == len(batches)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_found_from_its_number(mode):
    data = dataset()
    batches = Batches(data, 4, 48, mode, seed=1)
    for step in (5 * len(batches) + 1, 0, 3, 2 * len(batches)):
        again = Batches(data, 4, 48, mode, seed=1).batch(step)
        for name, array in batches.batch(step).items():
            np.testing.assert_array_equal(array, again[name])


@pytest.mark.parametrize("mode", MODES)
def test_epochs_and_seeds_differ_and_evaluation_does_not(mode):
    data = dataset()

    def order(seed, epoch, shuffle=True):
        batches = Batches(data, 4, 48, mode, seed, shuffle)
        return [s for step in range(len(batches)) for s in found(batches.batch(epoch * len(batches) + step))]

    assert order(0, 0) != order(0, 1) != order(1, 1) != order(1, 0)
    assert order(0, 0, shuffle=False) == order(0, 1, shuffle=False)


def test_the_order_is_pinned():
    """A resumed run must see the same rows under another NumPy, so the order may never change: known values."""
    batches = Batches(dataset(), 4, 48, "plain", seed=7)
    assert [[row[0].where for row in batches.rows(step)] for step in (0, len(batches))] == [
        ["row 28", "row 21", "row 12", "row 17"], ["row 26", "row 6", "row 32", "row 7"]]


def test_few_lengths_little_padding():
    data = dataset(count=400, longest=500)
    grouped = Batches(data, 4, 512, "grouped")
    shapes = {batch["tokens"].shape[1] for batch in grouped}
    assert shapes <= {32, 48, 64, 96, 128, 192, 256, 384, 512} and len(shapes) > 4
    assert grouped.padded_share() < 1 / 3
    packed = Batches(data, 4, 512, "packed")
    assert {batch["tokens"].shape for batch in packed} == {(4, 512)}
    assert packed.padded_share() < 0.05
    plain = Batches(data, 4, 512, "plain")
    assert {batch["tokens"].shape for batch in plain} == {(4, 512)}


@pytest.mark.parametrize("mode, multiple, rows", [("packed", 1, 1), ("packed", 2, 2), ("plain", 1, 3), ("plain", 4, 4),
                                                  ("grouped", 2, 4)])
def test_few_data_make_few_rows(mode, multiple, rows):
    batches = Batches(dataset(count=3, longest=9), 8, 512, mode, multiple=multiple)
    assert len(batches) == 1 and batches.rows_per_step == rows
    assert batches.batch(5)["tokens"].shape == (rows, 32)
    assert (batches.batch(0)["segments"] > 0).sum() == sum(map(len, (e.ids for row in batches.rows(0) for e in row)))


def test_the_batches_of_a_run():
    """Its settings, each; an evaluation's are the same for every seed."""
    def settings(**changes):
        return config.Config(model=config.Model(directory="m"), data=config.Data(dataset="d", max_length=48),
                             train=config.Train(run_dir="r", **{"rows_per_step": 6, "micro_rows": 3} | changes))

    def same(made, *args, **kwargs):
        wanted = Batches(dataset(), *args, **kwargs)
        return len(made) == len(wanted) and all((made.batch(step)[name] == values).all() for step in range(len(made))
                                                for name, values in wanted.batch(step).items())

    assert same(Batches.of_run(settings(seed=5), dataset()), 6, 48, "packed", seed=5)
    for seed in (0, 5):
        assert same(Batches.of_run(settings(seed=seed), dataset(), evaluation=True), 6, 48, "packed", shuffle=False)
    few = Batches.of_run(settings(), dataset(count=3, longest=9))
    assert few.rows_per_step == 3 and Batches.of_run(settings(micro_rows=None), dataset(3, 9)).rows_per_step == 1


def test_ladder():
    assert [lengths_ladder(n) for n in (1, 32, 33, 48, 49, 65, 97, 2048, 2049)] == [
        32, 32, 48, 48, 64, 96, 128, 2048, 3072]


def test_pack_fills_rows():
    """Never more rows than first-fit decreasing's bound of 11/9 of the best possible, plus one."""
    rng = np.random.default_rng(0)
    for longest in (20, 64, 100):
        lengths = rng.integers(1, longest + 1, 500).tolist()
        rows = pack(lengths, 100, rng.permutation(500).tolist())
        assert sorted(i for row in rows for i in row) == list(range(500))
        assert max(sum(lengths[i] for i in row) for row in rows) <= 100
        assert len(rows) <= 11 / 9 * -(-sum(lengths) // 100) + 1


def test_too_long_an_example_is_refused():
    with pytest.raises(ValueError, match="an example of .* tokens does not fit rows of 8"):
        Batches(dataset(), 4, 8)


def test_packed_grouped_and_plain_give_the_same_loss():
    """Sum of token losses over their number, on a random model; the truth is each example alone without padding.

    fp32 sums in another order differ by a few ulp per layer (6e-8 each); 1e-5 is what users are promised.
    """
    config = models.ModelConfig.from_json(weights_cases.V3)
    params = weights_cases.random_params(weights_cases.V3)
    model = Transformer(config)

    @jax.jit
    def sums(batch):
        hidden = model.apply({"params": params}, batch["tokens"], batch["positions"], batch["segments"])
        return cross_entropy(unembed, params, hidden, batch["targets"], 64)

    def mean(batches):
        total, count = np.sum([jax.tree.map(float, sums(batch)) for batch in batches], axis=0)
        return total / count, count

    data = dataset(count=16, longest=30)
    alone = []
    for example in data.examples:
        ids = np.pad(example.ids, (0, 30 - len(example.ids)))[None]  # to one length: one compilation
        targets = np.pad(expected_targets(example), (0, 30 - len(example.ids)), constant_values=IGNORE)[None]
        alone.append({"tokens": ids, "targets": targets.astype(np.int32), "segments": np.ones((1, 30), np.int32),
                      "positions": np.arange(30, dtype=np.int32)[None]})  # causal: what follows cannot matter
    truth, tokens = mean(alone)
    assert tokens == sum(e.targets for e in data.examples)
    for mode in MODES:
        loss, count = mean(Batches(data, 4, 64, mode))
        assert count == tokens
        assert abs(loss - truth) <= 1e-5 * truth, mode
    contaminated = [batch | {"segments": np.minimum(batch["segments"], 1)} for batch in Batches(data, 4, 64, "packed")]
    assert abs(mean(contaminated)[0] - truth) > 1e-3 * truth  # the comparison sees what packing must prevent
