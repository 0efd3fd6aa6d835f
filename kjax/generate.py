"""Text from a model, token by token, for one prompt or several: prefill in chunks, decode over a cache, greedy or
sampled."""

import itertools
import math
import warnings
from collections.abc import Callable, Container, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kjax.errors import ConfigError, DataError, RunError
from kjax.models import Cache, HostTable, Transformer, unembed

# Shapes are rounded up so that few are compiled: prompts go in by chunks of a power of two tokens, padded in front,
# and the cache has a power of two places, from LONG on a multiple of it.
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 512
SMALLEST_CACHE, LONG = 128, 4096


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def chunks(length: int) -> list[int]:
    """Lengths of the pieces in which a prompt is processed, together at least its own: shorter ones for a long prompt,
    so that the scores of a piece with the whole prompt take no more memory than those of LARGEST_CHUNK with LONG."""
    largest = LARGEST_CHUNK
    while largest > SMALLEST_CHUNK and largest * length > LARGEST_CHUNK * LONG:
        largest //= 2
    rest = length % largest
    return ([_power_of_two(rest, SMALLEST_CHUNK)] if rest else []) + [largest] * (length // largest)


def cache_places(padded: int, new: int) -> int:
    """Places for the padded prompt and the tokens to come (a write beyond the end would move)."""
    needed = padded + new
    return _power_of_two(needed, SMALLEST_CACHE) if needed <= LONG else -(-needed // LONG) * LONG


def sample(logits, key, temperature, top_p):
    """logits [V] fp32 -> a token drawn from the most probable ones that together have at least top_p.

    temperature 0: the most probable.
    """
    def draw():
        order = jnp.argsort(-logits)
        scaled = logits[order] / temperature
        probs = jax.nn.softmax(scaled)
        kept = jnp.cumsum(probs) - probs < top_p  # the first always is
        return order[jax.random.categorical(key, jnp.where(kept, scaled, -jnp.inf))].astype(jnp.int32)

    return jax.lax.cond(temperature == 0, lambda: jnp.argmax(logits).astype(jnp.int32), draw)


class Generator:
    """The compiled step of one model: consumes tokens of several rows, gives the next of each."""

    def __init__(self, model: Transformer, vocabulary: int, table: HostTable | None = None):
        """vocabulary: ids from there on are never drawn; an embedding table may have more rows than there are.
        table: the embedding where it is not among the parameters."""
        self.model, self.vocabulary = model, vocabulary
        self._inputs = table.rows if table is not None else lambda tokens: tokens
        self._advance = jax.jit(self._step, donate_argnames="cache")

    def _step(self, variables, cache, tokens, padding, alive, keys, number, temperature, top_p):
        """tokens [B,T] (or their rows [B,T,D]) of rows whose first `padding` [B] places hold none; rows that are not
        alive [B] have ended -> the cache with these tokens, the next token [B], whether the logits [B] are finite."""
        place = cache.length + jnp.arange(tokens.shape[1])
        real = (place >= padding[:, None]) & alive[:, None]
        positions = jnp.maximum(place - padding[:, None], 0)
        hidden, cache = self.model.apply(variables, tokens, positions, real.astype(jnp.int32), cache=cache)
        logits = unembed(variables["params"], hidden[:, -1])
        finite = jnp.isfinite(logits).all(axis=-1)
        logits = jnp.where(jnp.arange(logits.shape[1]) < self.vocabulary, logits, -jnp.inf)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        return cache, jax.vmap(sample, (0, 0, None, None))(logits, keys, temperature, top_p), finite

    def tokens(self, variables: dict, prompt: Sequence[int], max_new_tokens: int, *, temperature: float = 0.0,
               top_p: float = 1.0, seed: int = 0, stop: Container[int] = ()) -> Iterator[int]:
        """The tokens that follow one prompt, until one of `stop` (not given out) or max_new_tokens; as `batch`.

        The model's context ends a reply too, and a warning says so.
        """
        count = 0
        for (token,) in self.batch(variables, [prompt], max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
                                   stop=stop):
            if token is None:
                return
            yield token
            count += 1
        if count < max_new_tokens:
            longest, limit = self.model.config.longest_row
            warnings.warn(f"the reply was cut after {count} tokens: with its prompt it has reached {limit} = {longest}",
                          stacklevel=2)

    def batch(self, variables: dict, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 0.0,
              top_p: float = 1.0, seed: int = 0, stop: Container[int] = (), rows: Sequence[int] | None = None,
              ) -> Iterator[list[int | None]]:
        """Continues several prompts at once: for each step the next token of every prompt, None for one that has
        ended, until all have. A prompt ends before a token of `stop`, after max_new_tokens, with the model's context.

        The experts' weights are read once for all prompts. Prompts of like length go well together: shorter ones are
        padded in front.

        variables: the collections "params" and, with adapters, "lora".
        temperature 0 takes the most probable token; otherwise equal seeds give equal tokens, drawn for each prompt by
        its number in `rows` (by default its place).
        """
        check_sampling(max_new_tokens, temperature, top_p, seed)
        config = self.model.config
        longest, limit = config.longest_row
        prompts = [np.asarray(prompt, np.int64) for prompt in prompts]
        for prompt in prompts:
            check_tokens(prompt, config.vocab_size)
            if not prompt.size:
                raise DataError("the prompt has no tokens")
            if prompt.size >= longest:
                raise DataError(f"the prompt has {prompt.size} tokens, the model reads {limit} = {longest}; shorten it")
        left = np.array([min(max_new_tokens, longest - prompt.size) for prompt in prompts])

        pieces = chunks(max(prompt.size for prompt in prompts))
        length = sum(pieces)
        table = np.zeros((len(prompts), length), np.int32)
        padding = np.array([length - prompt.size for prompt in prompts], np.int32)
        for row, prompt in enumerate(prompts):
            table[row, padding[row]:] = prompt
        if rows is not None and len(rows) != len(prompts):
            raise ConfigError(f"{len(rows)} numbers of rows for {len(prompts)} prompts")
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(seed), np.arange(len(prompts)) if rows is None else np.asarray(rows))
        draw = (np.float32(temperature), np.float32(top_p))

        # Places for replies are added behind the prompt: attention would look at them all the while.
        cache = Cache.empty(config, len(prompts), cache_places(length, 0), self.model.dtype)
        alive, done = np.ones(len(prompts), bool), 0
        for piece in pieces:
            cache, token, finite = self._advance(variables, cache, self._inputs(table[:, done:done + piece]), padding,
                                                 alive, row_keys, np.int32(0), *draw)
            done += piece
        cache = cache.with_places(cache_places(length, int(left.max())))
        for number in itertools.count(1):
            drawn = np.asarray(token)
            if not (np.asarray(finite) | ~alive).all():
                raise RunError(f"the logits of token {number} hold NaN or Inf; try dtype='float32', or check the "
                               "adapter and the weights")
            alive = alive & np.array([int(one) not in stop for one in drawn])
            if not alive.any():
                yield [None] * len(prompts)
                return
            yield [int(one) if lives else None for one, lives in zip(drawn, alive, strict=True)]
            alive = alive & (number < left)
            if not alive.any():
                return
            cache, token, finite = self._advance(variables, cache, self._inputs(token[:, None]), padding, alive,
                                                 row_keys, np.int32(number), *draw)


def check_sampling(max_new_tokens, temperature, top_p, seed):
    """Refuses settings of a reply that have no meaning."""
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens!r}: expected a whole number, at least 1")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature = {temperature!r}: must be 0 (greedy) or positive")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p = {top_p!r}: must be in (0, 1]")
    if not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ConfigError(f"seed = {seed!r}: must be a whole number in [0, 2^31)")


