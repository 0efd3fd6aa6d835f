"""Kimi's tiktoken.model as a byte-level BPE of the `tokenizers` library, without the model's remote code."""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from kjax.errors import DataError

# How Kimi's tokenizer cuts text before merging: runs of Han; words of other scripts, with an English contraction;
# up to three digits; punctuation; line ends; other white space.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join((
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))
RESERVED = 256  # ids after the ranks that are kept for special tokens, named or not


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary: itself if printable in Latin-1,
    otherwise the next free code point from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def read_ranks(path: Path) -> dict[bytes, int]:
    """token -> rank from lines of base64 and rank; every byte is a token, ranks count from 0 without gaps."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            rank = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{path}, line {number}: not a base64 token and its rank") from error
        if rank != len(ranks) or token in ranks or not token:
            raise DataError(f"{path}, line {number}: rank {rank} is out of order, or its token was there before")
        ranks[token] = rank
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"{path}: no token for byte {absent[0]:#04x}: truncated, or no byte-level vocabulary")
    return ranks


def convert(ranks: Mapping[bytes, int]) -> Tokenizer:
    """A BPE whose ids equal tiktoken's.

    tiktoken merges the adjacent pair whose union has the lowest rank. Here a merge is a pair: every split of a token
    into two tokens is listed, in the order of the token's rank. A word that is a token is taken whole by both.
    """
    letters = byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(spelled[left], spelled[right]) for left, right in splits if left in ranks and right in ranks]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    return bpe


def specials(base: int, named: Mapping[int, str]) -> dict[str, int]:
    """The special tokens after `base` ranks: named ones, and `<|reserved_token_ID|>` for the rest."""
    return {named.get(token, f"<|reserved_token_{token}|>"): token for token in range(base, base + RESERVED)}
