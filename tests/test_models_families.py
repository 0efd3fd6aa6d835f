"""Every family against transformers: a saved model is read, and logits, loss and gradients agree."""

import zlib

import family_cases
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from make_goldens import MARGIN, least_margin, random_params, text_model, torch_model, torch_name

from kjax import lora
from kjax.config import Lora
from kjax.models import ModelConfig, Transformer, abstract_params, linears, unembed
from kjax.weights.load import load_params
from kjax.weights.safetensors import Checkpoint

# fp32 has eps 6e-8; three layers of sums over some tens of numbers in another order stay two orders above it.
TOLERANCE = 2e-5
ROWS, LENGTH, RANK, ALPHA = 2, 16, 3, 4.0
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def random_lora(spec, found, seed: int) -> dict:
    """A and B both drawn: as after some training."""
    leaves = flatten_dict(lora.abstract(spec, found), sep="/")
    for path, leaf in leaves.items():
        random = np.random.RandomState([seed, zlib.crc32(path.encode())])
        scale = leaf.shape[-1] ** -0.5 if path.endswith("lora_A") else 0.3
        leaves[path] = (scale * random.standard_normal(leaf.shape)).astype(np.float32)
    return unflatten_dict(leaves, sep="/")


def by_name(tree, found) -> dict[str, np.ndarray]:
    """A lora tree as {"model.layers.0.self_attn.o_proj.lora_A": [R,I], ...}."""
    named = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        path, matrix = path.rsplit("/", 1)
        named |= {f"{module}.{matrix}": np.asarray(array)
                  for module, array in zip(lora.module_names(path, found), leaf, strict=True)}
    return named


def draw(family: str, seed: int, number: int):
    """(config.json's content, weights, tokens, torch's model): routes clear of ties, no token twice, so that the
    gradient of the embedding table is the gradient to the input embeddings."""
    content = family_cases.content(family, 1000 * seed + number)
    config = ModelConfig.from_json(content)
    for attempt in range(1000 * seed, 1000 * seed + 1000):
        params = random_params(config, attempt)
        tokens = np.random.RandomState(attempt).permutation(config.vocab_size)[: ROWS * LENGTH].reshape(ROWS, LENGTH)
        tokens = tokens.astype(np.int32)
        model = torch_model(content, params)
        if least_margin(model, config, tokens) >= MARGIN:
            return content, params, tokens, model
    raise AssertionError(f"{family}: a thousand draws with ties")


def kjax_results(config, spec, tree, params, tokens):
    """Logits, loss, gradients to the embedding table and to the adapter."""
    model = Transformer(config, lora=spec)
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))

    def loss(tree, table, params):
        params = params | {"embed_tokens": {"weight": table}}
        hidden = model.apply({"params": params, "lora": tree}, tokens, positions, np.ones_like(tokens))
        logits = unembed(params, hidden)
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jax.numpy.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean(), logits

    (total, logits), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        tree, params["embed_tokens"]["weight"], params)
    return logits, total, grads[1], grads[0]


def torch_results(model, named, tokens):
    """The same of transformers and peft."""
    peft = pytest.importorskip("peft")
    # Under its own model_type peft would move shared and dense targets to the routed experts.
    model.config.model_type = model.config.get_text_config().model_type = "a_type_peft_does_not_convert"
    targets = sorted({torch_name(model, name.rsplit(".", 1)[0]) for name in named})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)).eval()
    prefix, nested = "base_model.model.", torch_name(model, "model.").removesuffix(".")
    parameters = {name.removeprefix(prefix).replace(nested, "model", 1).replace(".default.weight", ""): parameter
                  for name, parameter in adapted.named_parameters() if ".lora_" in name}
    assert parameters.keys() == named.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(named[name]))
    table = text_model(model).embed_tokens.weight.requires_grad_()
    ids = torch.from_numpy(tokens).long()
    logits = adapted(input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    grads = {name: parameter.grad.numpy() for name, parameter in parameters.items()}
    return logits.detach().numpy(), loss.item(), table.grad.numpy(), grads


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("family", family_cases.FAMILIES)
def test_a_saved_model_is_read_and_computes_as_transformers(family, number, request, tmp_path):
    content, params, tokens, model = draw(family, request.config.getoption("--seed", 0), number)
    model.save_pretrained(tmp_path)
    config = ModelConfig.from_json(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        read = load_params(checkpoint, config, abstract_params(config, "float32", "device"))
    jax.tree.map(np.testing.assert_array_equal, read, params)

    # Routed experts are one stacked tensor in transformers, which peft adapts otherwise: tests/test_peft_parity.py.
    found = {path: size for path, size in linears(config).items() if size.experts is None}
    spec = lora.resolve(Lora(targets=sorted({lora.group(path) for path in found}), rank=RANK, alpha=ALPHA), found)
    tree = random_lora(spec, found, number)
    named = by_name(tree, found)
    logits, loss, dx, grads = torch_results(model, named, tokens)
    ours = kjax_results(config, spec, tree, read, tokens)
    assert relative_error(ours[0], logits) <= TOLERANCE
    assert relative_error(ours[1], loss) <= TOLERANCE
    assert relative_error(ours[2], dx) <= TOLERANCE
    errors = {name: relative_error(grad, grads[name]) for name, grad in by_name(ours[3], found).items()}
    assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])