def check_tokens(tokens: np.ndarray, vocabulary: int):
    """Refuses ids outside the embedding table: compiled code would read something else without a word."""
    wrong = (tokens < 0) | (tokens >= vocabulary)
    if wrong.any():
        place = np.unravel_index(int(wrong.argmax()), wrong.shape)
        raise DataError(f"token id {tokens[place]} at {list(map(int, place))} is outside the embedding table of "
                        f"{vocabulary} rows; does the tokenizer belong to this model?")


class TextStream:
    """Text from token ids as they come, in whole characters: tokens may end within the bytes of one."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode, self._ids, self._begin, self._done = decode, [], 0, 0

    def push(self, token: int) -> str:
        """What the token adds to the text; "" while a character is incomplete."""
        self._ids.append(token)
        return self._new(final=False)

    def flush(self) -> str:
        """What is left at the end, incomplete characters as U+FFFD."""
        return self._new(final=True)

    def _new(self, final: bool) -> str:
        # Decoded together with the tokens of the last piece: some decoders treat the first token differently.
        text = self._decode(self._ids[self._begin :])
        if text.endswith("\ufffd") and not final:
            return ""
        new = text[len(self._decode(self._ids[self._begin : self._done])) :]
        self._begin, self._done = self._done, len(self._ids)
        return new
