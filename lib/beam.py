"""
Beam search: the likeliest continuation of each prompt that K hypotheses at a time can find.

    beam_search(model, [[1, 2, 3], [4]], max_new_tokens=20, beams=10, length_penalty=0.8, stop=[0, 7])

B is the number of prompts, K of beams, V of tokens in the vocabulary.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lib.generation import cache_for, next_logits, pad_left, ready_layers, room_behind

NO_TOKEN = -1           # stands behind a finished hypothesis, up to the length of those that run


class Hypotheses(NamedTuple):
    """N continuations of each prompt. The score of one that runs is the sum of its log-probabilities."""

    scores: torch.Tensor        # (B, N) float32; -inf where there is no hypothesis
    tokens: torch.Tensor        # (B, N, length) int64

    def normalized(self, length_penalty):
        """Scores (B, N) of running hypotheses / length ** length_penalty, the scores of finished ones."""
        return self.scores / self.tokens.size(-1) ** length_penalty

    def where(self, condition):
        """The same hypotheses; where the condition, bool (B, N), is false, the score becomes -inf."""
        return Hypotheses(self.scores.masked_fill(~condition, -math.inf), self.tokens)

    def of(self, prompts):
        """Those of some of the prompts, whose numbers are given."""
        return Hypotheses(self.scores[prompts], self.tokens[prompts])

    def best(self, n):
        """The n of each prompt with the largest scores, largest first, and where they stood, (B, n)."""
        scores, order = self.scores.topk(n)
        return Hypotheses(scores, self.tokens.take_along_dim(order.unsqueeze(-1), 1)), order


def read_prompts(model, prompts, beams, cache):
    """Puts K rows a prompt into the cache, side by side; returns logp (B * K, V) of the first new token."""
    tokens, pos = pad_left(prompts, next(model.parameters()).device)
    logp = next_logp(model, tokens, cache, pos)
    rows = torch.arange(len(prompts), device=tokens.device).repeat_interleave(beams)
    cache.select(rows)
    return logp[rows]


def next_logp(model, tokens, cache, pos):
    """tokens and positions, (rows, T) -> log-probabilities of the token after the last, (rows, V) float32."""
    return next_logits(model, tokens, cache, pos).float().log_softmax(-1)


def forbid_repeats(logp, tokens, n):
    """Forbids, in place, each token that would complete an n-gram which its row of tokens holds already.

    logp: (rows, V), becomes -inf; tokens: (rows, length).
    """
    length = tokens.size(1)
    if length < n:
        return
    windows = tokens.unfold(1, n, 1)                             # (rows, length - n + 1, n)
    ending = tokens[:, None, length - n + 1:]                    # (rows, 1, n - 1)
    same = (windows[:, :, :-1] == ending).all(-1)
    row, window = same.nonzero(as_tuple=True)
    repeated = windows[row, window, -1]
    logp[row, repeated] = -math.inf


def grow(running, logp, n):
    """Continues each prompt's K hypotheses by a token. logp: (B * K, V).

    Returns the n likeliest results, and the rows (B, n) of logp and of the cache that they continue.
    """
    B, K = running.scores.shape
    scores = (running.scores.view(-1, 1) + logp).view(B, -1)     # (B, K * V)
    scores, index = scores.topk(min(n, scores.size(1)))
    V = logp.size(1)
    first_rows = torch.arange(0, B * K, K, device=logp.device)
    rows = index // V + first_rows.unsqueeze(1)
    token = index % V
    tokens = running.tokens.flatten(0, 1)[rows]                  # (B, n, length - 1)
    tokens = torch.cat((tokens, token.unsqueeze(-1)), -1)        # (B, n, length)
    return Hypotheses(scores, tokens), rows


def add_finished(finished, ended, length_penalty):
    """The K best of the finished hypotheses and of the first K of `ended`, whose scores are sums as yet."""
    K = finished.scores.size(1)
    scores = torch.cat((finished.scores, ended.normalized(length_penalty)[:, :K]), 1)
    growth = ended.tokens.size(-1) - finished.tokens.size(-1)
    padded = F.pad(finished.tokens, (0, growth), value=NO_TOKEN)
    tokens = torch.cat((padded, ended.tokens[:, :K]), 1)
    best, _ = Hypotheses(scores, tokens).best(K)
    return best


@torch.inference_mode()
def beam_search(model, prompts, max_new_tokens, beams, length_penalty=1.0, no_repeat_ngram=0, stop=None):
    """The continuation of each prompt with the largest sum of log-probabilities / length ** length_penalty.

    prompts: lists of ids. stop: an id or several, each of which ends a hypothesis. Returns lists of the
    generated ids without the stop. Where no_repeat_ngram is n, no n-gram of generated tokens comes twice.
    The search keeps `beams` hypotheses a prompt. For each prompt it ends after max_new_tokens, at the context's
    end, or where every finished hypothesis is as good as the running ones, whatever the others do.
    """
    with ready_layers(model, len(prompts) * beams):
        return search(model, prompts, max_new_tokens, beams, length_penalty, no_repeat_ngram, stop)


def search(model, prompts, max_new_tokens, beams, length_penalty, no_repeat_ngram, stop):
    """beam_search, with the layers as they are."""
    stops = {stop} if isinstance(stop, int) else set(stop or ())
    stop_ids = torch.tensor(sorted(stops), dtype=torch.long, device=next(model.parameters()).device)
    n_candidates = beams * max(2, 1 + len(stops))                # however many of these end, K go on
    cache = cache_for(model, prompts, max_new_tokens)
    logp = read_prompts(model, prompts, beams, cache)            # (B * K, V)
    scores = logp.new_full((len(prompts), beams), -math.inf)
    no_tokens = logp.new_empty((len(prompts), beams, 0), dtype=torch.long)
    finished = Hypotheses(scores.clone(), no_tokens)
    scores[:, 0] = 0                                             # the K copies of a prompt are one hypothesis
    running = Hypotheses(scores, no_tokens)
    room = room_behind(model, prompts).clamp(max=max_new_tokens - 1).to(scores.device)
    found = [[] for _ in prompts]
    going = torch.arange(len(prompts), device=scores.device)     # prompts whose search goes on
    for n in range(1, max_new_tokens + 1):
        if no_repeat_ngram:
            forbid_repeats(logp, running.tokens.flatten(0, 1), no_repeat_ngram)
        candidates, rows = grow(running, logp, n_candidates)
        ends = torch.isin(candidates.tokens[:, :, -1], stop_ids)
        finished = add_finished(finished, candidates.where(ends), length_penalty)
        running, order = candidates.where(~ends).best(beams)
        is_last = n > room[going]                                # (B,)
        finished = add_finished(finished, running.where(is_last[:, None]), length_penalty)
        best_running = running.normalized(length_penalty)[:, 0]  # (B,)
        over = is_last | (finished.scores[:, -1] >= best_running)
        for prompt, ids in zip(going[over].tolist(), finished.tokens[over, 0].tolist()):
            found[prompt] = ids
        if over.all():
            break
        kept = (~over).nonzero().squeeze(1)
        going, finished, running = going[kept], finished.of(kept), running.of(kept)
        cache.select(rows[kept].gather(1, order[kept]).flatten())
        logp = next_logp(model, running.tokens[:, :, -1].reshape(-1, 1), cache, cache.next)
    silent = {NO_TOKEN, *stops}
    return [[token for token in ids if token not in silent] for ids in found]
