"""
Compiled blocks compute what they compute without a compiler: losses, gradients, dropout masks, whole runs. On a GPU where there is one.

The normal suite traces as the compiler does and runs what was traced by torch's own kernels, which takes a third of the time; on a GPU
it compiles. The whole matrix is compiled in the slow suite.
"""

import json
import shutil
from functools import partial
from itertools import product

import pytest
import torch
from torch._dynamo.utils import counters

import data
import peft
import quant
import train
from conftest import tiny
from lib import checkpoint, config, files, machine, run
from lib.config import Config
from model import GPT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STORAGES = {"dense": None, "nf4": quant.Storage("nf4", 16, double=True), "int8": quant.Storage("int8")}
METHODS = [*peft.METHODS, "lora+prefix", "qlora+bitfit+prompt", "dora+ia3+adapter", "lora+embed+norm"]

pytestmark = [
    pytest.mark.filterwarnings("ignore"),                        # torch's own compiler warns of torch
    pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")]


def makes_sense(method, storage, dropout, checkpointing):
    """Whether there is such a run: full and top train what is stored, qlora's base is stored, few methods have a dropout."""
    names = set(method.split("+"))
    has_dropout = names & set(config.METHOD_OPTIONS["dropout"].methods)
    return not (storage != "dense" and names & {"full", "top"} or storage == "dense" and "qlora" in names or dropout and not has_dropout)


MATRIX = [cell for cell in product(METHODS, STORAGES, (False, True), (False, True)) if makes_sense(*cell)]


def built(method, storage, dropout, checkpointing, family="gpt2", n_layer=2, dtype=torch.float32):
    """A model whose adapters do something, for training."""
    torch.manual_seed(0)
    model = GPT(tiny(family, n_layer=n_layer), dtype).requires_grad_(False)
    if STORAGES[storage]:
        quant.store(model, STORAGES[storage])
    model.to(DEVICE)
    peft.apply(model, method, **({"dropout": 0.3} if dropout else {}))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    model.checkpointing = checkpointing
    return model.train()


def steps(model, shapes):
    """Yields what is found for batches of those shapes."""
    for i, (B, T) in enumerate(shapes):
        torch.manual_seed(i)
        tokens = torch.randint(61, (2, B, T)).to(DEVICE)
        model.zero_grad()
        _, loss = model(*tokens)
        loss.backward()
        yield found(model, loss)


def found(model, loss):
    """{name: value} of the loss and each trained tensor's gradient."""
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model, shapes, n_known):
    """Compiles the model and compares; behind the first n_known shapes nothing is compiled any more. Returns the graphs."""
    expected = list(steps(model, shapes))
    torch._dynamo.reset()
    counters.clear()
    assert machine.compile_model(model, DEVICE)
    n_graphs = []
    for ours, wanted in zip(steps(model, shapes), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
        n_graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert n_graphs[0] and len(set(n_graphs[n_known - 1:])) == 1
    return n_graphs[-1]


@pytest.fixture
def traced(monkeypatch):
    """Without a GPU what is compiled is only traced and differentiated."""
    compiled = torch.compile
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch, "compile", lambda function, dynamic, options: compiled(function, dynamic=dynamic, backend="aot_eager"))


@pytest.mark.parametrize("cell", [
    ("lora+embed", "nf4", True, True), ("dora+embed", "int8", True, False), ("prefix+embed", "dense", False, True),
    ("full", "dense", False, False), ("qlora+bitfit+prompt", "nf4", True, False), ("vera+ia3+adapter+embed", "int8", True, False)])
def test_equal_losses_and_gradients(traced, cell):
    """Of methods with which all blocks are alike, because every block's input has a gradient."""
    check_equal(built(*cell), [(3, 20), (2, 17), (4, 26)], 1)


@pytest.mark.parametrize("family, method", [("llama", "lora+embed"), ("gemma3", "prefix+embed")])
def test_attention_as_an_operator(traced, family, method):
    """It is one on a CPU but in float32: here in float64, with shared keys, windows, and keys that all queries see and that pass a norm."""
    model = built(method, "nf4", False, False, family, dtype=torch.float64)
    check_equal(model, [(3, 20), (2, 17), (4, 26), (1, 26), (1, 14)], 4)


@pytest.mark.slow
@pytest.mark.parametrize("cell", MATRIX, ids=lambda cell: "-".join(map(str, cell)))
def test_the_matrix(cell):
    family = "gpt2" if "bitfit" in cell[0] else "llama"          # which has no biases
    check_equal(built(*cell, family), [(3, 20), (2, 17), (4, 26)], 1)


@pytest.mark.slow
@pytest.mark.parametrize("n_layer", [2, 5])
def test_as_many_graphs_as_kinds_of_blocks(traced, n_layer):
    """The first block, whose input has no gradient, and the others, each for several rows and for one."""
    shapes = [(3, 20), (1, 9), (2, 11), (5, 40), (1, 14), (8, 3), (4, 31)]
    assert check_equal(built("lora", "nf4", True, False, n_layer=n_layer), shapes, 2) == 4


