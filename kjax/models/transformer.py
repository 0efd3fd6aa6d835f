"""The decoder: embedding, a stack of dense layers, a stack of mixture-of-experts layers, final norm.

The parameter tree has the checkpoint's own names, with the layers of a stack along axis 0:
`moe_layers/self_attn/q_b_proj/weight` [L,O,I]. One body per stack is compiled, whatever the depth.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from kjax.errors import ConfigError
from kjax.lora import LoraSpec, Size
from kjax.models.attention import Tokens
from kjax.models.config import ModelConfig
from kjax.models.gqa import GQA, gqa, gqa_cache, gqa_cached
from kjax.models.layers import INIT, MLP, Linear, Norm, Parts, rms_norm, swiglu
from kjax.models.mla import MLA, mla, mla_cache, mla_cached
from kjax.models.moe import MoE, moe
from kjax.models.rope import cos_sin
from kjax.offload.experts import SAVED
from kjax.offload.host_lora import HostLora
from kjax.offload.store import ExpertStore
from kjax.weights import lowbit

# Family.attention: the module, its arithmetic within rows and over a cache, and what a cache keeps of a token.
ATTENTION = {"mla": (MLA, mla, mla_cached, mla_cache), "gqa": (GQA, gqa, gqa_cached, gqa_cache)}


@struct.dataclass
class Cache:
    """What generation keeps of the tokens so far: S places per row, the first `length` of them filled.

    layers: {"dense_layers" | "moe_layers": {"c": [L,B,S,R], "k_rope": [L,B,S,P]}}, with grouped queries {"k", "v":
    [L,B,S,G,C]}.  segments: [B,S].
    """

    layers: dict
    segments: jax.Array
    length: jax.Array  # int32 scalar

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, places: int, dtype) -> "Cache":
        """Room for `places` tokens in each of `rows` rows. Writing beyond it is not detected: ask for enough."""
        stacks = {"dense_layers": config.num_dense_layers, "moe_layers": config.num_moe_layers}
        kept = ATTENTION[config.family.attention][-1](config)
        layers = {stack: {name: jnp.zeros((n, rows, places, *shape), dtype) for name, shape in kept.items()}
                  for stack, n in stacks.items() if n}
        return cls(layers, jnp.zeros((rows, places), jnp.int32), jnp.zeros((), jnp.int32))

    def with_places(self, places: int) -> "Cache":
        """The same tokens with room for `places`, at least as many as now."""
        more = places - self.segments.shape[1]
        layers = jax.tree.map(lambda a: jnp.pad(a, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (a.ndim - 3)), self.layers)
        return self.replace(layers=layers, segments=jnp.pad(self.segments, [(0, 0), (0, more)]))


def in_micro_batches(f, micro_rows: int | None, x, tokens: Tokens):
    """f(x, tokens) over groups of rows: the activations of one group exist at a time, in the backward pass too.

    Without the checkpoint, recomputing the layer would keep what the backward needs of every group at once.
    """
    rows = x.shape[0]
    if micro_rows is None or micro_rows >= rows:
        return f(x, tokens)
    if rows % micro_rows:
        raise ConfigError(f"micro_rows = {micro_rows} does not divide the {rows} rows of the batch")
    groups = jax.tree.map(lambda a: a.reshape(-1, micro_rows, *a.shape[1:]), (x, tokens))
    return jax.lax.map(lambda group: jax.checkpoint(f, prevent_cse=False)(*group), groups).reshape(x.shape)


def row_by_row(f, inputs):
    """f over arrays [B,T,...] and what belongs to their rows. Several rows of several tokens go one after another: the
    scores of T tokens with all places of a cache exist for one row at a time."""
    rows, length = inputs[0].shape[:2]
    if rows == 1 or length == 1:
        return f(inputs)
    out = jax.lax.map(f, jax.tree.map(lambda a: a[:, None], inputs))
    return jax.tree.map(lambda a: a[:, 0], out)


class Layer(Parts):
    """One decoder layer, dense or mixture-of-experts: the body of a scan over a stack."""

    store: ExpertStore | None
    host_lora: HostLora | None
    micro_rows: int | None
    sparse: bool

    @nn.compact
    def __call__(self, x, layer, cache, tokens, key_segments, start):
        """x [B,T,D], layer: its number in the stack, cache: its part of the cache or None -> x, cache."""
        c, parts = self.config, (self.config, self.lora, self.dtype, self.deterministic)
        norm = Norm(c.hidden_size, self.dtype, name="input_layernorm")()
        declare, attend, attend_cached, _ = ATTENTION[c.family.attention]
        w = declare(*parts, name="self_attn")()
        if cache is None:
            def attention(x, tokens):
                return x + attend(w, c, rms_norm(x, norm, c.rms_norm_eps), tokens)
            x = in_micro_batches(attention, self.micro_rows, x, tokens)
        else:
            def attention(inputs):
                x, tokens, cache, key_segments = inputs
                o, cache = attend_cached(w, c, rms_norm(x, norm, c.rms_norm_eps), tokens, cache, key_segments, start)
                return x + o, cache

            x, cache = row_by_row(attention, (x, tokens, cache, key_segments))

        h = rms_norm(x, Norm(c.hidden_size, self.dtype, name="post_attention_layernorm")(), c.rms_norm_eps)
        if not self.sparse:
            return x + swiglu(MLP(*parts, c.intermediate_size, name="mlp")(), h, tokens.rows), cache
        w = MoE(*parts, self.store is None, self.host_lora, name="mlp")()
        return moe(w, c, self.store, layer, h, x, tokens.segments, tokens.rows), cache


class Embedding(nn.Module):
    """Declares the table [V,D]."""

    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self):
        return self.param("weight", INIT, (self.config.vocab_size, self.config.hidden_size), self.dtype)


class Transformer(nn.Module):
    """The model without its output head.

    Attributes:
      lora: the adapters, whose arrays are the collection "lora"; None: the base model alone.
      dtype: of all activations, "float32" or "bfloat16".
      store: holds the routed experts; None: they are parameters, multiplied on the device.
      host_lora: holds their adapters, which are then not in the collection "lora"; there may be, as
        moe_layers/mlp/experts/token [L], numbers through which JAX sees their gradients (kjax.offload.lora).
      micro_rows: rows in attention at a time; None: all. Every expert sees all rows at once either way.
    """

    config: ModelConfig
    lora: LoraSpec | None = None
    dtype: Any = jnp.float32
    store: ExpertStore | None = None
    host_lora: HostLora | None = None
    micro_rows: int | None = None

    @nn.compact
    def __call__(self, tokens, positions, segments, *, deterministic: bool = True, cache: Cache | None = None):
        """Hidden states after the final norm.

        Args:
          tokens: [B,T] int32, or their rows [B,T,D] of a table on the host (kjax.models.table).
          positions: [B,T] int32, restarting with each packed sequence.
          segments: [B,T] int32; a token sees earlier ones of its row and segment; 0 is padding.
          deterministic: False drops elements before lora_A (needs the "dropout" rng).
          cache: continue from these tokens instead of an empty row.

        Returns:
          hidden [B,T,D], and the cache with these tokens in it if one was given.
        """
        c = self.config
        if cache is None:
            c.check_row(tokens.shape[1], "the rows")
        cos, sin = cos_sin(c.rope, c.rope_width, positions)
        batch = Tokens(cos, sin, segments, jnp.arange(tokens.shape[0]))
        x = tokens
        if tokens.ndim == 2:
            # An id beyond the table gives NaN here; clamping would train on another token.
            x = jnp.take(Embedding(c, self.dtype, name="embed_tokens")(), tokens, axis=0, mode="fill")
        x = x.astype(self.dtype)

        start, key_segments, caches = None, None, {}
        if cache is not None:
            start = cache.length
            key_segments = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, start, axis=1)
            caches = cache.layers
        layers = {}
        for stack, length in (("dense_layers", c.num_dense_layers), ("moe_layers", c.num_moe_layers)):
            if length:
                body = nn.remat(Layer, policy=jax.checkpoint_policies.save_only_these_names(SAVED),
                                prevent_cse=length == 1)
                scan = nn.scan(body, variable_axes={"params": 0, "lora": 0}, length=length,
                               split_rngs={"params": True, "dropout": True},
                               in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast), out_axes=0)
                run = scan(c, self.lora, self.dtype, deterministic, self.store, self.host_lora, self.micro_rows,
                           stack == "moe_layers",
                           name=stack)
                x, layers[stack] = run(x, jnp.arange(length), caches.get(stack), batch, key_segments, start)

        x = rms_norm(x, Norm(c.hidden_size, self.dtype, name="norm")(), c.rms_norm_eps)
        if not c.tie_word_embeddings:
            Linear(c.hidden_size, c.vocab_size, None, self.dtype, True, name="lm_head")()  # for unembed
        if cache is None:
            return x
        return x, Cache(layers, key_segments, start + tokens.shape[1])


def head(params):
    """The part of the parameters that makes logits: lm_head or, where that is tied, the embedding."""
    name = "lm_head" if "lm_head" in params else "embed_tokens"
    return {name: params[name]}


def unembed(params, hidden):
    """hidden [...,D] -> logits [...,V] fp32; params: the whole tree, or its `head`."""
    (found,) = head(params).values()
    form = lowbit.find(found)
    weight = (found["weight"].astype(hidden.dtype) if form is None else
              lowbit.dequantise(form, found[form], hidden.shape[-1], hidden.dtype))
    return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)


def abstract_params(config: ModelConfig, dtype, experts: str = "host", weights: str = "full") -> dict:
    """The shapes of the params tree, as jax.ShapeDtypeStruct: read off the modules, nothing is allocated.

    Router leaves are fp32 whatever dtype says. experts: "host" leaves the routed ones out, "device" declares them.
    weights: "full" gives the tree of whole weights, any other setting (kjax.weights.lowbit) what of it is on the
    device: low-bit linear layers, and no embedding unless the output head is tied to it.
    """
    params = unflatten_dict(_declared(config, jnp.dtype(dtype)))
    if experts == "host" and "moe_layers" in params:
        del params["moe_layers"]["mlp"]["experts"]
    params = lowbit.held(params, weights, config.quantization)
    if lowbit.hosts_table(config, weights):
        del params["embed_tokens"]
    return params


@functools.lru_cache(maxsize=8)  # the modules are traced, which takes a second, and everything that loads or plans asks
def _declared(config: ModelConfig, dtype) -> dict:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    model = Transformer(config, dtype=dtype)
    return flatten_dict(jax.eval_shape(model.init, jax.random.key(0), tokens, tokens, tokens)["params"])


def linears(config: ModelConfig) -> dict[str, Size]:
    """Everything that can carry an adapter."""
    leaves = flatten_dict(abstract_params(config, jnp.float32, experts="device"), sep="/")
    found = {}
    for path, leaf in leaves.items():
        path = path.removesuffix("/weight")
        # Hugging Face calls every linear layer *_proj*, and neither the router nor a norm.
        if "_proj" in path.split("/")[-1]:
            layers, *experts, width_out, width_in = leaf.shape
            found[path] = Size(layers, width_in, width_out, *experts)
    return found
