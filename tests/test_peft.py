"""Every method alone and in pairs, over float32 and NF4 bases of three families; the life of an adapter; what is refused."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings, strategies as st

import peft
import quant
from conftest import FAMILIES, tiny
from model import GPT, PRESETS
from lib import checkpoint, files

SINGLE = [name for name in peft.METHODS if name != "qlora"]
WHOLE = ["embed", "head", "norm"]           # beside another method all at once, because each of them more would take minutes
COMBINATIONS = SINGLE + ["+".join(pair) for pair in itertools.combinations([name for name in SINGLE if name not in WHOLE], 2) if len(set(pair) & set(peft.LORA_KIN)) < 2]
COMBINATIONS += ["+".join([name, *WHOLE]) for name in ("full", "top", "bitfit", "lora", "prompt")] + ["embed+head"]
SMALL = dict(rank=2, adapter_size=4, prefix_length=3, prompt_length=3, top_k=1)
TOKENS = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(0))


def base(family, quantized=False, **changes):
    torch.manual_seed(0)
    model = GPT(tiny(family, **changes)).eval()
    if quantized:
        quant.store(model, quant.Storage("nf4", 16, True))
    return model


def bits(model):
    """Every tensor of a model by name, copied."""
    return {name: t.clone() for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens)[0]


def shake(model):
    """Moves the trained tensors away from where they started."""
    with torch.no_grad():
        for _, p, method in peft.parameters_by_method(model):
            if method:
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))


def promised(model, method):
    """The names that a method trains, written out."""
    c, blocks = model.config, range(model.config.n_layer)
    linear = [f"blocks.{i}.{part}" for i in blocks for part in ("attn.q", "attn.k", "attn.v", "attn.out", *(("ffn.gate",) if c.gated else ()), "ffn.up", "ffn.down")]
    places = {"before": ["norm1", "norm2"], "after": ["after1", "after2"], "both": ["norm1", "norm2", "after1", "after2"]}[c.norm_place]
    norms = [f"blocks.{i}.{place}" for i in blocks for place in places if not (c.shared_norm and place == "norm2")] + ["norm"]
    everything = {f"{n}.weight" for n in linear + norms} | {"embed.tokens.weight"}
    everything |= {f"{n}.bias" for n in linear if c.has_bias(n.rpartition(".")[2])}
    everything |= {f"{n}.bias" for n in norms} if c.norm == "layer" and c.has_bias("norm") else set()
    everything |= {f"blocks.{i}.attn.{n}_norm.weight" for i in blocks for n in "qk"} if c.qk_norm != "none" else set()
    everything |= {"embed.positions.weight"} if c.position == "learned" else set()
    everything |= set() if c.tied else {"head.weight"}
    return {"full": everything, "top": {n for n in everything if n.startswith(f"blocks.{c.n_layer - 1}.")},
            "bitfit": {n for n in everything if n.endswith("bias")},
            "lora": {f"{n}.{half}" for n in linear for half in "AB"},
            "dora": {f"{n}.{part}" for n in linear for part in "ABm"},
            "vera": {f"{n}.{part}" for n in linear for part in "db"},
            "ia3": {f"blocks.{i}.{n}" for i in blocks for n in ("attn.k.l_k", "attn.v.l_v", "ffn.down.l_ff")},
            "prefix": {f"blocks.{i}.attn.prefix.{s}" for i in blocks for s in ("s_k", "s_v")},
            "adapter": {f"blocks.{i}.adapter{n}.{part}.{kind}" for i in blocks for n in (1, 2) for part in ("down", "up") for kind in ("weight", "bias")},
            "prompt": {"embed.P"}, "embed": {"embed.tokens.weight"}, "head": set() if c.tied else {"head.weight"},
            "norm": {n for n in everything if "norm" in n or "after" in n}}[method]


def possible(family, quantized, method):
    names = method.split("+")
    without_biases = "bitfit" in names and not promised(base(family), "bitfit")
    without_head = "head" in names and "embed" not in names and tiny(family).tied
    return not (without_biases or without_head or quantized and {"full", "top"} & set(names) or "full" in names and set(peft.UNFREEZING) & set(names) - {"full"})


def families_of(method):
    """All families for a method alone; for several one of them, another for each."""
    names = list(FAMILIES)
    return names if method in SINGLE else [names[COMBINATIONS.index(method) % len(names)]]


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "nf4"])
@pytest.mark.parametrize("method, family", [(method, family) for method in COMBINATIONS for family in families_of(method)])
def test_every_method_and_pair(family, quantized, method, tmp_path):
    model, names = base(family, quantized), method.split("+")
    if not possible(family, quantized, method):
        with pytest.raises(ValueError, match="no biases|quantized|everything already|one table"):
            peft.apply(model, method, **SMALL)
        assert not peft.methods(model)
        return
    before, untouched = bits(model), logits(model)
    peft.apply(model, method, **SMALL)
    if not {"prefix", "prompt"} & set(names):
        assert torch.equal(logits(model), untouched)                        # identity at initialization
    trained = set().union(*(promised(model, name) for name in names))
    optimizer = torch.optim.AdamW(peft.param_groups(model, 1e-2, 0.1, 1.0))
    for _ in range(2):
        model(TOKENS, TOKENS.roll(-1, 1))[1].backward()
        assert {n for n, p, _ in peft.parameters_by_method(model) if p.grad is not None} == trained
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(logits(model)[i], untouched[i]) for i in range(2))
    assert set(peft.adapter_state_dict(model)) == trained
    tuned, frozen = logits(model), {n: p for n, p, m in peft.parameters_by_method(model) if not m}
    assert all(torch.equal(p, before[n]) for n, p in frozen.items())       # training left the base alone
    peft.save_adapter(model, tmp_path / "a.pt")
    assert set(peft.read_adapter(tmp_path / "a.pt")["tensors"]) == trained
    if "full" in names:
        with pytest.raises(ValueError, match="kept no copy"):
            peft.detach(model)
        model = base(family, quantized)
    else:
        peft.detach(model)
    assert same(bits(model), before) and torch.equal(logits(model), untouched)
    peft.load_adapter(model, tmp_path / "a.pt")
    assert torch.equal(logits(model), tuned)
    if not {"prefix", "prompt", "adapter"} & set(names):
        merge_and_unmerge(model, tuned)


def merge_and_unmerge(model, tuned):
    stored = bits(model)
    peft.merge(model)
    assert (logits(model) - tuned).abs().max() < 1e-5
    peft.unmerge(model)
    assert same(bits(model), stored) and torch.equal(logits(model), tuned)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method, options", [(m, {}) for m in SINGLE] + [
    ("prefix", dict(prefix_style="after")), ("prefix", dict(prefix_style="after", prefix_mlp=8)), ("prefix+prompt", dict(prefix_style="after")),
    ("lora", dict(dropout=0.5)), ("dora", dict(dropout=0.5)), ("vera", dict(dropout=0.5)), ("lora+prefix+adapter+ia3+prompt", {})])
def test_checkpointing_and_cache_change_nothing(family, method, options):
    if not possible(family, False, method):
        pytest.skip("refused")
    gradients = []
    for checkpointing in (False, True):
        model = base(family).train()
        peft.apply(model, method, **SMALL | options)
        shake(model)
        model.checkpointing = checkpointing
        torch.manual_seed(3)
        model(TOKENS, TOKENS.roll(-1, 1))[1].backward()
        gradients.append({n: p.grad for n, p, m in peft.parameters_by_method(model) if m})
    assert same(*gradients)
    model.eval()
    cached = torch.tensor(model.generate(TOKENS[:, :5], 8, temperature=0))
    assert torch.equal(cached[:, 5:], logits(model, cached[:, :-1])[:, 4:].argmax(-1))
    ragged = model.generate([TOKENS[0, :5].tolist(), TOKENS[1, :2].tolist()], 8, temperature=0)     # padded at the left
    assert ragged[0] == cached[0].tolist() and ragged[1] == model.generate(TOKENS[1:, :2], 8, temperature=0)[0]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.sampled_from(sorted(FAMILIES)), st.sampled_from([("lora", "ia3"), ("lora",), ("adapter",), ("prefix",), ("prompt",)]), st.integers(1, 9), st.integers(1, 20),
       st.sampled_from(["houlsby", "pfeiffer", "lin"]), st.sampled_from(["q", "v,k", "up,down", "all"]), st.sampled_from(["before", "after"]), st.booleans(), st.integers(1, 3))
def test_saving_whatever_the_options(tmp_path_factory, family, methods, rank, length, adapter_style, targets, prefix_style, flag, layers):
    options = dict(rank=rank, targets=targets, rslora=flag, adapter_size=rank, adapter_style=adapter_style, prefix_length=length, prompt_length=length,
                   prefix_style=prefix_style, prefix_tied=flag and prefix_style == "before", prefix_mlp=4 * (flag and prefix_style == "after"))
    path, model = tmp_path_factory.mktemp("adapter") / "a.pt", base(family, n_layer=layers)
    peft.apply(model, "+".join(methods), **options)
    shake(model)
    tuned = logits(model)
    counts = peft.count_parameters(model)
    assert counts["trainable"] == sum(counts["by_method"].values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["total"] == counts["base"] + counts["trainable"]
    peft.save_adapter(model, path)
    raw = torch.load(path, weights_only=True)
    assert raw["base"] == peft.fingerprint(model) and raw["parameters"] == sum(t.numel() for t in raw["tensors"].values()) and raw["format"] == 1
    assert raw["method"] == "+".join(peft.methods(model)) and path.stat().st_size < 4 * raw["parameters"] + 700 * len(raw["tensors"]) + 4000
    fresh = base(family, n_layer=layers)
    peft.load_adapter(fresh, path)
    torch.testing.assert_close(logits(fresh), tuned, rtol=0, atol=1e-6 if options["prefix_mlp"] else 0)      # the folded MLP may round


def test_counts_are_of_logical_shapes():
    model, stored = base("llama"), base("llama", quantized=True)
    assert peft.count_parameters(stored)["base"] == peft.count_parameters(model)["base"] == model.num_params()


def test_lora_saves_one_activation_a_layer():
    """Neither a copy of x in another type, nor x A^T, nor a weight."""
    from conftest import saved_bytes
    layer = quant.QuantLinear(quant.quantize(torch.nn.Linear(64, 256, bias=False).weight, "nf4", 64, True))
    model = base("gpt2")
    lora = peft.LoRA(layer, 8, 2.0, 0.0, "cpu")
    x = torch.randn(96, 64, dtype=torch.bfloat16, requires_grad=True)
    kept, _ = saved_bytes(lambda: lora(x))
    own = {t.untyped_storage()._cdata for t in itertools.chain(lora.parameters(), lora.buffers())}
    assert [n for key, n in kept.items() if key not in own] == [x.numel() * 2] and model


# -----------------------------------------------------------------------------
# the life of an adapter


def adapter(path, seed=0, family="gpt2", method="lora", **options):
    model = base(family)
    peft.apply(model, method, **SMALL | options)
    torch.manual_seed(seed)
    for _, p, m in peft.parameters_by_method(model):
        if m:
            p.data.normal_(std=0.1)
    peft.save_adapter(model, path)
    return logits(model)


@pytest.mark.parametrize("scheme", ["", "nf4"])
def test_dora_over_rows_of_zeros(scheme):
    """Pruned and extended bases have them: the model's function is the same at first, and learning goes on."""
    model = base("llama")
    with torch.no_grad():
        model.blocks[0].attn.q.weight[3] = 0
        model.blocks[0].ffn.down.weight.zero_()
    if scheme:
        quant.store(model, quant.Storage(scheme))
    before = logits(model)
    peft.apply(model, "dora", rank=2)
    assert torch.equal(logits(model), before)
    for p in peft.adapter_state_dict(model).values():
        p.data += 0.01 * torch.randn_like(p)
    _, loss = model(torch.arange(12)[None], torch.arange(12)[None])
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    wrapped = logits(model)
    peft.merge(model)
    torch.testing.assert_close(logits(model), wrapped, atol=1e-4, rtol=1e-4)


