"""The five scores against independent implementations and slow definitions."""

import itertools
import math
import random

import pytest

from evaluate import read_predictions, read_references
from lib.scores import SCORES, bleu, cider, longest_common, meteor, nist, rouge_l, score, slot_errors, tokenize_13a, tokenize_ptb


def corpus():
    """Our own texts: 40 predictions, one to five references each, with all the punctuation that tokenizers stumble over."""
    draw = random.Random(7)
    names, areas = ["The Blue Heron", "Chez Marta", "Otter's Table", "Café Fig"], ["riverside", "city centre", "old town"]
    plans = ["{n} is a family-friendly pub in the {a}, rated {r} out of 5.", "In the {a} there's {n} (it isn't cheap: £20-25).",
             "{n}, a pub; prices are \"more than £30\" - near the {a}.", "You can't bring children to {n} in the {a}. It has a {r}-star rating!",
             "{n} serves fish & chips in the {a} area for less than £20.50, they've a rating of {r}/5."]

    def text():
        return draw.choice(plans).format(n=draw.choice(names), a=draw.choice(areas), r=draw.randint(1, 5))
    return [text() for _ in range(40)], [[text() for _ in range(1 + i % 5)] for i in range(40)]


# Computed for corpus() by sacrebleu 2.6.0 (tokenize="13a", lowercase), pycocoevalcap 1.2 with Stanford's tokenizer, and nltk 3.10
# (corpus_nist over the first references alone, where its definition is the E2E script's).
EXPECTED = {"BLEU": 0.388639, "ROUGE-L": 0.496443, "CIDEr": 1.012503, "NIST1": 2.031036}


def test_scores_agree_with_independent_implementations():
    predictions, references = corpus()
    assert bleu(predictions, references) == pytest.approx(EXPECTED["BLEU"], abs=5e-6)
    assert rouge_l(predictions, references) == pytest.approx(EXPECTED["ROUGE-L"], abs=5e-6)
    assert cider(predictions, references) == pytest.approx(EXPECTED["CIDEr"], abs=5e-6)
    assert nist(predictions, [group[:1] for group in references]) == pytest.approx(EXPECTED["NIST1"], abs=5e-6)


def test_nist_with_several_references():
    """By its definition, slowly: information over all references, clipped counts over the best, mean reference length."""
    predictions, references = corpus()
    words, others = [tokenize_13a(p) for p in predictions], [[tokenize_13a(r) for r in group] for group in references]
    every = [r for group in others for r in group]

    def occurrences(gram, texts):
        return sum(t[i:i + len(gram)] == list(gram) for t in texts for i in range(len(t) - len(gram) + 1)) if gram else sum(map(len, texts))
    total = 0.0
    for n in range(1, 6):
        gain = 0.0
        for w, group in zip(words, others):
            for gram in {tuple(w[i:i + n]) for i in range(len(w) - n + 1)}:
                hits = min(occurrences(gram, [w]), max(occurrences(gram, [r]) for r in group))
                if hits:
                    gain += hits * math.log2(occurrences(gram[:-1], every) / occurrences(gram, every))
        total += gain / sum(len(w) - n + 1 for w in words)
    ratio = sum(map(len, words)) / sum(sum(map(len, group)) / len(group) for group in others)
    penalty = math.exp(math.log(0.5) / math.log(1.5)**2 * math.log(min(ratio, 1))**2)
    assert nist(predictions, references) == pytest.approx(penalty * total, rel=1e-9)


# BLEU and NIST of corpus() where so many of the predictions are empty, by the official script's own code (pymteval).
WITH_EMPTY = {0: (0.38863889067, 3.75721139551), 1: (0.39765493819, 3.81710699937), 7: (0.35382282178, 3.45501309475), 20: (0.23253282267, 0.84648493042)}


@pytest.mark.parametrize("n", WITH_EMPTY)
def test_an_empty_prediction_is_one_empty_word(n):
    predictions, references = corpus()
    predictions = [""] * n + predictions[n:]
    assert (bleu(predictions, references), nist(predictions, references)) == pytest.approx(WITH_EMPTY[n], abs=1e-10)


def test_meteor():
    """By the official script's package, its own tokenizer before it."""
    pytest.importorskip("pycocoevalcap")
    predictions, references = corpus()
    assert meteor(predictions, references) == pytest.approx(0.24923429438, abs=1e-9)
    assert meteor([""] * 3 + predictions[3:], references) == pytest.approx(0.23747670923, abs=1e-9)


# files in the official script's layouts, with what it reads from them
PREDICTIONS = {
    "a.txt": ("A pub.\n\n  A café. \r\n\n", ["A pub.", "", "A café.", ""]), "b.txt": ("\ufeffA pub.\nA café.", ["A pub.", "A café."]),
    "c.csv": ('\ufeff"mr","output"\n"name[A], food[B]","A, a pub."\n\n"name[C]","Costs £20"\n', ["A, a pub.", "Costs £20"]),
    "d.tsv": ("MR\tsystem output\nname[A]\tA pub\n", ["A pub"]), "e.csv": ("mr,ref\nname[A],Costs Â£20 at a cafÃ©\n", ["Costs £20 at a café"])}
