"""The slide's numbers; the simulation against the same step counted over real tensors; what fits; what is refused."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

import memory
import peft
import quant
from conftest import FAMILIES, ROOT, tiny
from memory import Tracker, estimate, max_batch, parse_size, simulate
from model import GPT, PRESETS
from lib import checkpoint, machine, run
from lib.config import Config


def test_the_slide():
    rows = {name: n / 1e9 for name, n in estimate(PRESETS["opt-1.3b"]).items()}
    assert {name: round(rows[name], 2 if name == "hidden states" else 1) for name in rows} == {
        "CUDA context": 1.0, "weights": 2.6, "gradients": 2.6, "hidden states": 1.04, "optimizer states": 5.3, "total": 12.6}
    in_millions = {name: round(2 * n / 1e9 * f, 1) for name, (n, f) in {"weights": (1.3e9, 1), "optimizer states": (1.3e9, 2)}.items()}
    assert in_millions == {"weights": 2.6, "optimizer states": 5.2}         # the lecture's, from N = 1.3 B rounded
    L, h, seq = 24, 2048, 512
    assert round(2 * L * (20 * h * seq + 3 * seq**2) / 1e9, 2) == 1.04 and round(1 + 2.6 + 2.6 + 1.04 + 5.2, 1) == 12.4


# -----------------------------------------------------------------------------
# against the truth


def forget_tables():
    quant._kept_table.cache_clear()


def counted(config, method, batch, seq, dtype, storage, checkpointing, accumulation, options, knobs):
    """The peak of a real step, its second, counted over real tensors on a CPU."""
    forget_tables()
    model = memory.simulated_model(config, method, dtype, storage or peft.default_storage(method), options, knobs.param_dtype)     # real here: not on meta
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.zero_() if not t.is_floating_point() else t.fill_(0.01)
    model.checkpointing = checkpointing
    optimizer = run.make_optimizer(model.train(), knobs)
    g = torch.Generator().manual_seed(0)

    def batches():
        return [tuple(torch.randint(config.vocab_size, (2, batch, seq), generator=g)) for _ in range(accumulation)]
    scaler = run.make_scaler(machine.dtype_name(dtype), "cpu")
    run.step(model, optimizer, batches(), 1.0, scaler=scaler)
    forget_tables()
    with Tracker(model, optimizer) as tracker:
        run.step(model, optimizer, batches(), 1.0, scaler=scaler)
    return tracker.report()


def compare(family, method, batch, seq, dtype=torch.bfloat16, storage=None, checkpointing=False, accumulation=1, options={}, knobs={}, **changes):
    """family: of conftest, or a GPTConfig. knobs: of the optimizer."""
    config = tiny(family, block_size=128, **changes) if isinstance(family, str) else family
    real = counted(config, method, batch, seq, dtype, storage, checkpointing, accumulation, options, Config(**knobs))
    ours = simulate(config, method, batch, seq, dtype, "cpu", storage, checkpointing=checkpointing,
                    gradient_accumulation_steps=accumulation, **options, **knobs)
    assert sum(ours["parts"].values()) == ours["peak"] and sum(real["parts"].values()) == real["peak"]
    static = [{part: n for part, n in report["parts"].items() if part.startswith(("weights", "adapter", "optimizer"))} for report in (ours, real)]
    assert static[0] == static[1]
    return ours, real


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("checkpointing, accumulation", [(False, 1), (True, 2)])
@pytest.mark.parametrize("method, scheme", [("full", None), ("lora", None), ("qlora", None), ("lora", "int8"), ("adapter", None), ("prefix", None), ("prompt", None),
                                            ("ia3", None), ("bitfit", None), ("top", None), ("lora+prefix", "nf4"), ("dora", None), ("dora", "nf4"), ("dora", "int8"), ("vera", None), ("vera", "nf4"),
                                            ("lora+embed+head+norm", None), ("qlora+embed+head", None), ("lora+prompt+norm", None), ("embed", None)])
def test_simulated_equals_counted(family, method, scheme, checkpointing, accumulation):
    if family == "llama" and method == "bitfit":
        pytest.skip("no biases")
    storage = quant.Storage(scheme, double=True) if scheme else None
    ours, real = compare(family, method, 3, 40, storage=storage, checkpointing=checkpointing, accumulation=accumulation,
                         n_embd=64, n_layer=2, options=dict(top_k=1, rank=4))
    assert_equal(ours, real)


def assert_equal(ours, real):
    assert ours["peak"] == real["peak"], (ours, real)
    assert ours["parts"] == real["parts"] and ours["layers"] == real["layers"]


OPTIMIZERS = [dict(optimizer="adamw8bit"), dict(param_dtype="bfloat16"), dict(optimizer="adamw8bit", param_dtype="bfloat16")]


@pytest.mark.parametrize("knobs", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("family, method", [("gpt2", "full"), ("llama", "qlora+embed"), ("llama", "lora+prefix+adapter"), ("gpt2", "dora")])
def test_optimizers_in_less_memory(family, method, knobs):
    ours, real = compare(family, method, 3, 40, knobs=knobs, n_embd=96, accumulation=2)
    assert_equal(ours, real)


@pytest.mark.parametrize("family, method", [("gpt2", "full"), ("llama", "qlora+embed")])
def test_float16(family, method):
    """With the scaled loss."""
    ours, real = compare(family, method, 3, 40, torch.float16, accumulation=2)
    assert_equal(ours, real)


def test_the_slide_simulated():
    """OPT-1.3B in 16 bits: weights, gradients and optimizer states as the lecture has them, within the rounding of N to 1.3 B."""
    parts = simulate("opt-1.3b", "full", param_dtype="bfloat16")["parts"]
    for part, slide in (("weights bfloat16", "weights"), ("gradients", "gradients"), ("optimizer states", "optimizer states")):
        assert parts[part] / 1e9 == pytest.approx(memory.LECTURE[slide], rel=0.015)
    in_8_bits = simulate("opt-1.3b", "full", optimizer="adamw8bit")["parts"]["optimizer states"]
    in_32 = simulate("opt-1.3b", "full")["parts"]["optimizer states"]
    assert in_8_bits / in_32 == pytest.approx(0.25, abs=0.006)


def shrunk(name):
    """A preset's features at the size of a toy: two layers, the first with a window shorter than the sequence if the preset has any."""
    config = PRESETS[name]
    dim = 8 * config.rope.dim // config.d_head
    rope = dataclasses.replace(config.rope, dim=dim, factors=config.rope.factors[:dim // 2])
    return dataclasses.replace(config, vocab_size=61, block_size=128, n_layer=2, n_head=8, n_kv_head=8 * config.kv_heads // config.n_head or 1,
                               n_embd=64, head_dim=8, n_ffn=96, rope=rope, windows=(16, 0) if any(config.windows) else ())


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-3-27b", "phi-4-mini", "pythia-70m"])
@pytest.mark.parametrize("method, checkpointing", [("full", False), ("lora", True), ("qlora", False), ("lora+prefix", True)])
def test_todays_models(name, method, checkpointing):
    ours, real = compare(shrunk(name), method, 3, 40, checkpointing=checkpointing, accumulation=2, options={"rank": 4})
    assert_equal(ours, real)


DEEP = {"llama": {"n_layer": 7}, "gpt2": {"n_layer": 7}, "gemma3": {"n_layer": 11}, "smollm3": {"unrotated": (1, 3, 5, 7, 9), "n_layer": 10}}
QUICK = [("llama", "qlora", True), ("gpt2", "full", False), ("gemma3", "lora+embed+norm", True)]


@pytest.mark.parametrize("family, method, often", [
    pytest.param(family, method, often, marks=() if (family, method, often) in QUICK else pytest.mark.slow)
    for family in DEEP for method in (*peft.METHODS, "lora+embed+norm") for often in (False, True)
    if method not in ("top", "head") and (method != "bitfit" or family == "gpt2")])
def test_a_few_blocks_tell_of_all(family, method, often, monkeypatch):
    """To the byte, in all parts and layers. often: with checkpointing and twice a step, on a CPU."""
    config = tiny(family, block_size=128, **DEEP[family])
    device, batch = ("cpu", 3) if often else ("cuda", 1)
    settings = dict(checkpointing=often, gradient_accumulation_steps=1 + often)

    def reports():
        step = simulate(config, method, batch, 40, device=device, **settings)
        return step, memory.simulate_generation(config, method, batch, 40, device=device)
    few = reports()
    monkeypatch.setattr(memory, "period", lambda *_: 0)
    assert few == reports()


@pytest.mark.parametrize("method", ["lora", "qlora", "prefix"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_generation(family, method, monkeypatch):
    """To the byte, of which masks and what attention makes of them are a part. (Packed layers cannot be counted.)"""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    config, dtype, batch, seq = tiny(family, block_size=256), torch.bfloat16, 3, 200
    forget_tables()
    model = memory.simulated_model(config, method, dtype, peft.default_storage(method), {})          # real here: not on meta
    with torch.inference_mode():
        for t in (*model.parameters(), *model.buffers()):
            t.zero_() if not t.is_floating_point() else t.fill_(0.01)
    forget_tables()
    real = memory.tracked_generation(model, batch, seq, "cpu").report()
    assert memory.simulate_generation(config, method, batch, seq, dtype, "cpu")["peak"] == real["peak"]


def test_layers_left_out_of_storage():
    """Whether they are named by their last names or in full."""
    ours = []
    for skip in (("up",), ("blocks.0.ffn.up", "blocks.1.ffn.up")):
        report, real = compare("llama", "qlora", 1, 20, storage=quant.Storage("nf4", double=True, skip=skip), n_embd=64)
        assert_equal(report, real)
        ours.append(report)
    none_skipped = simulate(tiny("llama", block_size=128, n_embd=64), "qlora", 1, 20, device="cpu")
    up = 2 * 64 * 40        # 2 layers, n_embd 64, n_ffn 40
    assert ours[0] == ours[1]
    assert ours[0]["parts"]["weights bfloat16"] - none_skipped["parts"]["weights bfloat16"] == 2 * up


@settings(derandomize=True, deadline=None, max_examples=12)
@given(st.sampled_from(sorted(FAMILIES)), st.sampled_from(["full", "lora", "qlora", "adapter", "prefix", "prompt", "ia3", "top", "lora+ia3", "qlora+prompt"]), st.integers(1, 5),
       st.integers(1, 90), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.integers(1, 3), st.integers(1, 4), st.sampled_from([32, 64, 96]), st.integers(1, 9))
def test_random_configurations(family, method, batch, seq, dtype, checkpointing, accumulation, layers, width, rank):
    options = dict(rank=rank, top_k=1, adapter_size=rank, prefix_length=rank, prompt_length=rank)
    ours, real = compare(family, method, batch, seq, dtype, checkpointing=checkpointing, accumulation=accumulation, n_layer=layers, n_embd=width, options=options)
    assert abs(ours["peak"] - real["peak"]) <= 0.005 * real["peak"], (ours, real)


def test_static_parts_by_hand():
    c = tiny("gpt2")
    linear = c.n_layer * 12 * c.n_embd**2
    rest = (c.vocab_size + c.block_size) * c.n_embd + c.n_layer * (4 + 9) * c.n_embd + 2 * c.n_embd      # embeddings, norms, biases
    lora = c.n_layer * 4 * (8 * c.n_embd + 10 * c.n_embd)                      # r = 4: A and B of q k v out, up, down
    parts = simulate(c, "qlora", 1, 8, rank=4, device="cpu")["parts"]
    blocks = linear // 64
    scales = sum(n // 64 + 4 * -(-n // 64 // 256) + 4 for n in [c.n_embd**2] * 4 * c.n_layer + [4 * c.n_embd**2] * 2 * c.n_layer)
    assert parts["weights nf4"] == linear // 2 + scales and blocks
    assert parts["weights bfloat16"] == 2 * rest and parts["adapter"] == 4 * lora and 8 * lora <= parts["optimizer states"] <= 8 * lora + 4 * 100
    full = simulate(c, "full", 1, 8, device="cpu")["parts"]
    assert full["weights float32"] == 4 * (linear + rest)


SMALL = dataclasses.replace(PRESETS["gpt2"], n_layer=4, n_embd=120, vocab_size=2000)


def test_layers_and_rounding():
    report = simulate(SMALL, "lora", 2, 64)
    assert set(report["layers"]) == {f"blocks.{i}" for i in range(4)} and len({n for n in report["layers"].values()}) < 4
    assert all(n % 512 == 0 for part, n in report["parts"].items() if part not in ("CUDA context", "cuBLAS workspaces"))
    assert report["peak"] == sum(report["parts"].values())




def test_checkpointing_and_accumulation_do_what_they_are_for():
    peak = lambda **kwargs: simulate(SMALL, "lora", 16, 128, **kwargs)["peak"] - memory.CUDA_CONTEXT
    plain = peak()
    assert peak(checkpointing=True) < 0.7 * plain and abs(peak(gradient_accumulation_steps=4) / plain - 1) < 0.02


def test_qlora_keeps_no_more_activations_than_lora():
    kept = [{part: n for part, n in simulate(SMALL, method, 8, 128, device="cpu")["parts"].items() if part in ("attention", "ffn", "norms", "residuals", "embedding")}
            for method in ("lora", "qlora")]
    assert 0 < sum(kept[1].values()) <= 1.05 * sum(kept[0].values()), kept


def test_a_65b_model_on_a_laptop(script, tmp_path):
    (tmp_path / "code.py").write_text("import time, memory\nfrom lib import machine\nstart = time.time()\nn = memory.simulate('llama-65b', 'qlora', 1, 512)['peak']\n"
                                      "print(time.time() - start, machine.peak_bytes(), n)")
    seconds, resident, peak = map(float, script(tmp_path / "code.py").stdout.split())
    assert seconds < 20 and resident < 1e9 and 40e9 < peak < 60e9


def test_a_gpus_rms_norm_keeps_its_output_and_a_number_a_token():
    """Torch's rms_norm on a CPU, over which the simulation runs, would keep two float32 copies of its input."""
    config = tiny("llama", n_embd=512, n_layer=4)
    tokens = 4 * 32
    assert simulate(config, "lora", 4, 32)["parts"]["norms"] == 4 * 2 * (tokens * 512 * 2 + tokens * 4)      # two norms a layer


def test_no_gpu_is_touched():
    simulate(tiny("gpt2"), "qlora", 1, 16)
    assert not torch.cuda.is_initialized()


# -----------------------------------------------------------------------------
# what fits


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_largest_batch_is_the_largest(method):
    config = tiny("gpt2", n_layer=1)
    limit = simulate(config, method, 5, 32)["peak"]
    n = max_batch(config, limit, method, 32)
    assert n >= 5 and memory.predicted_peak(config, method, n, 32) <= limit < memory.predicted_peak(config, method, n + 1, 32)


def test_the_longest_sequence_is_the_longest():
    config = tiny("gpt2", block_size=24, n_layer=1)
    limit = simulate(config, "lora", 4, 11)["peak"]
    n = max_batch(config, limit, "lora", grow="seq", batch=4)
    assert 11 <= n < 24 and memory.predicted_peak(config, "lora", 4, n) <= limit < memory.predicted_peak(config, "lora", 4, n + 1)
    assert max_batch(config, 10**10, "prompt", grow="seq", prompt_length=10) == 14 and max_batch(config, 1000, "lora", grow="seq") == 0


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 5000), st.sampled_from((0.2, 1, 5)), st.integers(0, 3000))
def test_the_search(n, limit, power, floor):
    """Whatever the curve, flat at first or not, the answer is exact, and asked for a few times alone and never far beyond it."""
    asked, answer = set(), min(max(n, floor), limit) if n else 0
    assert memory.largest(lambda k: asked.add(k) or max(k, floor) ** power, max(n, floor) ** power if n else -1, limit) == answer
    assert max(asked) <= memory.FARTHEST * max(answer, 1)
    assert len(asked) <= 30 and (power != 1 or floor or len(asked) <= 6 + math.log(limit, memory.FARTHEST))


@pytest.mark.parametrize("text, n", [("16GB", 16 * 10**9), ("16 GiB", 2**34), ("1.5e9", 1_500_000_000), ("300 mb", 3 * 10**8), ("7B", 7)])
def test_sizes(text, n):
    assert parse_size(text) == n


@pytest.mark.parametrize("text", ["16 parsecs", "", "GB", "-3GB", "0", "nan", "1e99GB", "1..2GB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size; 16GB"):
        parse_size(text)


@pytest.mark.parametrize("flags, words", [
    ("--model gpt3", "unknown model 'gpt3'; the nearest are gpt2"), ("--batch 0", "batch is 0"), ("--seq 0", "seq is 0"), ("--seq 1025", "seq is 1025; the model's context leaves 1024"),
    ("--method prompt --seq 1024", "leaves 1008"), ("--fit 16parsecs", "'16parsecs' is not a size"), ("--method lorra", "the nearest is 'lora'"), ("--fit 1GB --batch 0", "batch is 0"),
])
def test_mistakes(refused, flags, words):
    assert words in refused("memory.py", *flags.split())


@pytest.mark.parametrize("flags, code, words", [("--help", 0, "--gradient_accumulation_steps"), ("--fit 16parsecs", 2, "is not a size"), ("--rang 4", 2, "--rang")])
def test_what_needs_no_torch(flags, code, words):
    without = "import runpy, sys; sys.modules['torch'] = None; sys.argv[:1] = []; runpy.run_path('memory.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", without, "memory.py", *flags.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and words in done.stdout + done.stderr, done.stderr


def test_the_command_line(script, tmp_path, capsys):
    config = tiny("gpt2", n_embd=64)
    checkpoint.save_base(GPT(config), tmp_path)

    def run(*args):
        memory.main(memory.parse(["--model", str(tmp_path), "--seq", "16", *args]))
        return capsys.readouterr().out
    out = run("--method", "lora,qlora", "--rank", "4")
    assert out == script("memory.py", "--model", tmp_path, "--seq=16", "--method=lora,qlora", "--rank=4").stdout
    assert "weights nf4" in out and "CUDA context" in out and out.splitlines()[-1].startswith("peak")
    reports = json.loads(run("--method", "full,qlora", "--json"))
    assert [r["method"] for r in reports] == ["full", "qlora"] and all(sum(r["parts"].values()) == r["peak"] for r in reports)
    assert [r["peak"] for r in reports] == [simulate(config, method, 1, 16)["peak"] for method in ("full", "qlora")]
    between = sum(r["peak"] for r in reports) // 2
    assert "full: does not fit at batch 1; qlora would fit" in run("--method", "full", "--fit", str(between))
    of_five = str(simulate(config, "lora", 5, 16)["peak"])
    assert 5 <= int(run("--method", "lora", "--fit", of_five).split()[2]) < 10
    assert "lora: sequences of " in run("--method", "lora", "--fit", of_five, "--grow", "seq")


def test_the_lectures_tables(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "opt-1.3b", dataclasses.replace(PRESETS["opt-1.3b"], n_layer=1))
    memory.main(memory.parse(["--slide"]))
    out = capsys.readouterr().out
    assert "12.40 GB" in out and "10.2 GB printed" in out
    config = tiny("gpt2", n_layer=1)
    monkeypatch.setitem(PRESETS, "tiny", config)
    monkeypatch.setattr(memory, "BERT", {"tiny": {16: 6}})
    of_two = simulate(config, "full", 2, 16, torch.float32)["peak"]
    assert memory.bert(of_two).splitlines()[1].split() == ["tiny", "16", "6", "2"]
