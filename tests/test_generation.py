"""Generation with layers made ready for it, against the model as it is."""

from contextlib import nullcontext

import pytest
import torch
from conftest import FAMILIES, tiny

import memory
import peft
import quant
from lib import generation
from lib.generation import Cache, each, ready_layers, without_onednn
from model import GPT

PROMPTS = [[1, 2, 3, 4, 5], [6, 7]]


def build(method, family="llama", dtype=torch.float32, storage=None):
    """A tiny model that carries a method, whose tensors are no longer as at first."""
    torch.manual_seed(0)
    model = GPT(tiny(family), dtype).eval()
    for p in model.parameters():
        p.data *= 4                                              # Its choices are clear.
    if storage:
        quant.store(model, storage)
    peft.apply(model, method)
    for p in peft.adapter_state_dict(model).values():
        p += torch.randn_like(p) * 0.1 * (p.std() + 0.1 if p.numel() > 1 else 1)
    return model


def with_and_without_copies(model, monkeypatch):
    """The greedy texts, and the logits of the prompts with layers ready for 1 and for 3 rows, beside those of the model."""
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = model(tokens)[0]
        logits = []
        for rows in (1, 3):
            with ready_layers(model, rows):
                logits.append(model(tokens)[0])
    texts = model.generate(PROMPTS, 12, temperature=0)
    monkeypatch.setattr(generation, "free_bytes", lambda device: 0)
    return expected, logits, texts, model.generate(PROMPTS, 12, temperature=0)


@pytest.mark.parametrize("scheme", ["", "nf4", "int8"])
@pytest.mark.parametrize("method", peft.METHODS)
def test_every_method_generates_the_same(method, scheme, monkeypatch, capsys):
    storage = quant.Storage(scheme, double=True) if scheme else None
    if method in ("full", "top") and scheme or method == "qlora" and not scheme:
        pytest.skip("there is no such model")
    model = build(method, "llama" if method != "bitfit" else "gpt2", storage=storage)
    expected, logits, fast, slow = with_and_without_copies(model, monkeypatch)
    for ready in logits:
        assert torch.allclose(ready, expected, atol=1e-4, rtol=1e-4), float((ready - expected).abs().max())
    assert fast == slow
    assert "more slowly" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_the_same(family, monkeypatch):
    model = build("lora", family)
    _, _, fast, slow = with_and_without_copies(model, monkeypatch)
    assert fast == slow


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", peft.METHODS)
def test_a_narrow_type_errs_no_more(method, rows):
    """In bfloat16, where layers lie packed, against what float32 computes."""
    family = "gpt2" if method == "bitfit" else "llama"
    storage = None if method in ("full", "top") else quant.Storage("nf4")
    tokens = torch.tensor(PROMPTS[:1])
    model = build(method, family, torch.bfloat16, storage)
    with torch.no_grad():
        exact, plain = build(method, family, torch.float32, storage)(tokens)[0], model(tokens)[0]
        with ready_layers(model, rows):
            ready = model(tokens)[0]
    assert (ready - exact).norm() < 1.3 * (plain - exact).norm()


def test_a_narrow_type_keeps_its_adapter_beside_the_weight():
    """Nothing is rounded but to the type: [W, s B] and A are in it what they are in the model."""
    model = build("lora", dtype=torch.bfloat16, storage=quant.Storage("nf4"))
    down = model.blocks[0].ffn.down
    with torch.no_grad(), ready_layers(model, 1):
        ready = model.blocks[0].ffn.down
        both = ready.packed.to_dense() if ready.weight is None else ready.weight
        assert torch.equal(both, torch.cat((down.base.dequantize(), down.s * down.B), 1).bfloat16())
        assert torch.equal(ready.A, down.A.bfloat16())
    assert model.blocks[0].ffn.down is down


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method, options", [("lora", {"targets": "q,v,up"}), ("lora", {"rank": 65}), ("lora", {"rslora": True}),
                                             ("dora", {"targets": "k,gate"}), ("lora+ia3", {}), ("vera", {})])
