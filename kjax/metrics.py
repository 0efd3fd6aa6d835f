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

_OPTION = re.compile(r"\(?([A-J])\)?(?:\s*[.:)：、].*)?", re.DOTALL)  # "C", "(C)", "C. text"
_THOUGHT = re.compile(r".*</think>", re.DOTALL)
_MARKS = r"[\s:：*(（\[\"'{]*(?:\\text\s*\{)?"  # between "answer is" and its letter
# How models give a letter within a sentence, the surest first; of several the last counts.
_SAID = [re.compile(pattern) for pattern in (
    r"(?i:\\boxed|(?:answer|option|choice)(?: is|\s*[:：])|答案(?:是|为|\s*[:：]))" + _MARKS + "([A-J])(?![A-Za-z])",
    r"(?m)(?<![A-Za-z])\(?([A-J])(?:[.):：、]|\)?\s*$)",
)]


def missing() -> list[str]:
    """The packages that BLEU and ROUGE need and that are not installed."""
    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]


def kind_of(labels: Sequence[str]) -> Kind:
    """"choice" where every label begins with the letter of an option, alone or before a mark; else "text"."""
    return "choice" if labels and all(_OPTION.fullmatch(label.strip()) for label in labels) else "text"


def choice(text: str) -> str | None:
    """The letter, A to J, that a reply or a label chooses, reasoning left aside; None where it gives none."""
    text = _THOUGHT.sub("", text).strip()
    if found := _OPTION.fullmatch(text):
        return found[1]
    for pattern in _SAID:
        if letters := pattern.findall(text):
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
        chosen = [(choice(reply), choice(label)) for reply, label in pairs]
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

    smoothing, rouge = SmoothingFunction().method3, Rouge()
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
            for n in ("1", "2", "l"):
                found[f"rouge-{n}"].append(f1.get(f"rouge-{n}", {}).get("f", 0.0))
            done(1)
    return {name: _percent(values) for name, values in found.items()}
