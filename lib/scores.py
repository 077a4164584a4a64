"""
Scores of texts against references, as the E2E challenge's own script computes them, and slot errors.

    score(["The Fig is a pub."], [["The Fig is a pub.", "A pub, The Fig."]])["BLEU"]

Every score takes predictions, a list of str, and references, a list of lists of str. BLEU and NIST count
mteval-13a tokens; ROUGE-L, CIDEr and METEOR count Penn Treebank tokens.
"""

import math
import re
import shutil
import statistics
from collections import Counter

# -----------------------------------------------------------------------------
# tokens


def tokenize_13a(text):
    """mteval-v13a's tokens, lower-cased (NIST's evaluation script; the E2E script's Python version of it, in which a text
    without a word is one empty word)."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    text = text.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return text.lower().split() or [""]


CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|ll|re|ve|d|m))\b")
TREEBANK_TOKEN = re.compile(r"""
    https?://\S+ | n't\b | '(?:s|ll|re|ve|d|m)\b
    | (?:[^\W\d_]\.){2,}                                                    # abbreviations keep their stop
    | (?:mr|mrs|ms|dr|st|prof|jr|sr|vs|etc|inc|ltd|co|no)\.(?=\s+\w) | \w+\.(?=,)
    | [#@]\w+ | \.\.\. | -- | (?<!\w)-\d[\d.,]*\b
    | \d+(?::\d+)+ | [!?]{2,}                                               # 10:30 and ?! are one token each
    | \w+(?:(?:[-/._&'] | (?<=\d),(?=\d))\w+)*
    | [^\s\U00010000-\U0010ffff\ufe0f\u200d]                                # any other sign, but no emoji
    """, re.VERBOSE)
TWO_WORDS = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta"}
ESCAPED = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$"}
PLAIN = {"’": "'", "‘": "'", "“": '"', "”": '"', "‒": "--", "–": "--", "—": "--", "―": "--", "…": "..."}
PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}


def tokenize_ptb(text):
    """Penn Treebank tokens, lower-cased, without punctuation (the captioning metrics' Stanford tokenizer).

    They are that tokenizer's on all texts of E2E's val and test, and on talk with dashes, clock times, "?!" and
    emoji. They differ in e-mail addresses, markup, "C++", "x=3", "1/2" as one sign, "9:30-10:30", "'90s", initials,
    and a last word that has a stop of its own ("etc.").
    """
    text = text.lower()
    for symbol, plain in PLAIN.items():
        text = text.replace(symbol, plain)
    tokens = TREEBANK_TOKEN.findall(CONTRACTION.sub(r" \1", text))
    words = " ".join(TWO_WORDS.get(token, token) for token in tokens).split()
    return [ESCAPED.get(word, word) for word in words if word not in PUNCTUATION]


def tokenized(predictions, references, tokenize):
    """Pairs, one a prediction: its words, and a list of the words of each of its references."""
    others = [list(map(tokenize, texts)) for texts in references]
    return list(zip(map(tokenize, predictions), others))


def ngrams(words, n):
    """Counter of the n-grams, tuples of n words."""
    return Counter(zip(*(words[i:] for i in range(n))))


def matches(pairs, n):
    """Counter of the n-grams that tokenized predictions share with their references.

    An n-gram counts at most as often as it comes in the reference that has most of it.
    """
    found = Counter()
    for words, others in pairs:
        largest_counts = Counter()
        for other in others:
            largest_counts |= ngrams(other, n)
        found.update(ngrams(words, n) & largest_counts)
    return found


def number_of_ngrams(pairs, n, matched=0):
    """Number of n-grams in tokenized predictions; k < n words add k - n + 1 < 1, as in the E2E script.

    Where that leaves fewer than have matched, it is the number of those that are there: a share is at most 1.
    """
    numbers = [len(words) - n + 1 for words, _ in pairs]
    there = sum(max(number, 0) for number in numbers)
    return there if matched > max(sum(numbers), 0) else sum(numbers)


# -----------------------------------------------------------------------------
# scores


def closest_length(words, references):
    """Length of the reference that is nearest in length, the shorter one where two are equally near."""
    lengths = map(len, references)
    return min(lengths, key=lambda length: (abs(length - len(words)), length))


def bleu(predictions, references, max_n=4):
    """Corpus BLEU (Papineni et al. 2002) with the length of the closest reference, in [0, 1].

    None where every reference is shorter than max_n words, because no n-gram of that length can match.
    """
    pairs = tokenized(predictions, references, tokenize_13a)
    if max(len(words) for _, others in pairs for words in others) < max_n:
        return None
    log_precisions = []
    for n in range(1, max_n + 1):
        matched = matches(pairs, n).total()
        precision = max(matched, 1e-15) / max(number_of_ngrams(pairs, n, matched), 1e-9)
        log_precisions.append(math.log(precision))
    length = number_of_ngrams(pairs, 1)
    reference_length = sum(closest_length(words, others) for words, others in pairs)
    brevity = 1.0
    if length <= reference_length:
        brevity = math.exp(1 - reference_length / (length or 1e-5))
    return brevity * math.exp(sum(log_precisions) / max_n)


def nist(predictions, references, max_n=5):
    """NIST (Doddington 2002): each matching n-gram counts by its information.

    Information is log2 of how often the first n - 1 words come in the references over how often all n do.
    """
    pairs = tokenized(predictions, references, tokenize_13a)
    counts = Counter()                       # of the n-grams of all references; counts[()] is that of words
    mean_length = 0.0
    for _, others in pairs:
        mean_length += sum(map(len, others)) / len(others)
        for words in others:
            counts[()] += len(words)
            for n in range(1, max_n + 1):
                counts.update(ngrams(words, n))

    def information(gram):
        return math.log2(counts[gram[:-1]] / counts[gram])

    terms = []
    for n in range(1, max_n + 1):
        matched = matches(pairs, n)
        total = number_of_ngrams(pairs, n, matched.total())
        if total:
            terms.append(sum(count * information(gram) for gram, count in matched.items()) / total)
    ratio = min(number_of_ngrams(pairs, 1) / mean_length, 1)
    beta = math.log(0.5) / math.log(1.5) ** 2                    # a ratio of 2 / 3 halves the score
    penalty = math.exp(beta * math.log(ratio) ** 2) if ratio > 0 else 0.0
    return penalty * sum(terms)


def longest_common(a, b):
    """Length of the longest common subsequence of two lists."""
    above = [0] * (len(b) + 1)                                   # above[j] is that of a before x, and b[:j]
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            longer = max(row[j], above[j + 1])
            row.append(above[j] + 1 if x == y else longer)
        above = row
    return above[-1]


def rouge_l(predictions, references, beta=1.2):
    """ROUGE-L (Lin 2004), mean over texts: F of the best precision and best recall over the references."""
    def tokenize(text):
        return tokenize_ptb(text) or [""]                        # no words are one empty word there

    scores = []
    for words, others in tokenized(predictions, references, tokenize):
        common = [longest_common(other, words) for other in others]
        precision = max(common) / len(words)
        recall = max(length / len(other) for length, other in zip(common, others))
        weighted = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / weighted if weighted else 0.0)
    return statistics.fmean(scores)


def norm(vector):
    """Euclidean length of {n-gram: weight}."""
    return math.sqrt(sum(weight * weight for weight in vector.values()))


def clipped_cosine(vector, reference):
    """CIDEr-D's cosine of two {n-gram: weight}, the first clipped to the second; 0 where none is shared."""
    shared = [(vector[gram], reference[gram]) for gram in vector if gram in reference]
    dot = sum(min(a, b) * b for a, b in shared)
    return dot / (norm(vector) * norm(reference)) if dot else 0.0


def cider(predictions, references, max_n=4, sigma=6.0):
    """CIDEr-D (Vedantam et al. 2015), times ten as in the captioning script; lengths are in bigrams."""
    pairs = tokenized(predictions, references, tokenize_ptb)
    orders = range(1, max_n + 1)
    documents = Counter()                                        # groups of references that hold an n-gram
    for _, others in pairs:
        documents.update({gram for words in others for n in orders for gram in ngrams(words, n)})
    rarest = math.log(len(pairs))                                # for an n-gram that no reference holds
    idf = {gram: rarest - math.log(count) for gram, count in documents.items()}

    def tf_idf(words):
        """For every n, {n-gram: its count times its idf}."""
        counts = [ngrams(words, n) for n in orders]
        return [{gram: count * idf.get(gram, rarest) for gram, count in grams.items()} for grams in counts]

    scores = []
    for words, others in pairs:
        vectors = tf_idf(words)
        score = 0.0
        for other in others:
            difference = max(len(words), 1) - max(len(other), 1)   # in bigrams: no words have none, not -1
            penalty = math.exp(-(difference**2) / (2 * sigma**2))
            for vector, reference in zip(vectors, tf_idf(other)):
                score += penalty * clipped_cosine(vector, reference)
        scores.append(10 * score / max_n / len(others))
    return statistics.fmean(scores)


def meteor(predictions, references):
    """METEOR (Denkowski and Lavie 2014) by the optional pycocoevalcap package and Java; None without them."""
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError:
        return None
    if not shutil.which("java"):
        return None

    def tokenize(text):
        return " ".join(tokenize_ptb(text))

    pairs = tokenized(predictions, references, tokenize)
    hypotheses = {i: [text] for i, (text, _) in enumerate(pairs)}
    groups = {i: texts for i, (_, texts) in enumerate(pairs)}
    scorer = Meteor()
    score, _ = scorer.compute_score(groups, hypotheses)
    scorer.meteor_p.stdout.close()           # It ends its process, but leaves these pipes open.
    scorer.meteor_p.stderr.close()
    return score


SLOTS = ("name", "eatType", "food", "area", "near")      # a faithful text repeats their values word for word


def slot_errors(predictions, prompts):
    """Share of the SLOTS of the representations whose value the text lacks; None without representations."""
    missed = []
    for text, prompt in zip(predictions, prompts):
        for slot, value in re.findall(r"([\w ]+)\[([^\]]*)\]", prompt):
            if slot.strip() in SLOTS:
                missed.append(value.lower() not in text.lower())
    return sum(missed) / len(missed) if missed else None


def exact_answers(predictions, references):
    """Share of the texts that equal one of their references, but for white space."""
    def words(text):
        return " ".join(text.split())

    right = [words(text) in map(words, texts) for text, texts in zip(predictions, references)]
    return sum(right) / len(right) if right else None


SCORES = {"BLEU": bleu, "NIST": nist, "METEOR": meteor, "ROUGE-L": rouge_l, "CIDEr": cider}


def score(predictions, references, prompts=()):
    """All scores by name; BLEU, METEOR, ROUGE-L, slot errors (SER) and exact answers are in [0, 1].

    One that there cannot be is None: BLEU of answers of one to three words, METEOR without its package.

    prompts: the representations, for the slot errors; of other texts, exact answers are counted instead,
    since two descriptions of one place are hardly ever equal. ValueError where the numbers of texts differ, or
    references are missing.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} groups of references; "
                         "there must be one for each")
    for i, texts in enumerate(references or [[]]):               # no groups: the first one is missing
        if not texts:
            raise ValueError(f"the references of text {i} are missing; there is nothing to score against")
    scores = {name: function(predictions, references) for name, function in SCORES.items()}
    exact = None if prompts else exact_answers(predictions, references)
    return scores | {"SER": slot_errors(predictions, prompts), "exact": exact}
