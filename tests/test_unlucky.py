"""
Unlucky situations, made from tables: (kind, script, option or file, hostile values). Each must work, or end in one line on standard
error with exit status 2 and change nothing, within ten seconds of computing and twice the honest memory.

    python -m pytest -q tests/test_unlucky.py              # a share of every kind
    python -m pytest -q tests/test_unlucky.py -m slow      # all of them
    PYTHONPATH=. python tests/test_unlucky.py              # all of them, and a table by kind
"""

import json
import os
import pickle
import re
import shutil
import socket
import struct
import sys
import tempfile
import warnings
import zipfile
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import data
import hub
import peft
from conftest import ROOT, tiny
from forks import OURS, Forks
from lib import checkpoint, files
from lib.config import FIELDS, Config
from model import GPT

SHORT = ["--max_iters", "2", "--batch_size", "4", "--eval_interval", "2", "--eval_sequences", "4", "--warmup_iters", "1", "--sample_count", "0", "--dtype", "float32"]
TRAIN = ["train.py", "--base", "base", "--data", "data.jsonl", "--out_dir", "new", *SHORT]
SAMPLE = ["sample.py", "run", "--prompt", "item", "--max_new_tokens", "3", "--dtype", "float32"]
EVALUATE = ["evaluate.py", "run", "--max_new_tokens", "3", "--limit", "2", "--dtype", "float32"]
MEMORY = ["memory.py", "--model", "base", "--method", "lora", "--seq", "8", "--device", "cpu"]
IMPORT = ["hub.py", "import", "peft", "imported", "--base", "base"]
HONEST = (TRAIN, SAMPLE, EVALUATE, MEMORY, IMPORT, ["plot.py", "loss", "run", "-o", "a.png"])
SECONDS = 10


class Situation(NamedTuple):
    kind: str
    name: str
    command: list
    spoil: object = None        # what is done to the folder before
    must: str = ""              # "refused" where working would be wrong

    def __str__(self):
        return re.sub(r"[^\w.=-]+", "_", f"{self.kind}: {self.name}")[:90]


# -----------------------------------------------------------------------------
# a folder with everything in it