def test_switching_is_quick_and_exact(tmp_path):
    with torch.device("meta"):
        model = GPT(PRESETS["gpt2"])
    model.to_empty(device="cpu").base_fingerprint = "same"
    for p in model.parameters():
        p.data.fill_(0.01)
    for name, rank in (("a", 8), ("b", 4)):
        peft.apply(model, "lora", rank=rank)
        peft.save_adapter(model, tmp_path / name)
        peft.detach(model)
    adapters = [peft.read_adapter(tmp_path / name) for name in "ab"]
    seconds = []
    for i in range(7):
        start = time.perf_counter()
        peft.load_adapter(model, adapters[i % 2], replace=True)
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[3] < 0.05, seconds
    assert peft.methods(model)["lora"]["rank"] == 8


def test_switching_between_methods(tmp_path):
    expected = {name: adapter(tmp_path / name, method=name) for name in ("lora", "prefix", "adapter", "ia3+prompt", "bitfit")}
    model = base("gpt2")
    untouched = logits(model)
    for name in (*expected, *expected):
        peft.load_adapter(model, tmp_path / name, replace=True)
        assert torch.equal(logits(model), expected[name])
    peft.detach(model)
    assert torch.equal(logits(model), untouched)


def test_adding_two_adapters(tmp_path):
    adapter(tmp_path / "a", 1, alpha=6.0)
    adapter(tmp_path / "b", 2, rank=3, rslora=True)
    one, two = (peft.read_adapter(tmp_path / name) for name in "ab")
    model = base("gpt2")
    peft.load_adapter(model, peft.add_adapters([one, two], [0.5, -2.0]))
    layer, name = model.blocks[1].ffn.up, "blocks.1.ffn.up"
    x = torch.randn(3, 32)
    A, B = ([content["tensors"][f"{name}.{half}"] for content in (one, two)] for half in "AB")
    delta = 0.5 * 3 * B[0] @ A[0] - 2 * 16 / math.sqrt(3) * B[1] @ A[1]
    torch.testing.assert_close(layer(x), x @ (layer.base.weight + delta).T + layer.base.bias, rtol=1e-5, atol=1e-5)


