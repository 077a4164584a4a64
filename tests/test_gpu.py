"""
A GPU computes what the CPU computes: to the bit where it stores, closely elsewhere. Skipped where there is none;
NANOPEFT_TRY_GPU_TESTS_ON=cpu runs these tests on the CPU, which finds the mistakes of their own.
"""

import gc
import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, tiny

import data
import hub
import memory
import peft
import quant
import train
from lib import checkpoint, kernels, machine, run
from lib.beam import beam_search
from lib.config import Config, command_line
from model import GPT, Norm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")      # Triton's own
TRIED_ON = os.environ.get("NANOPEFT_TRY_GPU_TESTS_ON")
STORAGES = {"dense": None, "nf4": quant.Storage("nf4", double=True), "int8": quant.Storage("int8", None)}
OPTIONS = dict(rank=3, adapter_size=4, prefix_length=3, prompt_length=2, top_k=1)


@pytest.fixture(scope="module")
def gpu():
    """The device that is tested. Products in float32 are exact there."""
    if not TRIED_ON and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    assert torch.get_float32_matmul_precision() == "highest"
    return torch.device(TRIED_ON or "cuda", None if TRIED_ON else 0)


# -----------------------------------------------------------------------------
# storage


def weights(dtype):
    """Weights that reach every branch: several scales, a block of zeros, denormal numbers, and a last block that is not whole."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 150, generator=g) * torch.logspace(-9, 3, 70)[:, None]
    weight[3:6] = 0
    weight[6] *= 1e-33
    return weight.to(dtype)


def assert_same_bits(q, expected):
    for name, tensor in expected.tensors().items():
        assert torch.equal(getattr(q, name).cpu(), tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", quant.CODES)
def test_storage_has_the_same_bits(gpu, scheme, dtype, monkeypatch):
    weight = weights(dtype)
    for block in (*quant.BLOCKS, None):
        for double in (False, True):
            expected = quant.quantize(weight, scheme, block, double)
            q = quant.quantize(weight.to(gpu), scheme, block, double)
            assert_same_bits(q, expected)
            for into in (torch.float32, torch.bfloat16, torch.float16):
                dense = expected.dequantize(into)
                assert torch.equal(q.dequantize(into).cpu(), dense), (block, double, into)
                with monkeypatch.context() as patched:
                    patched.setattr(quant, "_kernel_fails", True)
                    assert torch.equal(q.dequantize(into).cpu(), dense), (block, double, into, "without the kernel")
    assert not quant._kernel_fails


def test_a_large_weight(gpu):
    """Of several chunks, and so many programs of the kernel."""
    rows = 400 if TRIED_ON else 9000
    weight = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(0))
    expected = quant.quantize(weight, "nf4", 64, True)
    q = quant.quantize(weight.to(gpu), "nf4", 64, True)
    assert_same_bits(q, expected)
    assert torch.equal(q.dequantize(torch.bfloat16).cpu(), expected.dequantize(torch.bfloat16))


def test_what_is_not_finite_is_refused(gpu):
    weight = torch.ones(8, 64, device=gpu)
    weight[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"1 of 512 values, the first at \[1, 2\]"):
        quant.quantize(weight, "nf4")


# -----------------------------------------------------------------------------
# parts, beside float64 on the CPU

BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def assert_close(ours, exact, bound):
    """Each tensor's error is small beside its largest number."""
    for a, b in zip(ours, exact, strict=True):
        error = (a.detach().double().cpu() - b.detach()).abs().max() / b.detach().abs().max()
        assert error <= bound, (float(error), bound)


def gradients(function, inputs, device, dtype):
    """[result, gradients of the inputs, ..] of a function of tensors, made in float64 and rounded to dtype."""
    own = [x.to(dtype).to(device, copy=True).requires_grad_() for x in inputs]
    y = function(*own)
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y * g.to(y)).sum().backward()
    return [y, *(x.grad for x in own)]


