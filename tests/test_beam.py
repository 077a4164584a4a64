"""The search against exhaustive search, and against greedy generation."""

import itertools
import math

import pytest
import torch

from lib.beam import beam_search
from model import GPT, GPTConfig


def tiny(seed=0, scale=8):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=5, block_size=24, n_layer=2, n_head=2, n_embd=16)).eval()
    for p in model.parameters():
        p.data *= scale                                          # probabilities far from uniform
    return model


def likeliest(model, prompt, steps, penalty, stops):
    """Every sequence up to `steps` tokens, by brute force."""
    best = (-math.inf, None)
    for n in range(1, steps + 1):
        for ids in itertools.product(range(5), repeat=n):
            if set(stops) & set(ids[:-1]) or (n < steps and ids[-1] not in stops):
                continue
            logp = model(torch.tensor([prompt + list(ids)]))[0][0].log_softmax(-1)
            total = sum(float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(ids))
            best = max(best, (total / n**penalty, [t for t in ids if t not in stops]))
    return best[1]


@pytest.mark.parametrize("stops", [[0], [0, 3], [1, 2, 4]])
@pytest.mark.parametrize("penalty", [0.0, 0.8])
@pytest.mark.parametrize("seed", [0, 1])
def test_wide_beam_finds_what_exhaustive_search_finds(penalty, seed, stops):
    model, prompts = tiny(seed), [[1, 2, 3], [4]]
    with torch.no_grad():
        expected = [likeliest(model, p, 4, penalty, stops) for p in prompts]
    assert beam_search(model, prompts, 4, beams=400, length_penalty=penalty, stop=stops) == expected


def test_one_beam_is_greedy():
    model, prompts = tiny(3), [[1, 2, 3], [4], [2, 2]]
    greedy = [ids[len(p):] for ids, p in zip(model.generate(prompts, 8, temperature=0), prompts)]
    assert beam_search(model, prompts, 8, beams=1) == greedy


def plain_search(model, prompt, steps, beams, penalty, stops):
    """The search as it is defined, over a sorted list of all continuations."""
    running, finished = [(0.0, [])], []
    for n in range(1, steps + 1):
        grown = []
        for score, ids in running:
            logp = model(torch.tensor([prompt + ids]))[0][0, -1].log_softmax(-1)
            grown += [(score + float(logp[token]), [*ids, token]) for token in range(5)]
        grown.sort(reverse=True)
        finished += [(score / n**penalty, ids) for score, ids in grown[:beams] if ids[-1] in stops]
        finished = sorted(finished, reverse=True)[:beams]
        running = [(score, ids) for score, ids in grown if ids[-1] not in stops][:beams]
        if len(finished) == beams and finished[-1][0] >= running[0][0] / n**penalty:
            break
    best = max(finished + [(score / n**penalty, ids) for score, ids in running])
    return [token for token in best[1] if token not in stops]


@pytest.mark.parametrize("beams, stops, seeds", [(2, [4], range(6)), (5, [1, 2, 3], (20, 24))])
def test_as_many_beams_go_on_however_many_end(beams, stops, seeds):
    """With seeds 20 and 24 a search that keeps 2 K candidates for several stops finds another text."""
    for seed in seeds:
        model = tiny(seed, 2.8)
        with torch.no_grad():
            expected = plain_search(model, [1, 2], 7, beams, 2.0, stops)
        assert beam_search(model, [[1, 2]], 7, beams, length_penalty=2.0, stop=stops) == [expected], seed


def test_no_ngram_comes_twice():
    model = tiny(4)
    texts = beam_search(model, [[1], [2, 3]], 16, beams=3, no_repeat_ngram=2)
    assert all(len(text) == 16 for text in texts)
    for text in texts:
        grams = list(zip(text, text[1:]))
        assert len(grams) == len(set(grams))
    assert any(len(list(zip(t, t[1:]))) != len(set(zip(t, t[1:]))) for t in beam_search(model, [[1], [2, 3]], 16, beams=3))


def test_a_prompt_finds_in_a_batch_what_it_finds_alone():
    """Whatever its neighbours do: a search that is over takes no more hypotheses, and the context ends for each at its own position."""
    prompts, texts = [[1, 4], [3, 1], [2] * 14, [0, 2, 3]], set()
    for seed in range(20):
        model = tiny(seed, 2.8)
        alone = [beam_search(model, [prompt], 16, 3, 1.5, stop=[0, 3])[0] for prompt in prompts]
        assert beam_search(model, prompts, 16, 3, 1.5, stop=[0, 3]) == alone, seed
        texts |= set(map(len, alone))
    assert len(texts) > 5 and max(texts) == 16                   # The prompt of 14 tokens has room for 11.