def test_a_small_adapter_vanishes_in_requantization_and_the_report_says_so():
    model = base("llama")
    quant.store(model, quant.Storage("nf4"))
    codes = [m.packed.clone() for _, _, m in peft.linears(model)]
    tokens = torch.arange(48)[None]                              # those that merge reports on, with a context of 48
    untouched = logits(model, tokens)
    peft.apply(model, "lora", rank=1)
    for _, p, m in peft.parameters_by_method(model):
        if m:
            p.data.fill_(1e-3)
    tuned = logits(model, tokens)
    report = peft.merge(model, requantize=True)
    merged = logits(model, tokens)
    for what, a, b in (("adapter", tuned, untouched), ("kept", merged, untouched), ("error", merged, tuned)):
        assert report[what] == float((a - b).abs().mean())
    assert 0 < report["adapter"] < report["error"] and report["kept"] < 0.5 * report["adapter"]      # worse than no adapter at all
    changed = sum(int((m.packed != old).sum()) for (_, _, m), old in zip(peft.linears(model), codes))
    assert changed < 0.01 * sum(c.numel() for c in codes)
    peft.unmerge(model)
    peft.merge(model)
    assert (logits(model, tokens) - tuned).abs().mean() < 0.01 * report["adapter"]      # the dequantized merge keeps it


