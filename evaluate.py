"""
Writes about the test split and scores it as the lecture's table does: BLEU, NIST, METEOR, ROUGE-L, CIDEr, slot errors.

    python evaluate.py out/lora out/full                     # one row a run
    python evaluate.py out/lora-*                            # seeds of one method become mean and deviation
    python evaluate.py out/lora --beams 10 --length_penalty 0.8 --no_repeat_ngram 4      # the LoRA paper's search
    python evaluate.py --training out/lora-*                 # what training came to, without writing any text
    python evaluate.py --predictions FILE --references FILE  # texts from elsewhere, in the official layout

The scores are those of the E2E challenge's own script: BLEU and NIST over mteval-13a tokens, ROUGE-L and CIDEr over Penn
Treebank tokens. METEOR needs the pycocoevalcap package and Java, and is a dash without. Slot errors: the share of names,
types, foods, areas and neighbours of the representations that the text does not contain.
"""

import argparse
import json
import math
import re
import shutil
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

from lib.config import Config, read_toml, run_main

# -----------------------------------------------------------------------------
# tokens


def tokenize_13a(text):
    """mteval-v13a's tokens, lower-cased (NIST's evaluation script; the E2E script's Python version of it)."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, char in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, char)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return text.lower().split()


_CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|ll|re|ve|d|m))\b")
_PTB = re.compile(r"""https?://\S+ | n't\b | '(?:s|ll|re|ve|d|m)\b
    | (?:[^\W\d_]\.){2,} | (?:mr|mrs|ms|dr|st|prof|jr|sr|vs|etc|inc|ltd|co|no)\.(?=\s+\w) | \w+\.(?=,)     # abbreviations keep their stop
    | [#@]\w+ | \.\.\. | -- | (?<!\w)-\d[\d.,]*\b | \w+(?:(?:[-/._&'] | (?<=\d),(?=\d))\w+)* | \S""", re.VERBOSE)
_SPLIT = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$"}
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}


def tokenize_ptb(text):
    """Penn Treebank tokens, lower-cased, without punctuation: those that the captioning metrics get from Stanford's tokenizer."""
    text = text.lower().replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
    words = _PTB.findall(_CONTRACTION.sub(r" \1", text))
    words = (part for word in words for part in _SPLIT.get(word, word).split())
    return [_BRACKETS.get(word, word) for word in words if word not in _PUNCTUATION]


def ngrams(words, n):
    """How often each n-gram comes, by tuples of words."""
    return Counter(zip(*(words[i:] for i in range(n))))


def most(counters):
    """For each n-gram its largest count in any of the references."""
    merged = Counter()
    for counter in counters:
        merged |= counter
    return merged


# -----------------------------------------------------------------------------
# scores: predictions, a list of str; references, a list of lists of str


def bleu(predictions, references, top=4):
    """Corpus BLEU (Papineni et al. 2002), the closest reference's length, in [0, 1]."""
    hits, lengths, reference_length = [0] * top, [0] * top, 0
    for text, texts in zip(predictions, references):
        words, others = tokenize_13a(text), [tokenize_13a(t) for t in texts]
        for n in range(top):
            hits[n] += (ngrams(words, n + 1) & most(ngrams(o, n + 1) for o in others)).total()
            lengths[n] += len(words) - n
        reference_length += min((abs(len(o) - len(words)), len(o)) for o in others)[1]
    brevity = 1.0 if lengths[0] > reference_length else math.exp(1 - reference_length / (lengths[0] or 1e-5))
    return brevity * math.exp(sum(math.log(max(h, 1e-15) / max(n, 1e-9)) for h, n in zip(hits, lengths)) / top)


def nist(predictions, references, top=5):
    """NIST (Doddington 2002): n-grams weighted by their information in the references."""
    counts, hits, lengths = [Counter() for _ in range(top + 1)], [Counter() for _ in range(top)], [0] * top
    mean_length = 0.0
    for text, texts in zip(predictions, references):
        words, others = tokenize_13a(text), [tokenize_13a(t) for t in texts]
        for n in range(top):
            found = [ngrams(o, n + 1) for o in others]
            hits[n] += ngrams(words, n + 1) & most(found)
            lengths[n] += len(words) - n
            for counter in found:
                counts[n + 1].update(counter)
        counts[0][()] += sum(map(len, others))
        mean_length += sum(map(len, others)) / len(others)
    info = (sum(h * math.log2(counts[n][gram[:-1]] / counts[n + 1][gram]) for gram, h in hits[n].items()) for n in range(top))
    ratio = lengths[0] / mean_length
    penalty = 1.0 if ratio >= 1 else math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2) if ratio > 0 else 0.0
    return penalty * sum(i / n for i, n in zip(info, lengths) if n)


