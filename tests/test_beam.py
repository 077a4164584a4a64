"""The search against exhaustive search, and against greedy generation."""

import itertools
import math

import pytest
import torch

from lib.beam import beam_search
from model import GPT, GPTConfig


def tiny(seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=5, block_size=24, n_layer=2, n_head=2, n_embd=16)).eval()
    for p in model.parameters():
        p.data *= 8                                              # probabilities far from uniform
    return model


def likeliest(model, prompt, steps, penalty, stop):
    """Every sequence up to `steps` tokens, by brute force."""
    best = (-math.inf, None)
    for n in range(1, steps + 1):
        for ids in itertools.product(range(5), repeat=n):
            if stop in ids[:-1] or (n < steps and ids[-1] != stop):
                continue
            logp = model(torch.tensor([prompt + list(ids)]))[0][0].log_softmax(-1)
            total = sum(float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(ids))
            best = max(best, (total / n**penalty, [t for t in ids if t != stop]))
    return best[1]


@pytest.mark.parametrize("penalty", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_wide_beam_finds_what_exhaustive_search_finds(penalty, seed):
    model, prompts = tiny(seed), [[1, 2, 3], [4]]
    with torch.no_grad():
        expected = [likeliest(model, p, 4, penalty, stop=0) for p in prompts]
    assert beam_search(model, prompts, 4, beams=400, length_penalty=penalty, stop=0) == expected


def test_one_beam_is_greedy():
    model, prompts = tiny(3), [[1, 2, 3], [4], [2, 2]]
    greedy = [ids[len(p):] for ids, p in zip(model.generate(prompts, 8, temperature=0), prompts)]
    assert beam_search(model, prompts, 8, beams=1) == greedy


def test_no_ngram_comes_twice():
    model = tiny(4)
    texts = beam_search(model, [[1], [2, 3]], 16, beams=3, no_repeat_ngram=2)
    assert all(len(text) == 16 for text in texts)
    for text in texts:
        grams = list(zip(text, text[1:]))
        assert len(grams) == len(set(grams))
    assert any(len(list(zip(t, t[1:]))) != len(set(zip(t, t[1:]))) for t in beam_search(model, [[1], [2, 3]], 16, beams=3))