def test_eval_and_train_leave_weights_alone():
    model = base("gpt2")
    peft.apply(model, "lora", **SMALL)
    shake(model)
    before = bits(model)
    model.eval().train().eval()
    assert same(bits(model), before)


def test_a_prompt_from_text():
    model = base("gpt2")
    peft.add_prompt(model, 5, [7, 8])
    assert torch.equal(model.embed.P, model.embed.base.tokens.weight[[7, 8, 7, 8, 7]])


def test_groups_of_the_optimizer():
    model = base("gpt2")
    peft.apply(model, "lora+prefix+ia3", **SMALL)
    groups = {(g["lr"], g["weight_decay"]): {id(p) for p in g["params"]} for g in peft.param_groups(model, 1.0, 0.1, 16.0)}
    names = {id(p): n for n, p, _ in peft.parameters_by_method(model)}
    assert {key: {names[i].split(".")[-1] for i in ids} for key, ids in groups.items()} == {(1.0, 0.1): {"A"}, (16.0, 0.1): {"B"}, (1.0, 0.0): {"s_k", "s_v", "l_k", "l_v", "l_ff"}}


# -----------------------------------------------------------------------------
# beside the peft library

THEIR_LAYERS = {     # family -> where its blocks are, and its layers that are one of ours each
    "llama": ("model.layers", {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.out": "self_attn.o_proj",
                               "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj"}),
    "gpt2": ("transformer.h", {"attn.out": "attn.c_proj", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"})}
TRAINED = {"dora": "ABm", "vera": "db"}
KIN = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import LoraConfig, VeraConfig, get_peft_model
folder, method = sys.argv[1:]
given = torch.load(folder + "/given", weights_only=True)
gpt2 = "transformer" in next(iter(given["layers"]))
off = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0) if gpt2 else {}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **off)
options = dict(task_type="CAUSAL_LM", r=3, target_modules=sorted({name.split(".")[-1] for name in given["layers"]}), fan_in_fan_out=gpt2)
config = LoraConfig(lora_alpha=7, use_dora=True, **options) if method == "dora" else VeraConfig(projection_prng_key=0, **options)
model = get_peft_model(model, config).train()
class Mask(torch.nn.Module):
    def forward(self, x): return x * given["masks"][x.size(-1)]
tensors = {}
for name, part in given["layers"].items():
    layer = model.get_submodule("base_model.model." + name)
    if method == "dora":
        tensors[name] = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight, "m": layer.lora_magnitude_vector["default"].weight}
    else:
        tensors[name] = {"d": layer.vera_lambda_d["default"], "b": layer.vera_lambda_b["default"]}
        assert torch.equal(layer.vera_A["default"], given["A"]) and torch.equal(layer.vera_B["default"], given["B"])
    for key, p in tensors[name].items():
        assert key == "A" or torch.allclose(p, part["start"][key], rtol=1e-5)
        p.data.copy_(part["now"][key])
    if given["masks"]: (layer.lora_dropout if method == "dora" else layer.vera_dropout)["default"] = Mask()