def random(*shapes):
    """Tensors that bfloat16 holds exactly, so that inputs have no error."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g).bfloat16().double() for shape in shapes]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_lora_linear(gpu, storage, dtype):
    W, bias, *inputs = random((80, 96), (80,), (3, 50, 96), (4, 96), (80, 4))
    stored = W.float()
    if STORAGES[storage]:
        stored = STORAGES[storage].quantize(W.float())
        W = stored.dequantize(torch.float32).to(dtype).double()
    own = stored.to(gpu)

    def ours(x, A, B):
        return quant.lora_linear(x, own, bias.to(gpu).to(x.dtype), A, B, 2.0)

    def exact(x, A, B):
        return x @ W.T + bias + 2.0 * (x @ A.T) @ B.T

    assert_close(gradients(ours, inputs, gpu, dtype), gradients(exact, inputs, "cpu", torch.float64), BOUNDS[dtype])
    if STORAGES[storage]:
        layer = quant.QuantLinear(own, bias.float().to(gpu))
        frozen = gradients(layer, inputs[:1], gpu, dtype)
        assert_close(frozen, gradients(lambda x: x @ W.T + bias, inputs[:1], "cpu", torch.float64), BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("T, S, window", [(1, 9, 0), (33, 33, 0), (130, 146, 0), (40, 40, 7)])
def test_attention(gpu, dtype, kv_heads, T, S, window):
    config = tiny("llama", n_head=4, n_kv_head=kv_heads, head_dim=16, windows=(window, window))
    attention = GPT(config).blocks[0].attn
    inputs = random((2, 4, T, 16), (2, kv_heads, S, 16), (2, kv_heads, S, 16))
    mask = kernels.causal_mask(T, S, window, "cpu")

    def exact(q, k, v):
        k, v = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
        scores = (q @ k.mT / 4).masked_fill(~mask, -math.inf)
        return scores.softmax(-1) @ v

    ours = gradients(lambda q, k, v: attention.attend(q, k, v, None), inputs, gpu, dtype)
    assert_close(ours, gradients(exact, inputs, "cpu", torch.float64), 3 * BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_norms(gpu, family, dtype):
    config = tiny(family)
    norm = Norm(config, 96, bias=True).to(gpu)
    x, weight = random((3, 50, 96), (96,))
    norm.weight.data = weight.float().to(gpu)

    def exact(x):
        x = x - x.mean(-1, keepdim=True) if config.norm == "layer" else x
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * (weight + config.norm_offset)

    assert_close(gradients(norm, [x], gpu, dtype), gradients(exact, [x], "cpu", torch.float64), BOUNDS[dtype])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_cross_entropy(gpu, dtype, smoothing, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 64 * 301)              # several chunks
    x, W = random((200, 32), (301, 32))
    targets = torch.randint(-1, 301, (200,), generator=torch.Generator().manual_seed(0))

    def ours(x, W):
        return kernels.cross_entropy(x, W, targets.to(x.device), smoothing)

    def exact(x, W):
        return F.cross_entropy(x @ W.T, targets, ignore_index=-1, label_smoothing=smoothing)

    assert_close(gradients(ours, (x, W), gpu, dtype), gradients(exact, (x, W), "cpu", torch.float64), 2 * BOUNDS[dtype])


# -----------------------------------------------------------------------------
# methods


def base(family, dtype, storage, device, scale=1.0):
    """A tiny model, the same on every device."""
    torch.manual_seed(0)
    model = GPT(tiny(family), dtype)
    for p in model.parameters():
        p.data = (p.data + 0.05 * torch.randn_like(p)) * scale
    if storage:
        quant.store(model, storage)
    return model.to(device)


def attached(family, method, storage, device, dtype=torch.float32, scale=1.0, **options):
    """The same with a method, whose tensors are no longer as at first."""
    model = base(family, dtype, storage, device, scale)
    peft.apply(model, method, **OPTIONS | options)
    for name, p in sorted(peft.adapter_state_dict(model).items()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        start = torch.ones_like(noise) if name.endswith((".l_k", ".l_v", ".l_ff", ".m")) else torch.zeros_like(noise)
        added = method_of(model, name) not in peft.UNFREEZING
        p.copy_(start + 0.1 * noise if added else p.cpu() + 0.01 * noise)
    return model


def method_of(model, name):
    return next(method for other, _, method in peft.parameters_by_method(model) if other == name)


def batches(device, n=3):
    """n steps of two micro-batches with padding at the right."""
    g = torch.Generator().manual_seed(0)
    for _ in range(n):
        micro_batches = []
        for _ in range(2):
            tokens, targets = torch.randint(61, (2, 3, 24), generator=g)
            targets[0, 15:] = -1
            micro_batches.append((tokens.to(device), targets.to(device)))
        yield micro_batches


def losses(model, device):
    """The losses of three steps."""
    optimizer = run.make_optimizer(model.train(), Config(learning_rate=1e-3))
    return [float(run.step(model, optimizer, micro_batches, 1.0)[0]) for micro_batches in batches(device)]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("method", [*peft.METHODS, "lora+prefix+adapter+ia3+prompt"])
def test_methods(gpu, method, storage):
    family = "gpt2" if method == "bitfit" else "llama"
    storage = STORAGES[storage]
    if storage and method in ("full", "top"):
        pytest.skip(f"{method} trains layers that are stored")
    expected = losses(attached(family, method, storage, "cpu"), "cpu")
    assert losses(attached(family, method, storage, gpu), gpu) == pytest.approx(expected, rel=2e-4)
    rough = losses(attached(family, method, storage, gpu, torch.bfloat16), gpu)
    assert rough == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "qlora+adapter"])
def test_dropout_comes_again_with_checkpointing(gpu, method):
    found = []
    for checkpointing, dropout in ((False, 0.3), (True, 0.3), (False, 0.0)):
        model = attached("llama", method, None, gpu, dropout=dropout)
        model.checkpointing = checkpointing
        torch.manual_seed(7)
        found.append(losses(model, gpu))
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] != pytest.approx(found[2], rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora", "prefix", "prompt", "lora+prefix+adapter+ia3+prompt"])
def test_packing(gpu, method):
    model = attached("llama", method, None, gpu)
    lengths = [3, 9, 9, 1, 12]
    rows = [torch.randint(61, (2, n), generator=torch.Generator().manual_seed(i)).to(gpu) for i, n in enumerate(lengths)]
    tokens, targets = torch.cat(rows, 1).unsqueeze(1)
    found = []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            loss = model(tokens, targets, lengths=lengths)[1]
        else:
            loss = sum(model(t[None], y[None])[1] * len(t) / sum(lengths) for t, y in rows)
        loss.backward()
        found.append([loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])])
    assert_close(found[0], [t.double().cpu() for t in found[1]], 1e-5)


# -----------------------------------------------------------------------------
# generation

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8], [9, 10, 11, 12]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method, storage", [("lora", "dense"), ("lora", "nf4"), ("lora", "int8"), ("prefix+prompt", "dense")])
def test_generation(gpu, family, method, storage):
    models = [attached(family, method, STORAGES[storage], device, scale=3.0).eval() for device in ("cpu", gpu)]
    expected, found = (model.generate(PROMPTS, 20, temperature=0) for model in models)
    assert found == expected and len({token for row in found for token in row[5:]}) > 3
    stop = found[0][8]
    expected, found = (model.generate(PROMPTS, 20, temperature=0, stop=stop) for model in models)
    assert found == expected
    expected, found = (beam_search(model, PROMPTS, 10, 4, 0.8, 3, stop) for model in models)
    assert found == expected


def test_drawing(gpu):
    model = attached("llama", "lora", None, gpu)
    texts = []
    for seed in (1, 1, 2):
        generator = torch.Generator(gpu).manual_seed(seed)
        texts.append(model.generate(PROMPTS, 20, 1.0, top_k=20, top_p=0.9, generator=generator))
    assert texts[0] == texts[1] != texts[2]


def test_bfloat16_generates_as_it_reads(gpu):
    """Text that grows token by token in the cache is what the whole text's logits say, but for near ties."""
    model = attached("llama", "qlora", None, gpu, torch.bfloat16, scale=3.0).eval()
    (text,) = model.generate(PROMPTS[:1], 30, temperature=0)
    with torch.no_grad():
        best = model(torch.tensor([text[:-1]], device=gpu))[0][0, 4:].argmax(-1)
    agree = sum(a == b for a, b in zip(best.tolist(), text[5:]))
    assert agree >= 27


