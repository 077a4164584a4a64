"""
Compiled blocks compute what they compute without a compiler: losses, gradients, dropout masks. On a GPU where there is one.

The normal suite traces as the compiler does and runs what was traced by torch's own kernels, which takes a third of the time; on a GPU
it compiles. The whole matrix is compiled in the slow suite.
"""

import shutil
from itertools import product

import pytest
import torch
from torch._dynamo.utils import counters

import peft
import quant
from conftest import tiny
from lib import config, machine
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


def built(method, storage, dropout, checkpointing, family="gpt2", n_layer=2):
    """A model whose adapters do something, for training."""
    torch.manual_seed(0)
    model = GPT(tiny(family, n_layer=n_layer)).requires_grad_(False)
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
    """[{name: value}] of the loss and each trained tensor's gradient, for batches of those shapes."""
    for i, (B, T) in enumerate(shapes):
        torch.manual_seed(i)
        tokens = torch.randint(61, (2, B, T)).to(DEVICE)
        model.zero_grad()
        _, loss = model(*tokens)
        loss.backward()
        yield {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model, shapes, n_known):
    """Compiles the model and compares; behind the first n_known shapes nothing is compiled any more. Returns the graphs."""
    expected = list(steps(model, shapes))
    torch._dynamo.reset()
    counters.clear()
    assert machine.compile_model(model, DEVICE)
    n_graphs = []
    for found, wanted in zip(steps(model, shapes), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
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


def test_generation_is_not_compiled(traced):
    """Nothing is compiled for it, and the tokens are those of before."""
    model = built("lora", "nf4", False, False).eval()
    before = model.generate([[1, 2, 3], [4]], 5, temperature=0)
    counters.clear()
    assert machine.compile_model(model, DEVICE)
    assert model.generate([[1, 2, 3], [4]], 5, temperature=0) == before
    assert not counters["stats"]
