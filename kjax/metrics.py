"""How near replies come to those of a dataset: BLEU and ROUGE as LLaMA-Factory computes them, answers to choices.

BLEU is over characters with NIST's smoothing, ROUGE's F1 over the words that jieba finds, each a mean over replies, so
that tables made with LLaMA-Factory and KTransformers compare.
"""

import importlib.util
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Literal

from kjax.errors import ConfigError

Kind = Literal["text", "choice"]
PACKAGES = {"jieba": "jieba", "rouge_chinese": "rouge-chinese", "nltk": "nltk"}  # module -> its name on PyPI

_OPTION = re.compile(r"\(?([A-J])\)?(?:\s*[.:)：、].*)?", re.DOTALL)  # a label: "C", "(C)", "C. text"
# How a reply gives a letter, the surest first; of several in one way the last counts. "I" may be a word, and "A".
_WAYS = [re.compile(pattern) for pattern in (
    r"(?:(?i:\\boxed|(?:answer|choice)(?: is|\s*[:：])|option(?: is|[:：]|\s))|答案[是为:：]|选[择项]?[是为:：]?)"
    r"[\s:：(（\[\"'{]*(?:\\[a-z]+\s*\{)*(?!I [a-z])([A-J])(?![A-Za-z])",
    r"\A\W*([A-J])(?:[^\S\n]*(?:\n|\W*$)|[.:)：、。，,！!？?]|(?<![AI])\s)",
    r"(?m)(?<![A-Za-z])([A-J])(?:[.):：。！!？?]|\s*$)",
)]


def missing() -> list[str]:
    """The packages that BLEU and ROUGE need and that are not installed."""
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]


def kind_of(labels: Sequence[str]) -> Kind:
    """"choice" where every label, its reasoning left aside, begins with the letter of an option, alone or before a
    mark; else "text"."""
    return "choice" if labels and all(map(_letter, labels)) else "text"


def _letter(label: str) -> str | None:
    found = _OPTION.fullmatch(label.rpartition("</think>")[2].strip())
    return found and found[1]


def choice(reply: str) -> str | None:
    """The letter, A to J, that a reply chooses, reasoning left aside; None where it gives none, or is cut while it
    still reasons."""
    thought, _, text = reply.rpartition("</think>")
    if not thought and "<think>" in text:
        return None
    text = re.sub(r"[*$`]", "", text).strip()
    for way in _WAYS:
        if letters := way.findall(text):
            return letters[-1]
    return None


def scores(kind: Kind, replies: Sequence[str], labels: Sequence[str],
           done: Callable[[int], object] = lambda number: None) -> dict[str, float]:
    """Percentages over pairs of a reply and the dataset's own.

    "choice": accuracy, answered (a letter could be read).  "text": bleu-1 to bleu-4, rouge-1, rouge-2, rouge-l.
    Both: exact, equal but for white space around.
    done is told of each pair that has been scored. Raises ConfigError where a package for "text" is missing.
    """
    if len(replies) != len(labels) or not labels:
        raise ValueError(f"{len(replies)} replies for {len(labels)} labels")
    pairs = list(zip(replies, labels, strict=True))
    exact = {"exact": _percent(reply.strip() == label.strip() for reply, label in pairs)}
    if kind == "choice":
        chosen = [(choice(reply), _letter(label)) for reply, label in pairs]
        return {"accuracy": _percent(reply == label for reply, label in chosen),
                "answered": _percent(reply is not None for reply, _ in chosen)} | exact
    return _text(pairs, done) | exact


def _percent(values) -> float:
    return 100 * statistics.fmean(values)


def _text(pairs: Sequence[tuple[str, str]], done: Callable[[int], object]) -> dict[str, float]:
    if lacking := missing():
        raise ConfigError(f"BLEU and ROUGE need {', '.join(lacking)}: pip install {' '.join(lacking)}")
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    smoothing, rouge = SmoothingFunction().method3, Rouge(["rouge-1", "rouge-2"])
    weights = [tuple(1 / n if i < n else 0.0 for i in range(4)) for n in (1, 2, 3, 4)]
    found: dict[str, list[float]] = {f"bleu-{n}": [] for n in (1, 2, 3, 4)} | {
        f"rouge-{n}": [] for n in ("1", "2", "l")}
    with tempfile.TemporaryDirectory() as private:  # in the shared one jieba would read a file that others can write
        words = jieba.Tokenizer()
        words.tmp_dir = private
        jieba.setLogLevel("WARNING")
        for reply, label in pairs:
            blue = sentence_bleu([list(label)], list(reply), weights, smoothing) if reply and label else [0.0] * 4
            for n, value in enumerate(blue, 1):
                found[f"bleu-{n}"].append(value)
            split = [" ".join(words.cut(text)) for text in (reply, label)]
            f1 = rouge.get_scores(*split)[0] if all(text.split() for text in split) else {}
            for n in ("1", "2"):
                found[f"rouge-{n}"].append(f1.get(f"rouge-{n}", {}).get("f", 0.0))
            found["rouge-l"].append(_rouge_l(*(" ".join(rouge.cut_sent(text)).split() for text in split)))
            done(1)
    return {name: _percent(values) for name, values in found.items()}


def _rouge_l(reply: list[str], label: list[str]) -> float:
    """F1 of the longest common subsequence of words. rouge-chinese fills a table of all pairs of words for it, minutes
    and gigabytes for long replies; here the bits of an integer are a row of that table (Hyyrö 2004)."""
    if not reply or not label:
        return 0.0
    places: dict[str, int] = {}
    for at, word in enumerate(label):
        places[word] = places.get(word, 0) | 1 << at
    whole = row = (1 << len(label)) - 1
    for word in reply:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & whole
    common = len(label) - row.bit_count()
    return 2 * common / (len(reply) + len(label))