# -----------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory, real_data):
    """A folder with a base, a real tokenizer and data."""
    folder = tmp_path_factory.mktemp("gpu")
    torch.manual_seed(0)
    checkpoint.save_base(GPT(tiny("llama", vocab_size=512, block_size=128)), folder / "base")
    texts = ["The cat sat." * (1 + i % 5) for i in range(48)]
    data.Tokenizer.load(real_data / "stories260k").save(folder / "base")
    records = [{"prompt": f"{i}", "completion": text} for i, text in enumerate(texts)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(autouse=True)
def own_signals():
    """A run takes over two signals; they are given back."""
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def trained(gpu, folder, name, *flags):
    """train.py's run of six steps with those flags; returns its folder."""
    out = folder / name
    given = ["--base", folder / "base", "--data", folder / "data.jsonl", "--device", gpu, "--out_dir", out, "--max_iters", 6,
             "--eval_interval", 3, "--batch_size", 4, "--gradient_accumulation_steps", 2, "--dropout", 0.2, *flags]
    train.train(command_line(list(map(str, given))))
    return out


def steps_of(out):
    """The losses of a run's steps and evaluations."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry.get("loss", entry.get("val_loss")) for entry in entries]


@pytest.mark.parametrize("flags", [
    "--method qlora", "--method qlora --packing --checkpointing", "--method dora --dtype float32", "--method qlora --dtype float16",
    "--method lora --optimizer adamw8bit --param_dtype bfloat16"])
def test_resuming_is_exact(gpu, folder, flags, monkeypatch):
    name = flags.replace(" ", "").replace("-", "_")
    whole = trained(gpu, folder, f"whole{name}", *flags.split())
    asked = iter([False, False, False, False, True])
    with monkeypatch.context() as patched:
        patched.setattr(machine, "anybody", lambda *_: next(asked))
        parts = trained(gpu, folder, f"parts{name}", *flags.split())
    assert peft.read_adapter(parts / "adapter.pt") and len(steps_of(parts)) == 5       # four steps and an evaluation
    train.train(command_line(["--resume", str(parts)]))
    assert steps_of(parts) == steps_of(whole) and len(steps_of(whole)) == 8
    state, expected = (run.newest_state(out) for out in (parts, whole))
    assert state["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(state["tensors"][name], tensor), name
    for i, moments in expected["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(state["optimizer"]["state"][i][name], tensor), (i, name)
    assert (gpu.type in state["rng"]) and torch.equal(state["rng"][gpu.type][0], expected["rng"][gpu.type][0])


def test_offloading_changes_nothing(gpu, folder):
    plain = trained(gpu, folder, "plain", "--method", "qlora")
    for name, flags in (("offload", ["--offload"]), ("both", ["--offload", "--checkpointing"])):
        out = trained(gpu, folder, name, "--method", "qlora", *flags)
        assert steps_of(out) == pytest.approx(steps_of(plain), rel=1e-6)


def test_a_run_of_one_device_is_known_to_the_other(gpu, folder, capfd):
    """The CPU writes the texts that the GPU has written, from the adapter that it has trained."""
    out = trained(gpu, folder, "texts", "--method", "qlora", "--dtype", "float32")
    told = capfd.readouterr().out
    assert f"computed in float32 on {gpu}" in told and "measured" in told
    texts = []
    for device in ("cpu", str(gpu)):
        model, tokenizer, _ = run.load_run(out, device, "float32")
        texts.append(run.sample_text(model, tokenizer, ["7", "12"], 20))
    assert texts[0] == texts[1]


def test_export_and_import(gpu, folder):
    """Adapter and base come back as they were; a merged model computes what the adapter on its base computes."""
    out = trained(gpu, folder, "export", "--method", "lora", "--dtype", "float32")
    hub.export(out, folder / "exported")
    hub.import_adapter(folder / "exported", folder / "base", folder / "imported")
    own, theirs = (peft.read_adapter(path / "adapter.pt")["tensors"] for path in (out, folder / "imported"))
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    model, _, _ = run.load_run(out, str(gpu), "float32")
    tokens = torch.arange(20, device=gpu)[None]
    with torch.no_grad():
        expected = model(tokens)[0]
        peft.merge(model)
        assert_close([model(tokens)[0]], [expected.double().cpu()], 1e-5)
        peft.unmerge(model)
        assert torch.equal(model(tokens)[0], expected)
    peft.detach(model)
    checkpoint.save_base(model, folder / "copy")
    again = dict(checkpoint.load_base(folder / "copy", device=gpu).named_parameters())
    for name, p in checkpoint.load_base(folder / "base").named_parameters():
        assert torch.equal(again[name].cpu(), p), name


def test_a_base_is_stored_as_on_the_cpu(gpu, folder):
    for storage in filter(None, STORAGES.values()):
        models = [checkpoint.load_base(folder / "base", torch.bfloat16, storage, device) for device in ("cpu", gpu)]
        for (name, own), other in zip(models[1].named_buffers(), models[0].buffers(), strict=True):
            assert torch.equal(own.cpu(), other), name


# -----------------------------------------------------------------------------
# memory


def size_of_tests():
    """Llama-3.2-1B's width and vocabulary with four layers, and its batch; something small on a CPU."""
    config = memory.PRESETS["llama-3.2-1b"]
    if TRIED_ON:
        return replace(config, n_layer=2, n_embd=64, n_ffn=96, n_head=4, n_kv_head=2, vocab_size=300), 2, 40
    return replace(config, n_layer=4), 2, 512


def filled_model(config, method, gpu):
    """What memory.py simulates, with numbers in it."""
    gc.collect()
    with gpu:
        model = memory.simulated_model(config, method, torch.bfloat16, peft.default_storage(method), {})
    for t in (*model.parameters(), *model.buffers()):
        if t.is_floating_point():
            t.data.normal_(std=0.02)
        else:
            t.data.fill_(17)
    return model.to(gpu)


class Peak:
    """The most bytes that a GPU's allocator has given out within; on a CPU what Tracker counts."""

    def __init__(self, gpu, *tracked):
        self.tracker = None if gpu.type == "cuda" else memory.Tracker(*tracked)

    def __enter__(self):
        if self.tracker:
            return self.tracker.__enter__() and self
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error):
        if self.tracker:
            self.tracker.__exit__(*error)
            self.bytes = self.tracker.report()["peak"]
        else:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated()


