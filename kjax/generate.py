"""Text from a model, token by token: prefill in chunks, decode over a cache, greedy or sampled."""

import math
import warnings
from collections.abc import Callable, Container, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kjax.errors import ConfigError, DataError, RunError
from kjax.models import Cache, HostTable, Transformer, unembed

# Shapes are rounded up so that few are compiled: a prompt goes in by chunks of a power of two tokens, the last one
# padded, and the cache has a power of two places, from LONG on a multiple of it.
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 512
SMALLEST_CACHE, LONG = 128, 4096


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def chunks(length: int) -> list[tuple[int, int]]:
    """(tokens, padded length) of the pieces in which a prompt is processed."""
    pieces = [(LARGEST_CHUNK, LARGEST_CHUNK)] * (length // LARGEST_CHUNK)
    rest = length % LARGEST_CHUNK
    return pieces + ([(rest, _power_of_two(rest, SMALLEST_CHUNK))] if rest else [])


def cache_places(prompt: int, new: int) -> int:
    """Places for the prompt with its padding (a write beyond the end would move) and the tokens to come."""
    needed = max(sum(padded for _, padded in chunks(prompt)), prompt + new)
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
    """The compiled step of one model: consumes tokens, gives the next."""

    def __init__(self, model: Transformer, vocabulary: int, table: HostTable | None = None):
        """vocabulary: ids from there on are never drawn; an embedding table may have more rows than there are.
        table: the embedding where it is not among the parameters."""
        self.model, self.vocabulary = model, vocabulary
        self._inputs = table.rows if table is not None else lambda tokens: tokens
        self._advance = jax.jit(self._step, donate_argnames="cache")

    def _step(self, variables, cache, tokens, count, key, temperature, top_p):
        """tokens [1,T] (or their rows [1,T,D]), the first `count` of them real -> the cache with those, the next token,
        logits are finite."""
        place, start = jnp.arange(tokens.shape[1]), cache.length
        segments = (place < count).astype(jnp.int32)[None]
        hidden, cache = self.model.apply(variables, tokens, (start + place)[None], segments, cache=cache)
        # Padding behind the prompt is overwritten by what comes next.
        cache = cache.replace(length=start + count)
        logits = unembed(variables["params"], jax.lax.dynamic_index_in_dim(hidden[0], count - 1, keepdims=False))
        finite = jnp.isfinite(logits).all()
        logits = jnp.where(jnp.arange(logits.shape[0]) < self.vocabulary, logits, -jnp.inf)
        return cache, sample(logits, key, temperature, top_p), finite

    def tokens(self, variables: dict, prompt: Sequence[int], max_new_tokens: int, *, temperature: float = 0.0,
               top_p: float = 1.0, seed: int = 0, stop: Container[int] = ()) -> Iterator[int]:
        """The tokens that follow the prompt, until one of `stop` (not given out) or max_new_tokens.

        The model's context ends a reply too, and a warning says so.

        variables: the collections "params" and, with adapters, "lora".
        temperature 0 takes the most probable token; otherwise equal seeds give equal tokens.
        """
        _check(max_new_tokens, temperature, top_p, seed)
        config = self.model.config
        prompt = np.asarray(prompt, np.int64)
        check_tokens(prompt, config.vocab_size)
        if not prompt.size:
            raise DataError("the prompt has no tokens")
        longest, limit = config.longest_row
        room = longest - prompt.size
        if room < 1:
            raise DataError(f"the prompt has {prompt.size} tokens, the model reads {limit} = {longest}; shorten it")
        new = min(max_new_tokens, room)

        key = jax.random.key(seed)
        draw = (np.float32(temperature), np.float32(top_p))
        cache = Cache.empty(config, 1, cache_places(prompt.size, new), self.model.dtype)
        done = 0
        for count, padded in chunks(prompt.size):
            piece = np.zeros((1, padded), np.int32)
            piece[0, :count] = prompt[done : done + count]
            cache, token, finite = self._advance(variables, cache, self._inputs(piece), np.int32(count),
                                                 jax.random.fold_in(key, 0), *draw)
            done += count
        for number in range(1, new + 1):
            if not finite:
                raise RunError(f"the logits of token {number} hold NaN or Inf; try dtype='float32', or check the "
                               "adapter and the weights")
            if int(token) in stop:
                return
            yield int(token)
            if number < new:
                cache, token, finite = self._advance(variables, cache, self._inputs(token.reshape(1, 1)), np.int32(1),
                                                     jax.random.fold_in(key, number), *draw)
        if new < max_new_tokens:
            warnings.warn(f"the reply was cut after {new} tokens: with its prompt it has reached {limit} = {longest}",
                          stacklevel=2)


def _check(max_new_tokens, temperature, top_p, seed):
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