def test_lengths_side_by_side(traced):
    """Packed sequences of other lengths in every batch ask for no other graphs."""
    lengths = [[3, 9, 9, 1], [5, 5, 2, 12], [7, 7, 7, 7]]

    def steps(model):
        for own in lengths:
            torch.manual_seed(0)
            tokens = torch.randint(61, (2, 1, sum(own))).to(DEVICE)
            model.zero_grad()
            _, loss = model(*tokens, lengths=own)
            loss.backward()
            yield found(model, loss)
    model = built("lora+embed", "dense", False, False, n_layer=1)
    expected = list(steps(model))
    torch._dynamo.reset()
    counters.clear()
    machine.compile_model(model, DEVICE)
    n_graphs = []
    for ours, wanted in zip(steps(model), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
        n_graphs.append(counters["stats"]["unique_graphs"])
    assert n_graphs[0] and len(set(n_graphs)) == 1


@pytest.mark.slow
def test_offloaded():
    """What a compiled block keeps for its backward pass can wait in the host's memory, however it lies."""
    losses = []
    for compiled in (False, True):
        model = built("lora", "dense", False, False, n_layer=1)
        optimizer = run.make_optimizer(model, Config())
        if compiled:
            machine.compile_model(model, DEVICE)
        batches = torch.randint(61, (3, 2, 3, 20), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        losses.append([float(run.step(model, optimizer, [(*batch,)], 1.0, saving=partial(run.offload, model))[0]) for batch in batches])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


RUN = dict(base="base", data="data.jsonl", lr_schedule="constant", warmup_iters=1, batch_size=4, eval_interval=3, eval_sequences=6, log_interval=1,
           sample_count=1, dtype="float32", seed=3)


@pytest.mark.parametrize("options", [dict(method="qlora+adapter", dropout=0.2), dict(method="prefix", prefix_style="after", prefix_mlp=4, packing=True)], ids=str)
def test_a_run(traced, tmp_path, monkeypatch, capsys, options):
    """A compiled run that is resumed is the uncompiled one: losses, evaluations, texts, the names and values that it leaves."""
    monkeypatch.chdir(tmp_path)
    texts = [{"prompt": f"item {i}", "completion": f"text {i % 7} of {i}"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    tokenizer = data.Tokenizer.train([text[key] for text in texts for key in text], 300)
    checkpoint.save_base(GPT(tiny("gpt2", vocab_size=tokenizer.vocab_size, n_layer=1)), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    train.train(Config(out_dir="whole", max_iters=6, **RUN | options))
    train.train(Config(out_dir="compiled", max_iters=3, compile=True, **RUN | options))
    train.train(config.command_line(["--resume", "compiled", "--max_iters", "6"]))
    assert "predicted at the peak of the uncompiled step" in capsys.readouterr().out
    for left, right in zip(*([json.loads(line) for line in open(f"{name}/log.jsonl")] for name in ("whole", "compiled")), strict=True):
        for entry in (left, right):
            entry.pop("tokens_per_second", None), entry.pop("bytes", None)
        assert left == pytest.approx(right, rel=1e-5)
    assert (tmp_path / "whole" / "samples.txt").read_text() == (tmp_path / "compiled" / "samples.txt").read_text()
    whole, compiled = (files.read_file(f"{name}/state.pt")["tensors"] for name in ("whole", "compiled"))
    torch.testing.assert_close(whole, compiled, rtol=1e-4, atol=1e-5)


def test_merged_and_detached(traced):
    """The names of a compiled model are the uncompiled one's; it computes on where its layers are exchanged."""
    model = built("lora", "dense", False, False, n_layer=1).eval()
    names, tokens = list(model.state_dict()), torch.arange(12, device=DEVICE)[None]
    with torch.no_grad():
        with_adapter = model(tokens)[0]
        machine.compile_model(model, DEVICE)
        assert list(model.state_dict()) == names
        torch.testing.assert_close(model(tokens)[0], with_adapter)
        peft.merge(model)
        torch.testing.assert_close(model(tokens)[0], with_adapter)
        peft.unmerge(model)
        peft.detach(model)
        assert (model(tokens)[0] - with_adapter).abs().max() > 1e-3


def test_generation_is_not_compiled(traced):
    """Nothing is compiled for it, and the tokens are those of before."""
    model = built("lora", "nf4", False, False).eval()
    before = model.generate([[1, 2, 3], [4]], 5, temperature=0)
    counters.clear()
    assert machine.compile_model(model, DEVICE)
    assert model.generate([[1, 2, 3], [4]], 5, temperature=0) == before
    assert not counters["stats"]