def compare(capsys, what, measured, predicted):
    """Tells both, and that they are within 5 % of each other."""
    with capsys.disabled():
        print(f"\nmemory  {what:30} measured {measured / 1e6:9.1f} MB, predicted {predicted / 1e6:9.1f} MB, "
              f"ratio {measured / predicted:.3f}", end="")
    assert measured == pytest.approx(predicted, rel=0.05)


def bytes_of_a_step(gpu, method, checkpointing, config, batch, seq, **knobs):
    """The peak of the third step. (The model is gone before anything is asserted.)"""
    model = filled_model(config, method, gpu)
    model.checkpointing = checkpointing
    peft.keep_trained_in(model, getattr(torch, knobs.get("param_dtype", "float32")))
    optimizer = run.make_optimizer(model.train(), Config(**knobs))

    def step():
        run.step(model, optimizer, [torch.ones(2, batch, seq, dtype=torch.int64, device=gpu)], 1.0)

    step()
    step()
    with Peak(gpu, model, optimizer) as peak:
        step()
    return peak.bytes


def bytes_of_generation(gpu, method, config, batch, seq):
    """The peak of two tokens after a long prompt."""
    model = filled_model(config, method, gpu).eval()
    with Peak(gpu, model) as peak:
        model.generate([[1] * (seq - 1)] * batch, 2, temperature=0)
    return peak.bytes


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora", "full", "adapter", "prefix"])
def test_the_memory_of_a_step(gpu, method, checkpointing, capsys):
    size = size_of_tests()
    measured = bytes_of_a_step(gpu, method, checkpointing, *size)
    report = memory.simulate(size[0], method, *size[1:], device=gpu.type, checkpointing=checkpointing)
    predicted = report["peak"] - report["parts"].get("CUDA context", 0)
    if gpu.type == "cuda" and method == "full":
        # A dispatch mode keeps autograd from adding the second gradient of a tied table in place, so the simulation counts one more.
        predicted -= 4 * size[0].vocab_size * size[0].n_embd
    compare(capsys, f"{method}{', checkpointing' if checkpointing else ''}", measured, predicted)