def longest_common(a, b):
    """Length of the longest common subsequence of two lists."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            diagonal, row[j + 1] = row[j + 1], diagonal + 1 if x == y else max(row[j + 1], row[j])
    return row[-1]


def rouge_l(predictions, references, beta=1.2):
    """ROUGE-L (Lin 2004): the best precision and the best recall over the references, mean over texts."""
    scores = []
    for text, texts in zip(predictions, references):
        words, others = tokenize_ptb(text) or [""], [tokenize_ptb(t) or [""] for t in texts]      # no words count as one
        common = [longest_common(o, words) for o in others]
        p, r = max(common) / len(words), max(c / len(o) for c, o in zip(common, others))
        scores.append((1 + beta**2) * p * r / (r + beta**2 * p) if p and r else 0.0)
    return statistics.fmean(scores)


def cider(predictions, references, top=4, sigma=6.0):
    """CIDEr-D (Vedantam et al. 2015) as the captioning script has it: times ten, the length penalty over bigrams."""
    def count(text):
        words = tokenize_ptb(text)
        return [ngrams(words, n + 1) for n in range(top)]

    hypotheses, others = [count(t) for t in predictions], [[count(t) for t in texts] for texts in references]
    documents = Counter(gram for texts in others for gram in {g for counters in texts for c in counters for g in c})
    log_total = math.log(len(others))

    def weigh(counters):
        vectors = [{g: c * (log_total - math.log(max(1.0, documents[g]))) for g, c in counter.items()} for counter in counters]
        return vectors, [math.sqrt(sum(v * v for v in vector.values())) for vector in vectors], counters[1].total()

    scores = []
    for hypothesis, texts in zip(hypotheses, others):
        vectors, norms, length = weigh(hypothesis)
        score = 0.0
        for vectors_r, norms_r, length_r in map(weigh, texts):
            penalty = math.exp(-((length - length_r) ** 2) / (2 * sigma**2))
            for v, w, a, b in zip(vectors, vectors_r, norms, norms_r):
                dot = sum(min(x, w[g]) * w[g] for g, x in v.items() if g in w)
                score += penalty * (dot / (a * b) if a and b else dot)
        scores.append(10 * score / top / len(texts))
    return statistics.fmean(scores)


def meteor(predictions, references):
    """METEOR (Denkowski and Lavie 2014) through the optional pycocoevalcap package and Java; None without them."""
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError:
        return None
    if not shutil.which("java"):
        return None
    scorer = Meteor()
    texts = [[" ".join(tokenize_ptb(t)) for t in group] for group in references]
    return scorer.compute_score(dict(enumerate(texts)), {i: [" ".join(tokenize_ptb(p))] for i, p in enumerate(predictions)})[0]


SLOTS = ("name", "eatType", "food", "area", "near")          # those whose value a faithful text repeats word for word


def slot_errors(predictions, prompts):
    """Share of the representations' slots whose value the text does not contain; None where there is no representation."""
    missed = total = 0
    for text, prompt in zip(predictions, prompts):
        for slot, value in re.findall(r"([\w ]+)\[([^\]]*)\]", prompt):
            if slot.strip() in SLOTS:
                total += 1
                missed += value.lower() not in text.lower()
    return missed / total if total else None


SCORES = {"BLEU": bleu, "NIST": nist, "METEOR": meteor, "ROUGE-L": rouge_l, "CIDEr": cider}