@pytest.mark.parametrize("bias", ["", "q v up"])
@pytest.mark.parametrize("rows", [1, 3])
def test_layers_of_one_input_are_one_product(method, options, bias, rows, dtype):
    """Against each layer in float64, with one rounding of A x and two of the sum."""
    torch.manual_seed(0)
    model = GPT(tiny("llama", bias=bias), dtype).eval()
    peft.apply(model, method, **options)
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.3
    attn, ffn = model.blocks[1].attn, model.blocks[1].ffn
    groups = [(attn.q, attn.k, attn.v), (ffn.gate, ffn.up)]
    x = torch.randn(rows, 1, model.config.n_embd).to(dtype)
    expected = [[exactly(layer, x) for layer in group] for group in groups]
    with torch.no_grad(), ready_layers(model, rows), without_onednn() if rows == 1 else nullcontext():
        found = [each(x, attn.q, attn.k, attn.v), each(x, ffn.gate, ffn.up)]
    for y, exact in zip(sum(map(list, found), []), sum(expected, [])):
        assert y.dtype == dtype and y.shape == exact.shape
        assert (y - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def exactly(layer, x):
    weight, bias = peft.merged_weight(layer)
    return torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_without_padding_need_no_mask(family, method, dtype):
    """Prompts, single tokens and several at once behind a cache, against the mask of all positions."""
    model = build(method, family, dtype)
    tokens = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(0))
    found = {}
    for padded in (True, False):
        cache = Cache(model.config.n_layer, 14, padded)
        with torch.no_grad():
            found[padded] = torch.cat([model.hidden(part, cache) for part in tokens.split([7, 1, 1, 4, 1], 1)], 1)
    tolerance = 1e-10 if dtype == torch.float64 else 0.05
    assert (found[True] - found[False]).norm() <= tolerance * found[True].norm()


@pytest.mark.parametrize("method", ["lora", "prompt"])
@pytest.mark.parametrize("dtype, prompts, expected", [
    (torch.bfloat16, [[1, 2, 3]], [True, False, False]), (torch.bfloat16, [[1]], [True, False, False]),
    (torch.bfloat16, PROMPTS, [True] * 3), (torch.float32, [[1, 2, 3]], [True] * 3)])
def test_only_the_products_of_one_row_are_torchs_own(dtype, prompts, expected, method, monkeypatch):
    """Whether oneDNN's products are allowed in the prompt and in each token after it; afterwards they are again."""
    model = build(method, dtype=dtype)
    hidden, allowed = model.hidden, []

    def noted(*rest):
        allowed.append(torch.backends.mkldnn.enabled)
        return hidden(*rest)

    monkeypatch.setattr(model, "hidden", noted)
    for _ in model.stream(prompts, len(expected), temperature=0):
        assert torch.backends.mkldnn.enabled
    assert allowed == expected


def test_the_layers_come_back_after_a_failure():
    model = build("lora")
    before = dict(model.named_modules())
    with pytest.raises(IndexError):
        model.generate([[10**6]], 3)
    assert dict(model.named_modules()) == before and torch.backends.mkldnn.enabled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_have_ended_are_no_longer_computed(dtype, monkeypatch):
    model = build("lora", dtype=dtype)
    sizes = []
    hidden = model.hidden

    def counted(tokens, *rest):
        sizes.append(len(tokens))
        return hidden(tokens, *rest)

    free = model.generate(PROMPTS, 12, temperature=0)
    stop = next(token for token in free[0][5:] if token not in free[1][2:])
    monkeypatch.setattr(model, "hidden", counted)
    first, second = model.generate(PROMPTS, 12, temperature=0, stop=stop)
    assert first == free[0][:len(first)] and first[-1] == stop and second == free[1]
    assert sizes == [2] * (len(first) - 5) + [1] * (12 - (len(first) - 5))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method, storage", [("prompt", None), ("lora", None), ("qlora", peft.QLORA)])
def test_the_simulation_knows_the_copies(method, storage, dtype, rows, monkeypatch):
    """What is counted while a real model generates is what the simulation says. (Packed layers, which cannot be counted, are mere copies.)"""
    config = tiny("llama")
    model = build(method, dtype=dtype, storage=storage)
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
    monkeypatch.setattr(generation, "simulating", lambda: True)
    real = memory.tracked_generation(model, rows, 20, "cpu").report()
    predicted = memory.simulate_generation(config, method, rows, 20, dtype, "cpu", storage)
    copies = [report["parts"].get("copies of the layers", 0) for report in (real, predicted)]
    dense_ones_too = generation.has_better_place(torch.empty(1, dtype=dtype), rows)      # bfloat16 depends on the processor
    assert copies[0] == copies[1] and (copies[0] > 0) == (method != "prompt" or dense_ones_too)
    assert real["peak"] == pytest.approx(predicted["peak"], rel=0.05)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_prompt_has_the_context_to_itself(family, method):
    """A longer neighbour does not end it earlier; positions, rotary or learned, are its own."""
    model = build(method, family)
    room = model.config.block_size - model.reserved
    prompts = [[1, 2], [3] * (room - 4), [4] * room, [5, 6, 7]]
    together = model.generate(prompts, room, temperature=0)
    assert together == [model.generate([prompt], room, temperature=0)[0] for prompt in prompts]
    assert [len(ids) for ids in together] == [room + 1] * 4
    with pytest.raises(ValueError, match="positions, but the model's context is"):
        model.generate([[1], [2] * (room + 1)], 1)