@pytest.mark.parametrize("knobs", [dict(optimizer="adamw8bit"), dict(param_dtype="bfloat16"), dict(optimizer="adamw8bit", param_dtype="bfloat16")], ids=str)
def test_the_memory_of_smaller_optimizers(gpu, knobs, capsys):
    size = size_of_tests()
    measured = bytes_of_a_step(gpu, "top", True, *size, **knobs)
    report = memory.simulate(size[0], "top", *size[1:], device=gpu.type, checkpointing=True, **knobs)
    predicted = report["peak"] - report["parts"].get("CUDA context", 0)
    compare(capsys, str(knobs), measured, predicted)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_memory_of_generation(gpu, method, capsys):
    size = size_of_tests()
    bytes_of_a_step(gpu, method, False, *size)                   # Its backward pass leaves a workspace of its own.
    measured = bytes_of_generation(gpu, method, *size)
    report = memory.simulate_generation(size[0], method, *size[1:], device=gpu.type)
    predicted = report["peak"] - report["parts"].get("CUDA context", 0)
    predicted += memory.cublas_workspaces(1) if gpu.type == "cuda" else 0
    compare(capsys, f"generation, {method}", measured, predicted)


# -----------------------------------------------------------------------------
# compiled


@pytest.mark.skipif(bool(TRIED_ON), reason="the CPU's compiler is tested elsewhere")
def test_compiled(gpu, script, folder):
    """A compiled run learns what one without a compiler learns."""
    found = []
    for name, flags in (("compiled", ["--compile"]), ("uncompiled", [])):
        done = script("train.py", "--base", folder / "base", "--data", folder / "data.jsonl", "--method", "qlora", "--max_iters", 4, "--eval_interval", 4,
                      "--dtype", "float32", "--sample_count", 0, "--out_dir", folder / name, *flags, timeout=150)
        assert done.returncode == 0 and "no compiler" not in done.stdout, done.stderr
        found.append(steps_of(folder / name))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