def score(predictions, references, prompts=()):
    """All scores, by name: BLEU, METEOR, ROUGE-L and slot errors in [0, 1]. ValueError where the numbers of texts differ."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} groups of references; there must be one for each")
    if not references or not all(references):
        raise ValueError(f"the references of text {next((i for i, r in enumerate(references) if not r), 0)} are missing; there is nothing to score against")
    return {name: function(predictions, references) for name, function in SCORES.items()} | {"SER": slot_errors(predictions, prompts)}


# -----------------------------------------------------------------------------
# writing


def beam_search(model, prompts, max_new_tokens, beams, length_penalty=1.0, no_repeat_ngram=0, stop=None):
    """The likeliest continuation found with `beams` hypotheses: sum of log-probabilities / length ** length_penalty is largest.

    prompts: lists of ids. Returns lists of the generated ids without the stop token. An n-gram of generated tokens never
    comes twice where no_repeat_ngram is n. Ends where no running hypothesis can beat the finished ones.
    """
    import torch
    from model import Cache

    with torch.inference_mode():
        B, K, device = len(prompts), beams, model.head.weight.device
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        pos = torch.arange(longest, device=device) - torch.tensor([[longest - len(p)] for p in prompts], device=device)
        cache, rows = Cache(model.config.n_layer, model.config.block_size), torch.arange(B, device=device)
        logits = model.head(model.hidden(tokens, cache, pos)[:, -1])
        first = rows.repeat_interleave(K)
        cache.select(first)
        logits = logits[first]
        running = torch.full((B, K), -math.inf, device=device)
        running[:, 0] = 0                                        # the K copies of a prompt are one hypothesis
        text = torch.zeros(B, K, 0, dtype=torch.long, device=device)
        best, best_text, best_length = torch.full((B, K), -math.inf, device=device), text, torch.zeros(B, K, dtype=torch.long, device=device)
        for length in range(1, max_new_tokens + 1):
            logp = logits.float().log_softmax(-1)
            if no_repeat_ngram:
                forbid_repeats(logp, text.flatten(0, 1), no_repeat_ngram)
            V = logp.size(-1)
            scores, index = (running.unsqueeze(-1) + logp.view(B, K, V)).flatten(1).topk(2 * K)
            origin, token = index // V, index % V
            grown = torch.cat((text[rows[:, None], origin], token.unsqueeze(-1)), -1)          # (B, 2K, length)
            ends = (token == stop) if stop is not None else torch.zeros_like(token, dtype=torch.bool)
            finished = torch.where(ends & (torch.arange(2 * K, device=device) < K), scores / length**length_penalty, -math.inf)
            padded = torch.cat((best_text, best_text.new_zeros(B, K, length - best_text.size(-1))), -1)
            best, order = torch.cat((best, finished), 1).topk(K)
            best_text = torch.cat((padded, grown), 1)[rows[:, None], order]
            best_length = torch.cat((best_length, torch.full_like(token, length)), 1).gather(1, order)
            running, order = torch.where(ends, -math.inf, scores).topk(K)
            text, origin = grown[rows[:, None], order], origin.gather(1, order)
            if bool((best[:, -1] >= running[:, 0] / length**length_penalty).all()) or cache.seen + model.reserved == model.config.block_size:
                break
            cache.select((rows[:, None] * K + origin).flatten())
            logits = model.head(model.hidden(text[:, :, -1].reshape(-1, 1), cache, cache.next)[:, -1])
        else:
            length = max_new_tokens
        padded = torch.cat((best_text, best_text.new_zeros(B, K, text.size(-1) - best_text.size(-1))), -1)
        final, order = torch.cat((best, running / length**length_penalty), 1).max(1)
        texts = torch.cat((padded, text), 1)[rows, order]
        lengths = torch.cat((best_length, torch.full_like(best_length, text.size(-1))), 1)[rows, order]
        return [[t for t in ids[:n] if t != stop] for ids, n in zip(texts.tolist(), lengths.tolist())]


def forbid_repeats(logp, text, n):
    """Sets to -inf, in place, every token that would complete an n-gram which text (rows, length) holds already."""
    length = text.size(1)
    if length < n:
        return
    windows = text.unfold(1, n, 1)                               # (rows, length - n + 1, n)
    same = (windows[:, :, :-1] == text[:, None, length - n + 1:]).all(-1)
    row, place = same.nonzero(as_tuple=True)
    logp[row, windows[row, place, -1]] = -math.inf


def write_texts(model, tokenizer, prompts, args, progress=lambda done: None):
    """A text for every prompt, in batches of similar length: list of str in the order of the prompts."""
    ids = [tokenizer.encode_pair(prompt, "")[0] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    for start in range(0, len(order), args.batch_size):
        part = order[start:start + args.batch_size]
        batch = [ids[i] for i in part]
        if args.beams > 1 or args.no_repeat_ngram:
            out = beam_search(model, batch, args.max_new_tokens, args.beams, args.length_penalty, args.no_repeat_ngram, tokenizer.eos)
        else:
            out = [o[len(b):] for o, b in zip(model.generate(batch, args.max_new_tokens, temperature=0, stop=tokenizer.eos), batch)]
        for i, o in zip(part, out):
            texts[i] = tokenizer.decode([t for t in o if t != tokenizer.eos]).strip()
        progress(start + len(part))
    return texts


# -----------------------------------------------------------------------------
# runs and the table


def evaluate_run(folder, args):
    """Writes predictions.txt, references.txt (the official layout) and scores.json into the folder; returns the row."""
    import data
    import peft
    from lib import run
    from lib.files import write_atomic

    model, tokenizer, config = run.load_run(folder, args.device, args.dtype)
    name = args.data or config.data
    test = data.load(name).test[:args.limit or None]
    if not test or not any(example.references for example in test):
        raise ValueError(f"{name}: no test split with references there")
    start = time.perf_counter()

    def progress(done):
        if sys.stderr.isatty():
            print(f"\r{folder}: {done}/{len(test)}, {done / (time.perf_counter() - start):.1f}/s ", end="\n" if done == len(test) else "", file=sys.stderr)

    predictions = write_texts(model, tokenizer, [data.format_prompt(e.prompt, config.template) for e in test], args, progress)
    seconds = time.perf_counter() - start
    references = [e.references for e in test]
    row = {"method": config.method if config.base != str(folder) else "base", "trainable": peft.count_parameters(model)["trainable"] if config.base != str(folder) else 0,
           **score(predictions, references, [e.prompt for e in test]), "seconds": round(seconds, 1), "texts": len(test)}
    settings = {k: v for k, v in vars(config).items() if k not in NOT_COMPARED}
    write_atomic(Path(folder, "predictions.txt"), "".join(" ".join(p.split()) + "\n" for p in predictions).encode())
    write_atomic(Path(folder, "references.txt"), "\n".join("".join(" ".join(r.split()) + "\n" for r in group) for group in references).encode())
    write_atomic(Path(folder, "scores.json"), (json.dumps(row, indent=1) + "\n").encode())
    return row | {"run": str(folder), "settings": json.dumps(settings, sort_keys=True)}


def read_official(predictions, references):
    """A file of one text a line, and one of groups of references with an empty line between them."""
    def text(path):
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {error}") from None
    groups = [group.split("\n") for group in re.split(r"\n\s*\n", text(references).strip("\n"))]
    return text(predictions).rstrip("\n").split("\n"), groups


DIGITS = {"BLEU": (100, 1), "NIST": (1, 2), "METEOR": (100, 1), "ROUGE-L": (100, 1), "CIDEr": (1, 2), "SER": (100, 1)}     # as printed in the lecture


TRAINING = {"loss_before": (1, 3), "val_loss": (1, 3), "seconds": (1, 0), "peak_bytes": (1e-6, 0), "adapter_bytes": (1e-3, 0)}
NOT_COMPARED = ("seed", "out_dir", "resume", "device", "fsdp")
NAMES = {"loss_before": "loss before", "val_loss": "loss after", "peak_bytes": "peak, MB", "adapter_bytes": "adapter, kB"}


def training_row(folder):
    """A run's metrics.json as a row of the table."""
    try:
        row = json.loads(Path(folder, "metrics.json").read_text())
        settings = vars(Config(**read_toml(Path(folder, "config.toml"))))
        row = {name: row[name] for name in ("method", "trainable", *TRAINING)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no finished run there ({error})") from None
    return row | {"run": str(folder), "settings": json.dumps({k: v for k, v in settings.items() if k not in NOT_COMPARED}, sort_keys=True)}


def table(rows, markdown=False, columns=DIGITS):
    """The lecture's table: runs that differ in their seed alone become one row with mean and deviation."""
    groups = {}
    for row in rows:
        groups.setdefault(row["settings"], []).append(row)
    lines = [["run", "trained", *(NAMES.get(name, name) for name in columns), "runs"]]
    for group in groups.values():
        cells = []
        for name, (factor, digits) in columns.items():
            values = [row[name] * factor for row in group if row[name] is not None]
            cells.append("-" if not values else f"{statistics.fmean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""))
        name = re.sub(r"-\d+$", "", Path(group[0]["run"]).name) if "run" in group[0] else group[0]["method"]
        lines.append([name, f"{group[0]['trainable']:,}", *cells, str(len(group))])
    if markdown:
        lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))) for line in lines)