REFERENCES = {
    "a.txt": ("One.\nTwo.\n\nThree.\n\n", [["One.", "Two."], ["Three."]]), "b.txt": ("\ufeffOne.\nTwo.\n", [["One."], ["Two."]]),
    "c.csv": ("mr,ref\nx[1],One.\nx[1],Two.\ny[2],Three.\nx[1],Four.\n", [["One.", "Two."], ["Three."], ["Four."]])}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_are_read_as_officially(tmp_path, name):
    (tmp_path / name).write_bytes(PREDICTIONS[name][0].encode())
    assert read_predictions(tmp_path / name) == PREDICTIONS[name][1]


@pytest.mark.parametrize("name", REFERENCES)
def test_references_are_read_as_officially(tmp_path, name):
    (tmp_path / name).write_bytes(REFERENCES[name][0].encode())
    assert read_references(tmp_path / name) == REFERENCES[name][1]


@pytest.mark.parametrize("text, words", [("a,b\n1,2\n", "0 columns for the prompt in a, b"), ("mr,ref\n1\n", "row 1 has 1 columns, the header 2"), ("\n", "the file is empty")])
def test_tables_that_are_none(tmp_path, text, words):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_references(tmp_path / "x.csv")


def test_treebank_tokens():
    """As Stanford's tokenizer gives them (PTBTokenizer of the captioning metrics)."""
    assert tokenize_ptb("The Wrestlers' £20-25 pub isn't child-friendly (it's cheap); don't go!") == \
        "the wrestlers # 20-25 pub is n't child-friendly -lrb- it 's cheap -rrb- do n't go".split()
    assert tokenize_ptb("Mr. Smith's at 5 p.m. rated 3/5 -- I'll pay 1,000 & 50%... can't, cannot") == \
        "mr. smith 's at 5 p.m. rated 3/5 i 'll pay 1,000 & 50 % ca n't can not".split()
    assert tokenize_ptb("The kitchen opens at 10:30am — see you then!! Is that so?! 5:00–6:00… yes 🍲👍🏽 ☕.") == \
        "the kitchen opens at 10:30 am see you then !! is that so ?! 5:00 6:00 yes ☕".split()


def test_scores_of_the_references_themselves():
    predictions, references = corpus()
    same = [group[0] for group in references]
    assert bleu(same, references) == pytest.approx(1) and rouge_l(same, references) == pytest.approx(1)
    assert bleu(["x"] * 40, references) < 1e-3 and rouge_l([""] * 40, references) == 0 and cider([""] * 40, references) == 0


def test_longest_common():
    draw = random.Random(0)
    for _ in range(50):
        a, b = ([draw.choice("ab c".split() + ["d"]) for _ in range(draw.randint(0, 6))] for _ in range(2))
        subsequences = {s for n in range(len(a) + 1) for s in itertools.combinations(a, n)} & {s for n in range(len(b) + 1) for s in itertools.combinations(b, n)}
        assert longest_common(a, b) == max(map(len, subsequences))


def test_slot_errors():
    prompts = ["name[The Fig], eatType[pub], familyFriendly[yes], near[Linden Hotel]", "name[Otter's], area[old town]"]
    assert slot_errors(["The Fig is a pub.", "Otter's is in the Old Town."], prompts) == pytest.approx(1 / 5)
    assert slot_errors(["text"], ["no representation"]) is None


def test_short_answers(monkeypatch):
    """A share of n-grams is at most 1, whatever the official script takes off for texts shorter than n; where no reference has four words there is no BLEU."""
    monkeypatch.setitem(SCORES, "METEOR", lambda *texts: None)   # Java takes seconds to start.
    answers = ["yes"] * 14 + ["No, we do not have it today."] * 3
    same = score(answers, [[answer] for answer in answers])
    assert same["BLEU"] == pytest.approx(1) and same["exact"] == 1 and 0 < same["NIST"] < 5 * math.log2(41)
    assert bleu(["a b c d", "x y"], [["a b c d"], ["x z"]]) == pytest.approx((5 / 6 * 3 / 4) ** 0.25)
    words = ["yes", "no"] * 8
    assert bleu(words, [[word] for word in words]) is None and nist(words, [[word] for word in words]) == pytest.approx(1)


@pytest.mark.parametrize("predictions, references, words", [
    (["a"], [["a"], ["b"]], "1 predictions for 2 groups of references"), ([], [], "references of text 0 are missing"),
    (["a", "b"], [["a"], []], "references of text 1 are missing")])
def test_texts_that_do_not_belong_together(predictions, references, words):
    with pytest.raises(ValueError, match=words):
        score(predictions, references)