def make_world(folder, script):
    lines = [{"prompt": f"item {i}", "completion": f"text {i % 7} of {i}"} for i in range(40)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = data.Tokenizer.train([line[k] for line in lines for k in line], 300)
    for name, family in (("base", "gpt2"), ("llama", "llama")):
        torch.manual_seed(0)
        (folder / name).mkdir()
        checkpoint.save_base(GPT(tiny(family, vocab_size=tokenizer.vocab_size)), folder / name)
        tokenizer.save(folder / name)
    bin_base(folder, lambda tensors: tensors)
    done = script(["train.py", "--base", "base", "--data", "data.jsonl", "--out_dir", "run", "--rank", "2", *SHORT], folder)
    assert done.returncode == 0, done.stderr
    here = Path.cwd()
    os.chdir(folder)
    hub.export("run", "peft")
    model = checkpoint.load_base("base")
    peft.apply(model, "adapter", adapter_size=4)
    hub.write_run(Config(method="adapter", base="base", out_dir="bottleneck", adapter_size=4), peft.pack_adapter(model))
    hub.export("bottleneck", "adapterhub", "adapterhub")
    os.chdir(here)
    (folder / "empty").write_text("")
    (folder / "texts").write_text("a text\n")
    (folder / "memory.json").write_text(json.dumps([{"method": "lora", "parts": {"weights float32": 10**9}, "model": "gpt2"}]))


def bin_base(folder, edit):
    """A base in pytorch_model.bin, whose tensors are what edit makes of them."""
    (folder / "bin").mkdir(exist_ok=True)
    for path in (folder / "base").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / "bin")
    torch.save(edit(dict(files.read_tensors(folder / "base"))), folder / "bin" / "pytorch_model.bin")


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def spoil_json(name, *keys, value):
    """A function that sets a key, or one within another, of a JSON file to a value; text of JSON where that is in a Raw."""
    def spoil(folder):
        path = folder / name
        content = json.loads(path.read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = "\0RAW" if isinstance(value, Raw) else value
        path.write_text(json.dumps(content).replace('"\\u0000RAW"', str(value)))
    return spoil


class Raw(str):
    """Text of JSON that json.dumps would not write."""


def spoil_file(name, content):
    def spoil(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return spoil


def spoil_saved(name, edit):
    def spoil(folder):
        content = files.read_file(folder / name)
        edit(content)
        files.save_file(folder / name, content)
    return spoil


def spoil_toml(key, text):
    def spoil(folder):
        path = folder / "run" / "config.toml"
        path.write_text(re.sub(rf"^{key} = .*$", lambda _: f"{key} = {text}", path.read_text(), flags=re.M))
    return spoil


def safetensors(header, payload=b"\0" * 64):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + payload


# -----------------------------------------------------------------------------
# the tables

HUGE = "1" + "0" * 23
NUMBERS = (HUGE, "-" + HUGE, "-1", "nan", "inf", "1e308", "1e-320", "", "9" * 5000, "0.5", "1_0", "one")
VALUES = (10**23, -1, 0, 1e308, Raw("1e400"), Raw("1" + "0" * 400), Raw("NaN"), "words", [1], {"a": 1}, None, True, Raw("[" * 10**5 + "]" * 10**5))
GENERATION = {"temperature": ("nan", "-1", "1e-40", "1e-320", "inf", "1e308"), "top_k": ("0", "-1", HUGE), "top_p": ("0", "-1", "nan", "1.5"), "max_new_tokens": ("0", "-2", HUGE),
              "seed": (HUGE, "-" + HUGE)}
BEAMS = {"no_repeat_ngram": ("-1", HUGE), "length_penalty": ("nan", "1e308", "-inf", "1000"), "beams": ("0", "-3", "100000", HUGE), "limit": ("-2", HUGE), "batch_size": ("0", "-1", HUGE), "max_new_tokens": ("0", "-1", HUGE)}
SHAPES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings", "model_type")
ROPE = ("rope_theta", "max_position_embeddings", "hidden_size", "num_key_value_heads", "head_dim", "num_hidden_layers", "rope_scaling", "sliding_window")
LARGE = {"n_layer": 10**9, "n_embd": 10**12, "vocab_size": 10**30, "n_positions": 10**12, "n_inner": 10**15, "n_head": 10**12}
ADAPTER_CONFIG = ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type", "modules_to_save", "bias", "fan_in_fan_out")
DEVICES = ("meta", "mps", "xpu", "privateuseone", "fpga", "cuda", "cuda:99", "cpu:7", "hpu", "vulkan", "CPU", "")
OPTIONS = {"rank": "lora", "alpha": "lora", "dropout": "lora", "adapter_size": "adapter", "prefix_length": "prefix", "prefix_mlp": "prefix", "prompt_length": "prompt", "top_k": "top"}


def numbers():
    for name, field in FIELDS.items():
        if field.type in (int, float):
            method = OPTIONS.get(name, "lora")
            style = ["--prefix_style", "after"] if name == "prefix_mlp" else []
            quant = ["--quant", "nf4"] if name == "quant_block" else []
            for value in (*NUMBERS, "1000000", "100000000"):
                heavy = name in ("max_iters", "epochs", "gradient_accumulation_steps") and value in ("1000000", "100000000")
                if not heavy:               # an honest run, which lasts
                    yield Situation("numbers", f"train --{name} {value[:30]}", [*TRAIN, "--method", method, *style, *quant, f"--{name}={value}"])
    for name in ("batch", "seq", "gradient_accumulation_steps", *(n for n in OPTIONS if n not in ("top_k",))):
        for value in (HUGE, "-1", "1e308", "nan", "1000000"):
            yield Situation("numbers", f"memory --{name} {value}", [*MEMORY, "--method", OPTIONS.get(name, "lora"), f"--{name}={value}"])
    for value in ("1e400GB", HUGE + "TB", "-1GB", "nan", "0"):
        yield Situation("numbers", f"memory --fit {value[:20]}", [*MEMORY, f"--fit={value}"])
    for value in ("nan", "inf", "1e308", "1e400"):
        yield Situation("numbers", f"add --weights {value}", ["hub.py", "add", "run", "run", "sum", "--weights", "1", value], must="refused")
    for key, value in LARGE.items():
        yield Situation("numbers", f"{key} {value}, memory", MEMORY, spoil_json("base/config.json", key, value=value), "refused")
        yield Situation("numbers", f"{key} {value}, train", TRAIN, spoil_json("base/config.json", key, value=value), "refused")
        yield Situation("numbers", f"{key} {value}, sample", ["sample.py", "base", *SAMPLE[2:]], spoil_json("base/config.json", key, value=value), "refused")
    for value in (10**8, 2**30):
        yield Situation("numbers", f"a context of {value}", ["sample.py", "llama", *SAMPLE[2:-4], "--max_new_tokens", "100000000"], spoil_json("llama/config.json", "max_position_embeddings", value=value))
        yield Situation("numbers", f"a context of {value}, trained", [*TRAIN, "--base", "llama"], spoil_json("llama/config.json", "max_position_embeddings", value=value))
    huge = {"data_offsets": [0, 64], "dtype": "F32", "shape": [4, 4]}
    for key, value in (("shape", [1e400]), ("shape", [float("inf"), 0]), ("shape", [0, 2**62]), ("shape", [0, 2**40, 2**40]), ("shape", [10**30, 0]), ("shape", [-4, -4]), ("shape", ["4", 4]), ("shape", 4), ("shape", [1] * 1000 + [16]),
                       ("shape", [10**19] * 20000), ("data_offsets", [0, float("inf")]), ("data_offsets", [0, 10**30]), ("data_offsets", [64, 0]), ("data_offsets", [0]), ("dtype", "F8_E4M3"), ("dtype", []), ("shape", [True, 16])):
        for command in (["sample.py", "base", "--prompt", "a"], IMPORT):
            where = "base/model.safetensors" if command != IMPORT else "peft/adapter_model.safetensors"
            yield Situation("numbers", f"safetensors {key} {str(value)[:20]} {command[0]}", command, spoil_file(where, safetensors({"a": huge | {key: value}})), "refused")


def types():
    for key in SHAPES:
        for value in VALUES:
            yield Situation("types", f"config.json {key} {str(value)[:20]}", MEMORY, spoil_json("base/config.json", key, value=value))
    for key in ROPE:
        for value in VALUES:
            yield Situation("types", f"config.json {key} {str(value)[:20]}", ["memory.py", "--model", "llama", *MEMORY[3:]], spoil_json("llama/config.json", key, value=value))
    scalings = [("type", "yarn"), ("factor", 10**400), ("factor", 1e308), ("original_max_position_embeddings", 1e308), ("original_max_position_embeddings", 10**400), ("beta_fast", 1e308), ("mscale", "words"), ("attention_factor", 1e-320), ("truncate", [])]
    for key, value in scalings:
        scaling = {"rope_type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0, "mscale": 1.0} | {key: value}
        yield Situation("types", f"rope_scaling {key} {str(value)[:20]}", ["memory.py", "--model", "llama", *MEMORY[3:]], spoil_json("llama/config.json", "rope_scaling", value=scaling))
    for key in ADAPTER_CONFIG:
        for value in VALUES:
            yield Situation("types", f"adapter_config {key} {str(value)[:20]}", IMPORT, spoil_json("peft/adapter_config.json", key, value=value))
    for key in ("rank_pattern", "alpha_pattern"):
        for value in ({"attn.c_attn": "words"}, {"attn.c_attn": None}, {"attn.c_attn": [8]}, {"attn.c_attn": 10**23}, {"attn.c_attn": -1}, {"attn.c_attn": True}):
            yield Situation("types", f"adapter_config {key} {value}", IMPORT, spoil_json("peft/adapter_config.json", key, value=value), "refused")
    for key in ("name", "config", "model_type"):
        for value in VALUES[6:]:
            yield Situation("types", f"adapterhub {key} {str(value)[:20]}", ["hub.py", "import", "adapterhub", "imported", "--base", "base"], spoil_json("adapterhub/adapter_config.json", key, value=value))
    for key in ("non_linearity", "reduction_factor", "mh_adapter", "scaling", "leave_out"):
        for value in VALUES[6:]:
            yield Situation("types", f"adapterhub config.{key} {str(value)[:20]}", ["hub.py", "import", "adapterhub", "imported", "--base", "base"], spoil_json("adapterhub/adapter_config.json", "config", key, value=value))
    for key in ("trainable", "loss_before", "val_loss", "seconds", "peak_bytes", "method"):
        for value in ("words", [1], None, {"a": 1}, Raw("1" + "0" * 400)):
            yield Situation("types", f"metrics.json {key} {str(value)[:20]}", ["evaluate.py", "--training", "run"], spoil_json("run/metrics.json", key, value=value))
    for name, command in (("run/metrics.json", ["evaluate.py", "--training", "run"]), ("run/log.jsonl", ["plot.py", "loss", "run", "-o", "a.png"]), ("run/log.jsonl", ["train.py", "--resume", "run", "--max_iters", "4"]),
                          ("memory.json", ["plot.py", "memory", "memory.json", "-o", "a.png"]), ("base/config.json", MEMORY), ("peft/adapter_config.json", IMPORT), ("base/tokenizer_config.json", TRAIN),
                          ("base/generation_config.json", TRAIN), ("base/special_tokens_map.json", SAMPLE), ("data.jsonl", TRAIN), ("base/tokenizer.json", TRAIN), ("run/tokenizer_config.json", SAMPLE),
                          ("base/model.safetensors.index.json", SAMPLE)):
        for content in ("[" * 10**5 + "]" * 10**5, '{"a":' * 10**5 + "1" + "}" * 10**5, "[]", "null", '"words"', '{"step": "one", "loss": "low", "lr": 1}', "12:01 INFO started", b"\xff\xfe\0", "", "[[1, 2], [3]]", "1" * 5000, '{"a": ' + "1" * 5000 + "}"):
            yield Situation("types", f"{name} {str(content)[:20]} {command[0]}", command, spoil_file(name, content))
    for key, value in (("rank", '"two"'), ("rank", "[1]"), ("alpha", '"16"'), ("alpha", "1e400"), ("dropout", "true"), ("dropout", "nan"), ("seed", "1979-05-27"), ("base", "3"), ("method", "[]"), ("quant", "{}"), ("targets", "[[[[]]]]"), ("max_iters", HUGE), ("base", '"\\u0000"'), ("template", "1")):
        yield Situation("types", f"config.toml {key} = {value}", SAMPLE, spoil_toml(key, value))
    for key, value in (("rank", "two"), ("rank", [2]), ("rank", 10**23), ("alpha", None), ("alpha", "16"), ("alpha", 1e308), ("dropout", None), ("dropout", float("nan")), ("targets", ["q"]), ("targets", 3), ("rslora", "no"), ("unknown", 3)):
        spoil = spoil_saved("run/adapter.pt", lambda c, key=key, value=value: c["options"].update({key: value}))
        yield Situation("types", f"adapter.pt {key} {str(value)[:20]}", SAMPLE, spoil, "refused")
        yield Situation("types", f"adapter.pt {key} {str(value)[:20]}, init_from", [*TRAIN, "--init_from", "run"], spoil, "refused")
    for key, value in (("method", "lora+lora"), ("method", ""), ("format", "1"), ("parameters", "many"), ("base", 3), ("tensors", []), ("options", [])):
        yield Situation("types", f"adapter.pt {key} {value}", SAMPLE, spoil_saved("run/adapter.pt", lambda c, key=key, value=value: c.update({key: value})), "refused")
    for key, value in (("step", "two"), ("step", -1), ("step", 10**23), ("best", "low"), ("before", None), ("waited", None), ("tokens", "many"), ("samples", 3), ("seconds", []), ("skipped", 1e308)):
        yield Situation("types", f"state.pt progress {key} {value}", ["train.py", "--resume", "run", "--max_iters", "4"], spoil_saved("run/state.pt", lambda c, key=key, value=value: c["progress"].update({key: value})))
    for key, value in (("progress", []), ("data", None), ("rng", {"cpu": [3]}), ("rng", {"cpu": []}), ("config", []), ("tensors", None), ("optimizer", {}), ("optimizer", []), ("fingerprints", 3), ("data", {"epoch": "one"})):
        yield Situation("types", f"state.pt {key} {value}", ["train.py", "--resume", "run", "--max_iters", "4"], spoil_saved("run/state.pt", lambda c, key=key, value=value: c.update({key: value})), "refused")
    for key, value in (("betas", "ab"), ("params", [0]), ("weight_decay", "none"), ("fused", "yes")):
        yield Situation("types", f"state.pt group {key} {value}", ["train.py", "--resume", "run", "--max_iters", "4"], spoil_saved("run/state.pt", lambda c, key=key, value=value: c["optimizer"]["param_groups"][0].update({key: value})))


def devices():
    for device in DEVICES:
        for command in (TRAIN, SAMPLE, EVALUATE):
            yield Situation("devices", f"{command[0]} --device {device}", [*command, f"--device={device}"])
    for device in ("mps", "meta"):
        yield Situation("devices", f"memory.py --device {device}", [*MEMORY, "--device", device], must="refused")


def generation():
    for name, values in GENERATION.items():
        for value in values:
            hot = [] if name == "temperature" else ["--temperature", "0.8"]
            yield Situation("generation", f"sample --{name} {value}", [*SAMPLE, *hot, f"--{name}={value}"], must="refused")
    for name, values in BEAMS.items():
        for value in values:
            beams = [] if name == "beams" else ["--beams", "2"]
            yield Situation("generation", f"evaluate --{name} {value}", [*EVALUATE, *beams, f"--{name}={value}"], must="refused")
    yield Situation("generation", "the same run twice", ["evaluate.py", "run", "run", *EVALUATE[2:]], must="refused")
    yield Situation("generation", "the same run by two names", ["evaluate.py", "run", "./run/", *EVALUATE[2:]], must="refused")
    yield Situation("generation", "the same run twice, training", ["evaluate.py", "--training", "run", "run"], must="refused")
    yield Situation("generation", "as large as it goes", [*SAMPLE, "--temperature", "1.5", "--top_k", "1000000", "--top_p", "1.0"])


def texts():
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")
    for command in (SAMPLE, ["sample.py", "run", "--chat", "--system"], ["train.py", "--base", "base", "--data", "data.jsonl", "--method", "prompt", *SHORT, "--out_dir", "new", "--prompt_init"], [*TRAIN, "--base"], [*TRAIN, "--data"], [*TRAIN, "--out_dir"],
                    ["evaluate.py"], ["hub.py", "show"], ["hub.py", "merge", "run"], ["memory.py", "--model"], ["plot.py", "loss"]):
        yield Situation("texts", f"{' '.join(command)[-40:]} in Latin-1", [*command, prompt] if command != SAMPLE else [*command, "--prompt", prompt])
    for a, b in (("empty", "empty"), ("empty", "texts"), ("texts", "empty"), ("texts", "nowhere"), ("base/model.safetensors", "texts")):
        yield Situation("texts", f"predictions {a} references {b}", ["evaluate.py", "--predictions", a, "--references", b], must="refused")
    for content in (b"\n\n\n", b" \n", b"\xff\n", b"a\0b\n"):
        yield Situation("texts", f"predictions {content}", ["evaluate.py", "--predictions", "texts", "--references", "texts"], spoil_file("texts", content))
    for content in (b"\xff\xff", b'{"prompt": "\\ud800", "completion": "a"}', b'{"prompt": "", "completion": ""}', b"\0" * 100, b'{"prompt": "a", "completion": "b"}'):
        yield Situation("texts", f"data {content[:40]}", TRAIN, spoil_file("data.jsonl", content))


class Tensors(NamedTuple):
    name: str
    make: object


BIN = (Tensors("sparse", lambda t: t.to_sparse()), Tensors("csr", lambda t: t.to_sparse_csr() if t.dim() == 2 else t), Tensors("meta", lambda t: t.to("meta")), Tensors("float8", lambda t: t.to(torch.float8_e4m3fn)),
       Tensors("complex", lambda t: t.to(torch.complex64)), Tensors("expanded", lambda t: torch.zeros(1).expand(10**6, 10**6)), Tensors("numbers", lambda t: 3.0), Tensors("lists", lambda t: [1.0]), Tensors("bool", lambda t: t > 0),
       Tensors("quantized", lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)), Tensors("parameters", torch.nn.Parameter))


def checkpoints():
    command = ["sample.py", "bin", *SAMPLE[2:]]
    for name, make in BIN:
        yield Situation("checkpoints", f".bin of {name}", command, lambda folder, make=make: bin_base(folder, lambda tensors: {n: make(t) for n, t in tensors.items()}))
        for file in ("adapter.pt", "state.pt"):
            spoil = spoil_saved(f"run/{file}", lambda c, make=make: c.update(tensors={n: make(t) for n, t in c["tensors"].items()}))
            yield Situation("checkpoints", f"{file} of {name}", SAMPLE if file == "adapter.pt" else ["train.py", "--resume", "run", "--max_iters", "4"], spoil)
    yield Situation("checkpoints", ".bin with integer keys", command, lambda folder: bin_base(folder, lambda tensors: dict(enumerate(tensors.values()))), "refused")
    yield Situation("checkpoints", ".bin with mixed keys", command, lambda folder: bin_base(folder, lambda tensors: tensors | {3: torch.zeros(1), None: torch.zeros(1)}), "refused")
    yield Situation("checkpoints", ".bin with a tuple key", command, lambda folder: bin_base(folder, lambda tensors: {(1, 2): torch.zeros(1)}), "refused")
    yield Situation("checkpoints", ".bin of 300 MB of nothing", command, bomb, "refused")
    yield Situation("checkpoints", ".bin of another protocol", command, spoil_file("bin/pytorch_model.bin", pickle.dumps({"a": [1] * 10})), "refused")
    for pattern in ("(", "[", "*", "(?P<", "(a+)+$", "\\", "((a*)*)*b" * 20, "(?:" * 500 + ")" * 500, ""):
        for key in ("rank_pattern", "alpha_pattern"):
            yield Situation("checkpoints", f"{key} {pattern[:20]}", IMPORT, spoil_json("peft/adapter_config.json", key, value={pattern: 2}))
    for shape in ((), (1,), (2,), (0, 0), (2, 32, 1), (0, 32), (32, 0)):
        for half in ("A", "B"):
            spoil = spoil_saved("run/adapter.pt", lambda c, half=half, shape=shape: reshape(c, half, shape))
            for command in (SAMPLE, ["hub.py", "show", "run"], ["plot.py", "spectra", "run", "-o", "a.png"], ["hub.py", "add", "run", "run", "sum"], ["hub.py", "export", "run", "exported"]):
                yield Situation("checkpoints", f"{half} of shape {shape}, {command[0]} {command[1]}", command, spoil, "refused")
            peft_spoil = lambda folder, half=half, shape=shape: reshape_peft(folder, half, shape)
            yield Situation("checkpoints", f"lora_{half} of shape {shape}", IMPORT, peft_spoil, "refused")


def reshape(content, half, shape):
    name = next(n for n in content["tensors"] if n.endswith(f".{half}"))
    content["tensors"][name] = torch.zeros(shape)
    content["parameters"] = sum(t.numel() for t in content["tensors"].values())


def reshape_peft(folder, half, shape):
    tensors = dict(files.read_tensors(folder / "peft" / "adapter_model.safetensors"))
    name = next(n for n in tensors if n.endswith(f"lora_{half}.weight"))
    tensors[name] = torch.zeros(shape)
    files.write_safetensors(folder / "peft" / "adapter_model.safetensors", files.entries_of(tensors))


def bomb(folder):
    """A pytorch_model.bin whose data.pkl is 300 MB of nothing, compressed."""
    path = folder / "bin" / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content if not name.endswith("data.pkl") else b"\x80\x02" + b"N0" * (150 * 10**6) + content[2:])


SPECIAL = {"zero": "/dev/zero", "null": "/dev/null", "fifo": "fifo", "socket": "socket"}
PLACES = {"data.jsonl": TRAIN, "base/config.json": MEMORY, "base/model.safetensors": ["sample.py", "base", *SAMPLE[2:]], "run/adapter.pt": SAMPLE, "run/config.toml": SAMPLE, "run/state.pt": ["train.py", "--resume", "run", "--max_iters", "4"],
          "run/log.jsonl": ["plot.py", "loss", "run", "-o", "a.png"], "run/metrics.json": ["evaluate.py", "--training", "run"], "memory.json": ["plot.py", "memory", "memory.json", "-o", "a.png"], "base/tokenizer.model": TRAIN,
          "peft/adapter_config.json": IMPORT, "peft/adapter_model.safetensors": IMPORT, "bin/pytorch_model.bin": ["sample.py", "bin", *SAMPLE[2:]], "texts": ["evaluate.py", "--predictions", "texts", "--references", "texts"],
          "run/.lock": ["train.py", "--resume", "run", "--max_iters", "4"], "base/tokenizer_config.json": TRAIN, "adapterhub/pytorch_adapter.bin": ["hub.py", "import", "adapterhub", "imported", "--base", "base"]}


def put_special(name, kind):
    def spoil(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            here = Path.cwd()
            os.chdir(path.parent)
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(path.name)
            os.chdir(here)
        else:
            path.symlink_to(SPECIAL[kind])
    return spoil


def special_files():
    for name, command in PLACES.items():
        for kind in SPECIAL:
            yield Situation("special files", f"{name} is a {kind}", command, put_special(name, kind))
    named = {"--data": TRAIN, "--base": TRAIN, "--template": TRAIN, "--resume": ["train.py"], "--init_from": TRAIN, "--out_dir": TRAIN, "show": ["hub.py"], "--training": ["evaluate.py"], "--model": ["memory.py"], "loss": ["plot.py"], "spectra": ["plot.py"], "memory": ["plot.py"], "codebooks": ["plot.py"]}
    for option, command in named.items():
        for path in ("/dev/zero", "/dev/null", "fifo.jsonl", "fifo.jinja"):
            yield Situation("special files", f"{command[0]} {option} {path}", [*command, option, path], put_special(path, "fifo") if path.startswith("fifo") else None, "refused")
    for path in ("/dev/zero", "fifo"):
        yield Situation("special files", f"{path} as the file of flags", ["train.py", path], put_special("fifo", "fifo"), "refused")
        yield Situation("special files", f"{path} as predictions", ["evaluate.py", "--predictions", path, "--references", path], put_special("fifo", "fifo"), "refused")
        yield Situation("special files", f"{path} as archive", ["data.py", "download", "e2e", "e2e", "--archive", path], put_special("fifo", "fifo"), "refused")
        yield Situation("special files", f"{path} as tokens", [*TRAIN, "--add_tokens", path], put_special("fifo", "fifo"), "refused")


def others_files(folder):
    (folder / "new").mkdir()
    (folder / "new" / "thesis.tex").write_text("years of work")
    (folder / "new" / "config.json").write_text("{}")


def folders():
    yield Situation("folders", "--base new, a model", [*TRAIN, "--base", "new", "--out_dir", "out"], lambda folder: shutil.copytree(folder / "base", folder / "new"))
    yield Situation("folders", "out_dir with other people's files", TRAIN, others_files, "refused")
    yield Situation("folders", "out_dir is the base", [*TRAIN, "--out_dir", "base"], must="refused")
    yield Situation("folders", "out_dir is a file", [*TRAIN, "--out_dir", "data.jsonl"], must="refused")
    yield Situation("folders", "out_dir within a file", [*TRAIN, "--out_dir", "data.jsonl/x"], must="refused")
    yield Situation("folders", "out_dir is this folder", [*TRAIN, "--out_dir", "."], must="refused")
    yield Situation("folders", "out_dir of 5000 characters", [*TRAIN, "--out_dir", "x" * 5000], must="refused")
    yield Situation("folders", "out_dir is a run", [*TRAIN, "--out_dir", "run"], must="refused")
    yield Situation("folders", "export over files", ["hub.py", "export", "run", "base"], must="refused")
    yield Situation("folders", "export into a file", ["hub.py", "export", "run", "data.jsonl"], must="refused")
    yield Situation("folders", "merge into a file", ["hub.py", "merge", "run", "data.jsonl"], must="refused")
    yield Situation("folders", "import into a file", ["hub.py", "import", "peft", "data.jsonl", "--base", "base"], must="refused")
    yield Situation("folders", "a picture into a folder that is not there", ["plot.py", "loss", "run", "-o", "nowhere/a.png"], must="refused")
    yield Situation("folders", "a picture over a folder", ["plot.py", "loss", "run", "-o", "a.png"], lambda folder: (folder / "a.png").mkdir(), "refused")
    yield Situation("folders", "a link in a circle", ["sample.py", "circle"], lambda folder: (folder / "circle").symlink_to("circle"), "refused")
    yield Situation("folders", "a run without its state", ["train.py", "--resume", "run"], lambda folder: [path.unlink() for path in (folder / "run").glob("state*")], "refused")
    yield Situation("folders", "a run whose base is gone", SAMPLE, lambda folder: shutil.rmtree(folder / "base"), "refused")
    for command in (["train.py"], ["sample.py"], ["evaluate.py"], ["hub.py", "show"], ["plot.py", "loss"], ["memory.py", "--model"]):
        yield Situation("folders", f"{command[0]} nowhere", [*command, "nowhere"], must="refused")
    for command in (["hub.py"], ["sample.py"], ["evaluate.py"], ["plot.py"], ["hub.py", "merge"], ["sample.py", "run", "--nothing"], ["memory.py", "stray"], ["hub.py", "add", "run", "sum", "--weights", "x"], ["data.py", "upload"], ["plot.py", "nothing", "run"], ["sample.py", "run", "--dtype", "float64"], ["sample.py", "run", "--top_k"]):
        yield Situation("folders", f"a command line of {' '.join(command)}", command, must="refused")


def resuming():
    for flags in (["--targets", "q"], ["--rank", "4"], ["--batch_size", "8"], ["--adapter_size", "4"], ["--lora_plus_ratio", "2"], ["--data", "base"], ["--method", "ia3"]):
        yield Situation("resume", f"--resume with {' '.join(flags)}", ["train.py", "--resume", "run", *flags], must="refused")
    for method, flags in (("ia3", "--targets q"), ("ia3", "--lora_plus_ratio 4"), ("lora", "--prompt_init x"), ("bitfit", "--rank 2"), ("prefix", "--prompt_length 3"), ("lora", "--quant_block 32"), ("vera", "--alpha 3"), ("full", "--dropout 0.1")):
        yield Situation("resume", f"--method {method} {flags}", [*TRAIN, "--method", method, *flags.split()], must="refused")
    for method, flags in (("ia3", "--rank 2"), ("prefix", "--alpha 3"), ("lora,ia3", "--prefix_length 3")):
        yield Situation("resume", f"memory --method {method} {flags}", [*MEMORY, "--method", method, *flags.split()], must="refused")
    for value in ("0", "1", "2", "4"):
        yield Situation("resume", f"--max_iters {value} on resume", ["train.py", "--resume", "run", "--max_iters", value])
        yield Situation("resume", f"--max_iters {value}", [*TRAIN, "--max_iters", value])


KINDS = (numbers, types, devices, generation, texts, checkpoints, special_files, folders, resuming)
ALL = [situation for kind in KINDS for situation in kind()]


def share():
    """About a hundred of them: of each kind those that stand evenly spread."""
    by_kind = defaultdict(list)
    for situation in ALL:
        by_kind[situation.kind].append(situation)
    return [situations[i * len(situations) // 10] for situations in by_kind.values() for i in range(10)]


# -----------------------------------------------------------------------------
# the verdict


def verdict(situation, world, script, honest):
    """"works" or "refused"; else what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder, "w")
        shutil.copytree(world, here)
        if situation.spoil:
            with warnings.catch_warnings(action="ignore"):       # torch's, about rare kinds of tensors
                situation.spoil(here)
        before = tree(here)
        done = script(situation.command, here)
        after = tree(here)
    words = done.stderr.strip().splitlines()
    if done.returncode == -9:
        return "hangs"
    if done.peak > 2 * honest[situation.command[0]]:
        return f"takes {done.peak / 1e6:.0f} MB"
    if done.cpu > SECONDS:
        return f"takes {done.cpu:.0f} s"
    if done.returncode == 0 and not situation.must:
        return "works"
    if done.returncode == 0:
        return f"works, and must not: {done.stdout[-200:]}"
    if done.returncode != 2 or len(words) != 1:
        return f"exit {done.returncode}: {done.stderr[-300:]}"
    changed = [str(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return f"changes {changed}" if changed else "refused"


def start(folder):
    """(a function that runs a command, {script: bytes of its honest command})."""
    forks = Forks([sys.executable], (*OURS, "plot"), ROOT)
    run = lambda command, cwd: forks.run([ROOT / command[0], *command[1:]], cwd, os.environ | {"OMP_NUM_THREADS": "1"}, timeout=3 * SECONDS, limit=("RLIMIT_AS", 8 * 2**30), kills=True)
    make_world(folder, run)
    honest = {}
    for command in HONEST:
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(folder, Path(copy, "w"))
            done = run(command, Path(copy, "w"))
            honest[command[0]] = done.peak
    return forks, run, defaultdict(lambda: 10**9, honest)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlucky")
    forks, run, honest = start(folder)
    with closing(forks):
        yield lambda situation: verdict(situation, folder, run, honest)


@pytest.mark.parametrize("situation", share(), ids=str)
def test_unlucky(judge, situation):
    assert judge(situation) in ("works", "refused")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind.__name__ for kind in KINDS])
def test_all_of_them(judge, kind):
    found = {str(situation): judge(situation) for situation in globals()[kind]()}
    assert not {name: words for name, words in found.items() if words not in ("works", "refused")}


def test_there_are_many():
    assert len(ALL) >= 400 and len(share()) >= 80 and len(set(map(str, ALL))) > 0.9 * len(ALL)


def main(wanted):
    """Prints what becomes of each situation that is not well, and a table by kind."""
    counts = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder:
        forks, run, honest = start(Path(folder))
        with closing(forks):
            for i, situation in enumerate(ALL):
                if wanted and not any(word in f"{situation.kind}: {situation.name}" for word in wanted):
                    continue
                found = verdict(situation, Path(folder), run, honest)
                short = found if found in ("works", "refused", "hangs") else found.split()[0].rstrip(",:")
                counts[situation.kind][short] += 1
                if found not in ("works", "refused"):
                    print(f"{i:4} {situation.kind}: {situation.name}: {' '.join(found.split())[:400]}", flush=True)
    for kind, found in counts.items():
        well = found["works"] + found["refused"]
        print(f"{kind}: {well} of {found.total()} well; " + ", ".join(f"{n} {word}" for word, n in sorted(found.items())))


if __name__ == "__main__":
    main(sys.argv[1:])
