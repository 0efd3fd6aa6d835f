"""A model from a checkpoint directory, ready for logits, text and training."""

import contextlib
import functools
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kjax import adapters, env
from kjax.data import templates
from kjax.data.tokenizer import Tokenizer
from kjax.errors import CheckpointError, ConfigError, DataError
from kjax.generate import Generator, TextStream, check_tokens
from kjax.lora import LoraSpec, group
from kjax.models import ModelConfig, Transformer, abstract_params, linears, take_table, unembed
from kjax.offload import host_lora
from kjax.offload.host_lora import HostLora
from kjax.offload.store import ExpertStore
from kjax.weights import lowbit
from kjax.weights.load import load_params, open_experts
from kjax.weights.safetensors import Checkpoint

TOKENIZER_FILES = ("tokenizer.json", "tiktoken.model")


def load(
    directory: str | os.PathLike,
    adapter: str | os.PathLike | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    experts: Literal["host", "device"] = "host",
    *,
    weights: Literal["full", "8bit", "nf4", "int4"] = "full",
    template: str | os.PathLike | None = None,
    transport: Literal["auto", "ffi", "pure_callback"] = "auto",
    storage: Literal["auto", "mapped", "resident"] = "auto",
    experts_home: Literal["auto", "device", "host"] = "auto",
    check: bool = True,
    progress: bool = True,
) -> "Model":
    """Loads a Hugging Face checkpoint directory (DeepSeek-V2, V3, Kimi-K2 families).

        with kjax.load("DeepSeek-V2-Lite-Chat") as model:
            print(model.generate([{"role": "user", "content": "Hello"}]))

    Args:
      directory: holds config.json, the safetensors files, and a tokenizer for `generate`.
      adapter: a PEFT directory to put on the model.
      dtype: of everything outside the routed experts, and of the activations.
      experts: "host" leaves the routed experts in the mapped files and multiplies them on the CPU, in the dtype they
        are stored in (bf16, fp32, FP8 or INT4 with scales); "device" loads them as arrays, for small models.
      weights: how the linear layers outside the routed experts lie on the device: "full", in dtype; "8bit" (FP8 where
        the checkpoint is FP8, else INT8), "nf4" or "int4", dequantised layer by layer as they are used.
      template: a chat template, by packaged name or .jinja file; by default the adapter's if it has one, else the
        model's own.
      transport: how compiled functions reach the host; "auto" is right.
      storage: of routed experts on the host: "mapped" reads them in the files, "resident" copies them into memory
        first; "auto" maps.
      experts_home: where an adapter of the routed experts lives, as Lora.experts_home.
      check: read all routed experts once and refuse NaN and Inf. The rest is always checked.
      progress: a bar on a terminal, for large models.

    Raises CheckpointError naming all files and tensors that are missing, damaged or do not fit config.json.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype = {dtype!r}: expected 'bfloat16' or 'float32'")
    if experts not in ("host", "device"):
        raise ConfigError(f"experts = {experts!r}: expected 'host' or 'device'")
    if weights not in lowbit.SETTINGS:
        raise ConfigError(f"weights = {weights!r}: expected one of {', '.join(map(repr, lowbit.SETTINGS))}")
    env.check()
    with Checkpoint(directory) as checkpoint:
        config = ModelConfig.from_json(checkpoint.config_json, str(checkpoint.config_path))
        tokenizer = _tokenizer(checkpoint.directory, config, template or templates.of_adapter(adapter))
        base = adapters.identify(checkpoint)
        spec, lora, hosted = _adapter(adapter, linears(config), base, experts_home, experts == "host")
        params = load_params(checkpoint, config, abstract_params(config, dtype, experts), weights, progress=progress)
        store = open_experts(checkpoint, config, transport=transport, storage=storage, check=check,
                             progress=progress) if experts == "host" else None
    return Model(checkpoint.directory, config, dtype, params, store, tokenizer, spec, lora, base,
                 HostLora(store) if hosted else None)


def _adapter(directory, sizes, base, home: str, stored: bool):
    """The spec, the lora tree, and whether its part for the routed experts stays on the host; Nones without one."""
    if directory is None:
        return None, None, False
    # Experts' adapters that stay on the host would not fit on the device, not even for a moment.
    with jax.default_device(host_lora.cpu()) if host_lora.on_host(home, True, stored) else contextlib.nullcontext():
        spec, tree = adapters.load(directory, sizes, base)
    hosted = host_lora.on_host(home, any(group(path) == "experts" for path in spec.paths), stored)
    if hosted:
        device, host = host_lora.split(tree)
        tree = host_lora.merge(jax.device_put(device, jax.local_devices()[0]), jax.device_put(host, host_lora.cpu()))
    return spec, tree, hosted


class Model:
    """A loaded model; `close()` it, or use it as a context manager, to let go of the mapped files.

    Attributes:
      directory, config (kjax.models.ModelConfig), dtype: what was loaded, and how.
      params: the frozen weights, as nested dicts of arrays stacked per layer.
      table: the embedding table where it stays in main memory (kjax.models.HostTable); None: it is in params.
      lora, spec: the adapter's arrays (fp32) and where they attach; None without one.
      store: the routed experts on the host; None with experts="device".
      tokenizer: None where the directory has none.
      base: the checkpoint's identity, which adapters record.
    """

    def __init__(self, directory: Path, config: ModelConfig, dtype: str, params: dict, store: ExpertStore | None,
                 tokenizer: Tokenizer | None, spec: LoraSpec | None, lora: dict | None, base: adapters.Base,
                 hosted: HostLora | None = None):
        self.directory, self.config, self.dtype, self.store = directory, config, dtype, store
        self.params, self.table = take_table(params)
        self.tokenizer, self.spec, self.lora, self.base = tokenizer, spec, lora, base
        self.transformer = Transformer(config, lora=spec, dtype=jnp.dtype(dtype), store=store, host_lora=hosted)
        self._hosted = hosted
        if hosted is not None:
            hosted.bind(host_lora.split(lora)[1])
        self._generator = None
        self._logits = jax.jit(functools.partial(_logits, self.transformer))

    @property
    def variables(self) -> dict:
        """The collections "params" and, with an adapter, "lora": what the device has of it."""
        lora = self.lora if self._hosted is None else host_lora.split(self.lora)[0]
        return {"params": self.params} | ({"lora": lora} if lora is not None else {})

    def logits(self, tokens) -> jax.Array:
        """tokens [B,T] int -> logits [B,T,V] fp32, every row one sequence from its first position.

        Raises DataError for ids outside the embedding table.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(f"tokens {tokens.shape} {tokens.dtype}: expected whole numbers [B,T]")
        check_tokens(tokens, self.config.vocab_size)
        # Waiting keeps the mapped files open while they are read, even if the model is closed right after.
        tokens = tokens.astype(np.int32) if self.table is None else self.table.rows(tokens)
        return self._logits(self.variables, tokens).block_until_ready()

    def generate(
        self,
        messages: str | Sequence[Mapping[str, str]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stream: Callable[[str], object] | None = None,
        thinking: bool | None = None,
    ) -> str:
        """The model's reply to a conversation. Warns where the model's context cuts it off.

        Args:
          messages: [{"role": "user", "content": ...}, ...], rendered by the model's chat template; a string is one
            user message.
          temperature: 0 takes the most probable token each time; otherwise tokens are drawn, repeatably by `seed`.
          top_p: draw among the most probable tokens that together have this probability.
          stream: is called with each piece of text as it comes, in whole characters; together they are the reply.
          thinking: whether the reply may reason first; None: as the chat template has it. ConfigError where the
            template does not ask.
        """
        if self.tokenizer is None:
            raise CheckpointError(f"{self.directory}: no tokenizer ({' or '.join(TOKENIZER_FILES)}); "
                                  "copy the base model's there")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        (prompt,) = self.tokenizer.prompts([messages], ["the messages"], thinking)
        text, pieces = TextStream(self.tokenizer.decode), []

        def emit(piece: str):
            if piece:
                pieces.append(piece)
                if stream is not None:
                    stream(piece)

        for token in self.tokens(prompt, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed):
            emit(text.push(token))
        emit(text.flush())
        return "".join(pieces)

    def tokens(self, prompt: Sequence[int], max_new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
               seed: int = 0) -> Iterator[int]:
        """The token ids that follow `prompt`, one by one, up to one that ends a reply; arguments as for `generate`."""
        return self._generate().tokens(self.variables, prompt, max_new_tokens, temperature=temperature, top_p=top_p,
                                       seed=seed, stop=self._stops())

    def tokens_of_all(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 0.0,
                      top_p: float = 1.0, seed: int = 0, rows: Sequence[int] | None = None,
                      told: Callable[[int], object] = lambda number: None) -> list[list[int]]:
        """As `tokens`, for prompts that are continued together, which reads the experts' weights once for all of
        them; rows: numbers by which they draw, so that company does not change what a prompt draws; told of the number
        of tokens each time that there is one more."""
        found: list[list[int]] = [[] for _ in prompts]
        if not found:
            return found
        steps = self._generate().batch(self.variables, prompts, max_new_tokens, temperature=temperature, top_p=top_p,
                                       seed=seed, stop=self._stops(), rows=rows)
        for number, step in enumerate(steps, 1):
            told(number)
            for tokens, token in zip(found, step, strict=True):
                if token is not None:
                    tokens.append(token)
        return found

    def _generate(self) -> Generator:
        if self._generator is None:
            vocabulary = self.tokenizer.vocab_size if self.tokenizer else self.config.vocab_size
            self._generator = Generator(self.transformer, vocabulary, self.table)
        return self._generator

    def _stops(self) -> Container[int]:
        return self.tokenizer.eos_ids if self.tokenizer else ()

    def close(self):
        """Unmaps the routed experts; calls after that fail."""
        if self._hosted is not None:
            self._hosted.release()
        if self.store is not None:
            self.store.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        where = repr(self.store) if self.store else "experts on the device"
        return f"Model({str(self.directory)!r}, {self.config.model_type}, {self.dtype}, {where})"


def _logits(transformer: Transformer, variables: dict, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
    hidden = transformer.apply(variables, tokens, positions, jnp.ones_like(positions))
    return unembed(variables["params"], hidden)


def _tokenizer(directory: Path, config: ModelConfig, template: str | os.PathLike | None) -> Tokenizer | None:
    if not any((directory / name).exists() for name in TOKENIZER_FILES):
        return None
    tokenizer = Tokenizer.load(directory, None if template is None else str(template))
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(f"{directory}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the embedding "
                              f"table {config.vocab_size} rows; it belongs to another model")
    return tokenizer
