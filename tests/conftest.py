"""What the tests share: real data, the interpreter that has the peers, and a script's run."""

import os
import sys
from contextlib import closing
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")      # before torch's import: threads that wait do not take a core from those that work

import pytest  # noqa: E402
import torch  # noqa: E402

from lib.rope import Rope  # noqa: E402
from forks import OURS, PEERS, ROOT, THREADS, Forks  # noqa: E402

torch.set_num_threads(THREADS)


def named_folder(variable, content):
    """The folder that a variable of the environment names; without it the test is skipped."""
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a folder with {content}")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def real_data():
    """The folder of real models and data that NANOPEFT_DATA names."""
    return named_folder("NANOPEFT_DATA", "e2e/, stories260k/ and gpt2/")


@pytest.fixture(scope="session")
def script():
    """script("train.py", "--rank", 8, cwd=...) -> CompletedProcess of that file run as __main__ in a process of its own."""
    with closing(Forks([sys.executable], OURS, ROOT)) as forks:
        yield lambda name, *args, cwd=ROOT, timeout=120, limit=(), **env: forks.run([ROOT / name, *args], cwd, os.environ | env, timeout, limit)


@pytest.fixture
def refused(script):
    """The one line on standard error with which a script refuses; fails on a traceback or another exit status."""
    def run(name, *args, **kwargs):
        done = script(name, *args, **kwargs)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1, (done.returncode, done.stdout, done.stderr)
        return lines[0]
    return run


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    """peer(code, *args) -> what the code prints, run by the interpreter of the peers, where our peft.py cannot shadow theirs."""
    if "NANOPEFT_PEERS" not in os.environ:
        pytest.skip("NANOPEFT_PEERS does not name a Python with requirements-peers.txt")

    def run(code, *args, timeout=240):
        (folder / "code.py").write_text(code)
        done = forks.run([folder / "code.py", *args], "/", os.environ, timeout)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout
    folder = tmp_path_factory.mktemp("peer")
    with closing(Forks([os.environ["NANOPEFT_PEERS"], "-I", "-W", "ignore"], PEERS, "/")) as forks:
        yield run


LLAMA = dict(n_kv_head=2, n_ffn=40, position="rope", norm="rms", norm_eps=1e-6, activation="silu", gated=True, bias="", tied=False)
FAMILIES = {         # of which each feature of GPTConfig occurs in one at least
    "gpt2": dict(),
    "opt": dict(position_offset=2, activation="relu"),
    "llama": LLAMA,
    "gemma3": LLAMA | dict(head_dim=12, tied=True, norm_offset=1.0, norm_place="both", qk_norm="head", embed_scale=32**0.5, attention_scale=13**-0.5,
                           activation="gelu_tanh", rope=Rope(theta=1e6, scaling="linear", factor=8.0), local_rope=Rope(theta=1e4), windows=(5, 0)),
    "gpt_neox": dict(position="rope", rope=Rope(dim=4), parallel=True, activation="gelu", tied=False),
    "olmo2": LLAMA | dict(norm_place="after", qk_norm="width"),
    "granite": LLAMA | dict(embed_scale=3.0, attention_scale=0.2, residual_scale=0.5, logit_scale=0.25, bias="q k v out",
                            rope=Rope(theta=500.0, scaling="llama3", factor=8.0, original=16)),
    "smollm3": LLAMA | dict(unrotated=(1,), rope=Rope(scaling="yarn", factor=4.0, original=16, slow=1.0, fast=32.0, magnitude=1.1)),
    "stablelm": LLAMA | dict(norm="layer", bias="q k v norm", parallel=True, shared_norm=True, qk_norm="heads", rope=Rope(dim=4)),
    "arcee": LLAMA | dict(gated=False, activation="relu2"),
}


def tiny(family, **changes):
    """A GPTConfig of two layers in one of the families."""
    from model import GPTConfig
    fields = {"vocab_size": 61, "block_size": 48, "n_layer": 2, "n_head": 4, "n_embd": 32} | FAMILIES[family] | changes
    if "windows" in fields:
        fields["windows"] = tuple(fields["windows"][i % 2] for i in range(fields["n_layer"]))
    return GPTConfig(**fields)


def saved_bytes(function):
    """Bytes of the distinct storages that autograd keeps while function runs, without parameters and buffers of modules."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return kept, result