def parse(args):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders: runs of train.py, or models in Hugging Face layout")
    parser.add_argument("--data", default="", help="whose test split; default: the run's own")
    parser.add_argument("--limit", type=int, default=0, help="only the first N representations")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=120)
    parser.add_argument("--beams", type=int, default=1, help="1 is greedy (default)")
    parser.add_argument("--length_penalty", type=float, default=1.0)
    parser.add_argument("--no_repeat_ngram", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--training", action="store_true", help="losses, time, memory and size of the runs instead of scores")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--predictions", help="a file of texts, one a line")
    parser.add_argument("--references", help="a file of references, groups separated by an empty line")
    return parser.parse_args(args)


def main(args):
    """Scores runs, or files of predictions, and prints them."""
    if args.predictions or args.references:
        if not (args.predictions and args.references):
            raise ValueError("--predictions and --references belong together")
        rows = [{"method": Path(args.predictions).name, "trainable": 0, "settings": "", **score(*read_official(args.predictions, args.references))}]
    elif args.runs and args.training:
        rows = [training_row(folder) for folder in args.runs]
    elif args.runs:
        rows = [evaluate_run(folder, args) for folder in args.runs]
    else:
        raise ValueError("nothing to evaluate: give the folders of runs, or --predictions and --references")
    print(json.dumps(rows, indent=1) if args.json else table(rows, args.markdown, TRAINING if args.training else DIGITS))


if __name__ == "__main__":
    ARGS = parse(sys.argv[1:])
    run_main(main, ARGS)
