"""What a run is made of before anything long starts."""

import jax
import numpy as np
import pytest
import tiny
import weights_cases

from kjax import adapters, job, lora


def template(directory, mark: str) -> str:
    """A .jinja file like the model's own template, but for a mark."""
    path = directory / f"{mark}.jinja"
    path.write_text(weights_cases.TEMPLATE + f"{{# {mark} #}}")
    return str(path)


@pytest.fixture
def continued(tmp_path):
    """(a directory for runs, an adapter that has dropout 0.25 and a chat template)"""
    made = job.prepare(tiny.settings(tmp_path, lora__dropout=0.25, data__template=template(tmp_path, "first")))
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), lora.abstract(made.spec, made.linears))
    return tmp_path, adapters.save(tmp_path / "adapter", tree, made.spec, made.linears, base=made.base,
                                   chat_template=made.tokenizer.chat_template)


def test_a_run_goes_on_from_an_adapter_as_it_was_trained(continued, monkeypatch):
    directory, adapter = continued
    read, opened = [], adapters.opened
    monkeypatch.setattr(adapters, "opened", lambda *given: read.append(given) or opened(*given))
    made = job.prepare(tiny.settings(directory, model__adapter=str(adapter)))
    assert len(read) == 1, "its files are large where experts are adapted"
    assert "first" in made.tokenizer.chat_template
    assert {entry.dropout for _, entry in made.spec.entries} == {0.25} and made.adapter is not None
    rows = dict(job.rows(made, directory, "scalar", 1))
    assert rows["adapter"].endswith("with its targets, ranks and scales; dropout 0.25")
    assert job.prepare(made.config, resuming=True).adapter is None, "a saved state has its own"


def test_dropout_and_template_that_are_set_go_before_those_of_the_adapter(continued):
    directory, adapter = continued
    made = job.prepare(tiny.settings(directory, model__adapter=str(adapter), lora__dropout=0.5,
                                     data__template=template(directory, "second")))
    assert {entry.dropout for _, entry in made.spec.entries} == {0.5} and made.dropout
    assert not job.prepare(tiny.settings(directory, model__adapter=str(adapter), lora__dropout=0.0)).dropout
    assert "second" in made.tokenizer.chat_template
