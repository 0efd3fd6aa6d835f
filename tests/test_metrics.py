"""Scores of replies: the libraries' own figures as LLaMA-Factory combines them, figures by hand, letters of options."""

import tempfile

import numpy as np
import pytest

from kjax import metrics
from kjax.errors import ConfigError

REPLIES = ["今天天气很好，我们去公园吧", "The quick fox jumps over the lazy dog", "", "   ", "a", "same text here"]
LABELS = ["今天天气不错，我们去公园散步吧", "A quick dog jumps over the fox", "x", "hello", "a", "same text here"]


@pytest.fixture
def packages():
    if lacking := metrics.missing():
        pytest.skip(f"{', '.join(lacking)} not installed")


def test_bleu_and_rouge_are_those_of_llama_factory(packages):
    """Its recipe, written with the libraries alone: characters and words, a mean over rows, nothing scored as zero."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    expected = {"bleu-4": 0.0, "rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    for reply, label in zip(REPLIES, LABELS, strict=True):
        if reply.strip():
            expected["bleu-4"] += sentence_bleu([list(label)], list(reply),
                                                smoothing_function=SmoothingFunction().method3)
            found = Rouge().get_scores(" ".join(jieba.cut(reply)), " ".join(jieba.cut(label)))[0]
            for name in ("rouge-1", "rouge-2", "rouge-l"):
                expected[name] += found[name]["f"]
    scores = metrics.scores("text", REPLIES, LABELS)
    for name, total in expected.items():
        assert scores[name] == pytest.approx(100 * total / len(REPLIES), rel=1e-6), name
    assert scores["exact"] == pytest.approx(100 * 2 / 6)


def test_figures_by_hand(packages):
    done = []
    scores = metrics.scores("text", ["abcd"], ["abce"], done.append)
    assert done == [1]
    # Three of four characters, two of three pairs, one of two triples, and no four: NIST's smoothing takes 1/2 of one.
    parts = (3 / 4, 2 / 3, 1 / 2, 1 / 2)
    product = 1.0
    for n, part in enumerate(parts, 1):
        product *= part
        assert scores[f"bleu-{n}"] == pytest.approx(100 * product ** (1 / n)), n
    scores = metrics.scores("text", ["one two three"], ["one two four five"])
    # Two words of three are right, and two of four found: F1 = 2 * 2 / (3 + 4); the one pair of two and three.
    assert scores["rouge-1"] == pytest.approx(100 * 4 / 7, rel=1e-6)
    assert scores["rouge-l"] == pytest.approx(100 * 4 / 7)
    assert scores["rouge-2"] == pytest.approx(100 * 2 / 5, rel=1e-6)
    assert metrics.scores("text", ["right"], ["right"])["bleu-4"] == pytest.approx(100)


def test_the_longest_common_subsequence_is_that_of_a_table(packages):
    """Against rouge-chinese, which fills one, for words that repeat, sentences, many words."""
    from rouge_chinese import Rouge

    random = np.random.default_rng(0)
    for sizes in ((1, 1), (3, 7), (40, 65), (130, 64)):
        reply, label = (" ".join(random.choice(["x", "y", "z。", "？！", "w.", "v"], size)) for size in sizes)
        words = [" ".join(Rouge().cut_sent(text)).split() for text in (reply, label)]
        expected = Rouge(["rouge-l"]).get_scores(reply, label)[0]["rouge-l"]["f"]
        assert metrics._rouge_l(*words) == pytest.approx(expected, abs=2e-8)  # the library adds 1e-8 to a divisor
    assert metrics._rouge_l([], ["x"]) == metrics._rouge_l(["x"], []) == 0.0


def test_no_file_of_others_is_read(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "jieba.cache").write_bytes(b"of somebody else")
    assert metrics.scores("text", ["今天天气"], ["今天天气"])["rouge-1"] == pytest.approx(100, rel=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["jieba.cache"]
    assert (tmp_path / "jieba.cache").read_bytes() == b"of somebody else"


@pytest.mark.parametrize(("text", "letter"), [
    ("C", "C"), ("(B)", "B"), (" D. because of the fever", "D"), ("B) malaria\nIt is common.", "B"), ("E：是", "E"),
    ("The answer is C.", "C"), ("The correct answer is **(E)**", "E"), ("Answer: B", "B"), ("答案是：D", "D"),
    ("答案: A", "A"), ("\\boxed{A}", "A"), ("\\boxed{\\text{C}}", "C"), ("option is c, or Option is D", "D"),
    ("<think>The answer is A.</think>\nC", "C"), ("<think>The answer is A.</think> The answer is B", "B"),
    ("Not A. It must be\nC", "C"), ("The answer is A. No, the answer is B.", "B"), ("We choose (D)", "D"),
    ("A. This is wrong.\nB. So is this.\nC. This is right.\nThe answer is C.", "C"), ("A：错误\nB：正确\n答案：B", "B"),
    ("C\n\nExplanation: A) is bad, B) is bad", "C"), ("A\n\nB. is bad", "A"), ("C because of D.", "C"),
    ("选择C，因为A、B都不对", "C"), ("我选C。", "C"), ("选项A错误，选项C正确", "C"),
    ("Option C is right", "C"), ("**C**", "C"), ("$C$", "C"),
    ("C!", "C"), ("C？", "C"), ("\\boxed{\\mathrm{C}}", "C"), ("The answer is: I believe C", "C"),
    ("<think>the answer is B or", None), ("</think>C", "C"),
    ("I think A is good", None), ("A patient with fever", None), ("the answer is Apple", None), ("", None),
    ("malaria", None), ("K", None),
])  # fmt: skip
def test_the_letter_of_a_reply(text, letter):
    assert metrics.choice(text) == letter


def test_scores_of_choices():
    reasoned = ["<think>\nB?\n</think>\n\nA"]
    assert metrics.scores("choice", ["A"], reasoned) == {"accuracy": 100.0, "answered": 100.0, "exact": 0.0}
    scores = metrics.scores("choice", ["A", "The answer is B", "none of them", "C. yes"], ["A", "C", "D", "C. yes"])
    assert scores == {"accuracy": 50.0, "answered": 75.0, "exact": 50.0}


@pytest.mark.parametrize(("labels", "kind"), [
    (["A", "B"], "choice"), (["A. malaria", "(C)"], "choice"), (["A", "Malaria is common"], "text"),
    (["A boy came home"], "text"), ([], "text"), (["<think>\nx\n</think>\n\nA", "B"], "choice"),
])  # fmt: skip
def test_what_the_labels_ask_for(labels, kind):
    assert metrics.kind_of(labels) == kind


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(metrics.PACKAGES, "no_such_module", "no-such-package")
    assert "no-such-package" in metrics.missing()
    with pytest.raises(ConfigError, match="pip install .*no-such-package"):
        metrics.scores("text", ["a"], ["a"])
    assert metrics.scores("choice", ["A"], ["A"])["accuracy"] == 100
    with pytest.raises(ValueError, match="1 replies for 2 labels"):
        metrics.scores("choice", ["A"], ["A", "B"])