logits = model(given["tokens"]).logits
(logits * given["weights"]).sum().backward()
torch.save({"logits": logits.detach(), "gradients": {name: {key: p.grad for key, p in own.items()} for name, own in tensors.items()}}, folder + "/theirs")
"""


@pytest.mark.peers
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("family", THEIR_LAYERS)
@pytest.mark.parametrize("method", TRAINED)
def test_loras_kin_are_the_peft_librarys(peer, tmp_path, monkeypatch, method, family, dropout):
    """The same start; logits and gradients from the same random tensors and, for dropout, masks: one a width."""
    where, theirs = THEIR_LAYERS[family]
    model = base(family).train()
    checkpoint.save_base(model, tmp_path)
    options = dict(alpha=7.0) if method == "dora" else {}
    peft.apply(model, method, rank=3, dropout=dropout, targets=",".join(name.split(".")[1] for name in theirs), **options)
    layers = {f"{where}.{i}.{name}": block.get_submodule(ours) for i, block in enumerate(model.blocks) for ours, name in theirs.items()}
    own = lambda layer: {key: getattr(layer, key) for key in TRAINED[method]}
    start = {name: {key: p.detach().clone() for key, p in own(layer).items()} for name, layer in layers.items()}
    shake(model)
    now = {name: {key: p.detach() for key, p in own(layer).items()} for name, layer in layers.items()}
    masks = {layer.in_features: 2.0 * torch.randint(2, (2, 14, layer.in_features)) for layer in layers.values()} if dropout else {}
    weights = torch.randn(2, 14, 61)
    torch.save({"layers": {name: {"start": start[name], "now": now[name]} for name in layers}, "masks": masks, "tokens": TOKENS, "weights": weights,
                "A": next(iter(layers.values())).A.detach(), "B": next(iter(layers.values())).B.detach()}, tmp_path / "given")
    peer(KIN, tmp_path, method)
    monkeypatch.setattr(peft.F, "dropout", lambda x, p, training: x * masks[x.size(-1)] if p else x)
    if method == "vera":      # lora_linear draws its masks itself
        plain = lambda x, W, bias, A, B, s, dropout, training: peft.F.linear(x, W, bias) + s * peft.F.linear(peft.F.linear(peft.F.dropout(x, dropout, training), A), B)
        monkeypatch.setattr(peft.quant, "lora_linear", plain)
    ours = model(TOKENS)[0]
    (ours * weights).sum().backward()
    saw = torch.load(tmp_path / "theirs", weights_only=True)
    torch.testing.assert_close(ours.detach(), saw["logits"], rtol=0, atol=1e-5)
    for name, layer in layers.items():
        for key, p in own(layer).items():
            gradient = saw["gradients"][name][key]
            assert gradient.abs().max() > 1e-5
            assert (p.grad - gradient).abs().max() < 1e-5 * max(1, gradient.abs().max()), (name, key)


# -----------------------------------------------------------------------------
# refused


@pytest.mark.parametrize("method, options, words", [
    ("lora", dict(rank=0), "rank is 0"), ("lora", dict(dropout=1.0), "dropout is 1.0"), ("lora", dict(alpha=0.0), "alpha is 0"),
    ("lora", dict(targets="q,gate"), "no layer 'gate'; this model has q k v out up down"), ("lora", dict(targets="w"), "no layer 'w'"),
    ("adapter", dict(adapter_size=0), "adapter_size is 0"), ("adapter", dict(adapter_style="x"), "must be houlsby, pfeiffer or lin"),
    ("adapter", dict(adapter_activation="x"), "must be one of relu, gelu"),
    ("prefix", dict(prefix_length=0), "prefix_length is 0"), ("prefix", dict(prefix_length=48), "below the context of 48"),
    ("prefix", dict(prefix_style="x"), "before or after"), ("prefix", dict(prefix_mlp=3), "prefix_mlp is 3"), ("prefix", dict(prefix_style="after", prefix_tied=True), "prefix_tied"),
    ("prompt", dict(prompt_length=0), "prompt_length is 0"), ("prompt", dict(prompt_length=48), "below the context of 48"), ("prompt", dict(prompt_ids=[61]), "below 61"),
    ("top", dict(top_k=3), "this model has 2 blocks"), ("top", dict(top_k=0), "top_k is 0"),
    ("lorra", {}, "the nearest is 'lora'"), ("lora+qlora", {}, "names one twice"), ("lora+lora", {}, "names one twice"), ("dora+lora", {}, "names one twice"), ("vera+qlora", {}, "names one twice"), ("vera", dict(rank=0), "rank is 0"), ("lora", dict(rnak=2), "the nearest is 'rank'"),
])
def test_options_that_are_refused(method, options, words):
    model = base("gpt2")
    before = bits(model)
    with pytest.raises(ValueError, match=words):
        peft.apply(model, method, **options)
    assert same(bits(model), before) and not peft.methods(model)
    peft.apply(model, "lora")                                    # nothing of the refused one is left


def test_twice_is_refused():
    model = base("gpt2")
    peft.add_lora(model, 2)
    for again in (lambda: peft.add_lora(model, 2), lambda: peft.apply(model, "ia3")):
        with pytest.raises(ValueError, match="already"):
            again()
    peft.merge(model)
    for again, words in ((lambda: peft.merge(model), "merged already"), (lambda: peft.add_ia3(model), "is merged"), (lambda: peft.pack_adapter(model), "unmerge")):
        with pytest.raises(ValueError, match=words):
            again()
    with pytest.raises(ValueError, match="not merged"):
        peft.unmerge(peft.unmerge(model) or model)


@pytest.mark.parametrize("method", ["prefix", "prompt", "adapter", "lora+prefix"])
def test_what_cannot_be_merged(method):
    model = base("gpt2")
    peft.apply(model, method, **SMALL)
    with pytest.raises(ValueError, match="cannot be merged; full, top, bitfit, lora, "):
        peft.merge(model)


@pytest.mark.parametrize("change, words", [
    (lambda c: c["tensors"].pop("blocks.0.attn.q.A"), "lacks 1 tensors: blocks.0.attn.q.A"),
    (lambda c: c["tensors"].update(more=torch.zeros(0)), "1 tensors too many: more"),
    (lambda c: c["tensors"].update({"blocks.0.attn.q.A": torch.zeros(64)}), r"shape \(64,\); here it is \(2, 32\)"),
    (lambda c: c["tensors"].update({"blocks.0.attn.q.A": torch.zeros(2, 32).half()}), "torch.float16; it must be torch.float32"),
    (lambda c: c["tensors"]["blocks.0.attn.q.A"].view(-1)[3:4].fill_(math.nan), "blocks.0.attn.q.A holds NaN"),
    (lambda c: c.update(base="0" * 64), "made for the base 000000000000"), (lambda c: c.update(format=2), "format 2 is newer"),
    (lambda c: c["options"].update(rank=3), "here it is"), (lambda c: c.update(parameters=3), "it says 3"), (lambda c: c.update(kind="state"), "not an adapter"),
    (lambda c: c.pop("options"), "options is missing"), (lambda c: c.update(method="nothing"), "unknown method 'nothing'"),
    (lambda c: c.update(tensors={}, parameters=0), "an empty adapter"),
])
def test_files_that_are_refused(tmp_path, change, words):
    adapter(tmp_path / "a")
    content = peft.read_adapter(tmp_path / "a")
    change(content)
    if words.startswith("lacks"):
        content["parameters"] -= 64
    files.save_file(tmp_path / "b", content)
    model = base("gpt2")
    with pytest.raises(ValueError, match=words):
        peft.load_adapter(model, tmp_path / "b")
    assert not peft.methods(model)
    peft.load_adapter(model, tmp_path / "a")
    before = bits(model)
    with pytest.raises(ValueError):
        peft.load_adapter(model, tmp_path / "b")
    assert same(bits(model), before)                             # nothing changed before all of it was checked


def test_another_rank_or_target_is_named(tmp_path):
    adapter(tmp_path / "a", rank=3, targets="q")
    model = base("gpt2")
    peft.apply(model, "lora", rank=2)
    with pytest.raises(ValueError, match=r"rank 3 \(here 2\), targets 'q' \(here 'all'\); the model carries lora: detach it first"):
        peft.load_adapter(model, tmp_path / "a")


def test_fingerprint_knows_the_base():
    assert peft.fingerprint(base("gpt2")) == peft.fingerprint(base("gpt2"))
    other = base("gpt2")
    other.blocks[1].ffn.up.weight.data[0, 0] += 1
    assert peft.fingerprint(other) != peft.fingerprint(base("gpt2"))
