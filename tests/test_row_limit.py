"""DeepSeek-V3.2 beyond the rows in which its attention is dense: refused before anything long."""

import numpy as np
import pytest
import tiny
import weights_cases

import kjax
from kjax.errors import ConfigError, DataError
from kjax.models import ModelConfig

LIMIT = 32
V32 = tiny.V3 | {"model_type": "deepseek_v32", "index_topk": LIMIT, "index_n_heads": 2, "index_head_dim": 16}
MESSAGE = f"deepseek_v32 rows of more than index_topk = {LIMIT} need sparse attention"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("v32") / "model"
    weights_cases.write(path, V32)
    weights_cases.write_tokenizer(path)
    return path


def test_training_is_refused_before_the_run_directory_exists(directory):
    settings = tiny.settings(directory.parent, data__max_length=LIMIT + 1)
    with pytest.raises(ConfigError, match=f"Data.max_length: 33 tokens, but {MESSAGE}"):
        kjax.train(settings)
    assert not (directory.parent / "run" / "config.gin").exists()


def test_logits_and_generation(directory):
    with kjax.load(directory, dtype="float32") as model:
        assert model.logits(np.zeros((1, LIMIT), np.int32)).shape[1] == LIMIT
        with pytest.raises(ConfigError, match=f"the rows: 33 tokens, but {MESSAGE}"):
            model.logits(np.zeros((1, LIMIT + 1), np.int32))
        with pytest.raises(DataError, match=f"the prompt has {LIMIT} tokens, the model reads index_topk = {LIMIT}"):
            next(model.tokens([5] * LIMIT, 1))
        # A reply ends at the last place, whatever was asked for, and says so.
        with pytest.warns(UserWarning, match=f"cut after 3 tokens: .* reached index_topk = {LIMIT}"):
            assert len(list(model.tokens([5] * (LIMIT - 3), 100))) == 3


def test_what_the_config_says():
    assert ModelConfig.from_json(V32).longest_row == (LIMIT, "index_topk")
    assert ModelConfig.from_json(V32 | {"index_topk": 4096}).longest_row == (1024, "max_position_embeddings")
