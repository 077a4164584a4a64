"""
Every family against the transformers library, versions 4 and 5, from checkpoints that it writes; and for a dozen of
them, in which each feature occurs, every method and every storage from start to merge, export and memory.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess

import pytest
import torch

import data
import hub
import peft
import quant
from families import CASES, READ, V5_ONLY, WRITE
from lib import checkpoint, families, files, origin, run
from lib.config import Config
from model import CHOICES, GPT, PARTS_WITH_BIAS, GPTConfig
from test_memory import assert_equal, compare



@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads lose time on models of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -----------------------------------------------------------------------------
# beside transformers

KINDS = {kind for kind, _ in CASES.values()}
FIRST = {next(name for name, case in CASES.items() if case[0] == kind) for kind in KINDS}
MORE = {"llama-llama3", "llama-yarn-betas", "llama-biases", "mistral-window", "phi4-mini", "gemma3-linear", "olmo3-yarn",
        "granite-biases", "stablelm-norms", "gpt_neox-half", "qwen3-window", "gpt2-inner"}


def versions_of_cases():
    """Every case as both versions write it; in the usual run one of each family, and by version 5 some more."""
    for case, version in itertools.product(CASES, (5, 4)):
        if not (version == 4 and case in V5_ONLY):
            usual = case in FIRST or case in MORE and version == 5
            yield pytest.param(case, version, marks=[] if usual else [pytest.mark.slow])


CASE = pytest.mark.parametrize("case, version", list(versions_of_cases()))
BOUND = 2e-5


@pytest.fixture(scope="session")
def interpreters(peer, tmp_path_factory):
    """{version of transformers: function of a script and of what json.loads it is to read}."""
    folder = tmp_path_factory.mktemp("given")

    def five(code, given):
        (folder / "given.json").write_text(json.dumps(given))
        return peer(code, folder / "given.json")

    def four(code, given):
        if "NANOPEFT_ADAPTERS" not in os.environ:
            pytest.skip("NANOPEFT_ADAPTERS does not name a Python with transformers 4")
        (folder / "given.json").write_text(json.dumps(given))
        (folder / "code.py").write_text(code)
        command = [os.environ["NANOPEFT_ADAPTERS"], "-I", "-W", "ignore", folder / "code.py", folder / "given.json"]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr[-4000:]
    return {5: five, 4: four}


@pytest.fixture(scope="session")
def written(request, interpreters, tmp_path_factory):
    """written(version, case) -> a folder with that version's checkpoint and oracle.pt. Those of all tests that run are
    written at once, because importing transformers takes longer than everything else."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    needed = {(params["version"], params["case"]) for params in calls if "version" in params}
    root = tmp_path_factory.mktemp("written")

    @functools.cache
    def write(version):
        cases = {name: case for name, case in CASES.items() if (version, name) in needed}
        interpreters[version](WRITE, {"folder": str(root / str(version)), "cases": cases})

    def folder(version, case):
        write(version)
        return root / str(version) / case
    return folder


@pytest.mark.peers
@CASE
def test_logits_and_greedy_texts(written, case, version):
    folder = written(version, case)
    expected = torch.load(folder / "oracle.pt", weights_only=True)
    model = checkpoint.load_base(folder)
    assert (logits(model, expected["tokens"]) - expected["logits"]).abs().max() < BOUND
    text = expected["greedy"]
    assert model.generate(expected["prompt"], 20, temperature=0) == text.tolist()
    without_cache = logits(model, text[:, :-1]).argmax(-1)
    assert torch.equal(without_cache[:, 6:], text[:, 7:])


@pytest.fixture(scope="session")
def merged(request, written, interpreters):
    """merged(version, case) -> the folder of the base after three steps and a merge, in which the transformers of that
    version and of 5 have left their logits."""
    calls = [item.callspec.params for item in request.session.items if item.name.startswith("test_a_merge_loads")]

    @functools.cache
    def merge_all(version):
        cases = [params["case"] for params in calls if params["version"] == version]
        folders = [train_and_merge(written(version, case)) for case in cases]
        for reader in {version, 5}:
            interpreters[reader](READ, list(map(str, folders)))

    def folder(version, case):
        merge_all(version)
        return written(version, case) / "merged"
    return folder


def train_and_merge(base):
    """Three steps of LoRA on every layer, merged and written, with our logits beside it."""
    model, tokens = checkpoint.load_base(base), torch.load(base / "oracle.pt", weights_only=True)["tokens"]
    torch.manual_seed(0)
    peft.apply(model, "lora", rank=3)
    train(model, tokens, 3)
    peft.merge(model)
    folder = base / "merged"
    checkpoint.save_base(model, folder)
    torch.save(tokens, folder / "tokens.pt")
    torch.save(logits(model, tokens), folder / "ours.pt")
    return folder


@pytest.mark.peers
@CASE
def test_a_merge_loads_in_transformers(merged, written, case, version):
    folder, base = merged(version, case), written(version, case)
    ours = torch.load(folder / "ours.pt", weights_only=True)
    changed = (ours - torch.load(base / "oracle.pt", weights_only=True)["logits"]).abs().max()
    assert changed > 0.01                                        # The three steps have done something.
    for reader in {version, 5}:
        error = folder / f"error{reader}.txt"
        assert not error.exists(), error.read_text()[-2000:]
        theirs = torch.load(folder / f"logits{reader}.pt", weights_only=True)
        assert (ours - theirs).abs().max() < BOUND
    assert_only_what_must_change(base, folder)


def assert_only_what_must_change(base, folder):
    """config.json and the tensors' names and shapes are the base's; of a model of several parts, its text part's."""
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, folder))
    shapes = [{name: tuple(t.shape) for name, t in files.read_tensors(path)} for path in (base, folder)]
    if "text_config" in before:
        before = before["text_config"] | {"architectures": ["Gemma3ForCausalLM"]}
        text = {name.replace("language_model.model.", "model.").replace("model.language_model.", "model."): shape
                for name, shape in shapes[0].items() if "language_model" in name}
        shapes[0] = {name: shape for name, shape in text.items() if "lm_head" not in name}
    type_names = {"dtype", "torch_dtype"}
    assert {key: before[key] for key in before.keys() - type_names} == {key: after[key] for key in after.keys() - type_names}
    assert {after.get(key, "float32") for key in type_names} == {"float32"}
    assert shapes[0] == shapes[1]


SIZES = {"vocab_size": 83, "block_size": 64, "n_layer": 4, "n_head": 64, "n_kv_head": 16, "n_embd": 640, "n_ffn": 88}
FILLED = """
import json, sys, transformers
from pathlib import Path
transformers.logging.set_verbosity_error()
given = json.loads(Path(sys.argv[1]).read_text())
filled = {kind: transformers.AutoConfig.for_model(kind, **said).to_dict() for kind, said in given["said"].items()}
Path(given["out"]).write_text(json.dumps(filled))
"""


@pytest.mark.peers
def test_what_config_json_leaves_out(interpreters, tmp_path):
    """Each family's smallest config.json, which says what it must alone, and the same filled up by transformers."""
    said = {}
    for kind, family in families.FAMILIES.items():
        needed = {key: name for key, name in family.keys.items() if key not in family.defaults}
        said[kind] = {key: SIZES[name] for key, name in needed.items()}
    with pytest.raises(ValueError, match="rope_theta is None"):
        origin.parse_origin({"model_type": "ministral3"} | said["ministral3"])
    said["ministral3"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    interpreters[5](FILLED, {"said": said, "out": str(tmp_path / "filled.json")})
    filled = json.loads((tmp_path / "filled.json").read_text())
    for kind, content in said.items():
        ours = origin.parse_origin({"model_type": kind} | content).config
        assert origin.resolved(ours) == origin.resolved(origin.parse_origin(filled[kind]).config), kind


# -----------------------------------------------------------------------------
# a dozen of them, from start to end

DOZEN = ["llama-llama3", "qwen2-window", "qwen3-bias", "phi4-mini", "gemma3-linear", "olmo3-yarn", "granite-biases",
         "stablelm-norms", "gpt_neox-half", "smollm3-window", "arcee-yarn", "opt"]
TOKENS = torch.randint(3, 83, (2, 23), generator=torch.Generator().manual_seed(0))
OPTIONS = dict(rank=2, adapter_size=4, prefix_length=3, prompt_length=3, top_k=1)
METHODS = [(name, {}) for name in peft.METHODS] + [
    ("prefix", dict(prefix_style="after")), ("prefix+prompt", {}), ("lora+prefix+adapter+ia3+prompt", {})]
SCHEMES = [None, *quant.CODES]


def origin_of(case, **changes):
    """The Origin of a case, whose arguments are the content of a config.json."""
    kind, arguments = CASES[case]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return origin.parse_origin({"model_type": kind} | ids | arguments | changes)


def config_of(case):
    """The GPTConfig of a case."""
    return origin_of(case).config


def base_of(case, scheme=None, **changes):
    """A random model with noise in every parameter, frozen, in eval mode."""
    torch.manual_seed(0)
    source = origin_of(case, **changes)
    model = GPT(source.config).eval().requires_grad_(False)
    model.origin = source
    for name, p in model.named_parameters():
        p += (0.3 if p.dim() == 1 else 0.2 if name.startswith("blocks") else 0.1) * torch.randn_like(p)
    if scheme:
        quant.store(model, quant.Storage(scheme, 16, True))
    return model


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(tokens)[0]


def train(model, tokens, steps):
    """Steps on one batch; the losses before each and after the last."""
    model.train()
    optimizer, losses = torch.optim.AdamW(peft.param_groups(model, 1e-2, 0.0, 1.0)), []
    for _ in range(steps):
        loss = model(tokens, tokens.roll(-1, 1))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        losses.append(float(model(tokens, tokens.roll(-1, 1))[1]))
    model.eval()
    return losses


def gradients(model, checkpointing):
    """{name: gradient} of one batch's loss."""
    model.train().checkpointing = checkpointing
    model.zero_grad()
    model(TOKENS, TOKENS.roll(-1, 1))[1].backward()
    model.eval().checkpointing = False
    return {name: p.grad for name, p, method in peft.parameters_by_method(model) if method}


def possible(case, method, scheme):
    """Whether a method applies: biases or a head of its own must be there, a base that is trained itself cannot be
    quantized, and QLoRA's is."""
    config, names = config_of(case), set(method.split("+"))
    parts = [part for part in config.bias.split() if part != "norm" or config.norm == "layer"]
    needed = (parts or "bitfit" not in names) and (scheme or "qlora" not in names)
    needed = needed and (not config.tied or "head" not in names)
    return bool(needed and not (scheme and names & {"full", "top"}))


def assert_greedy(model, text, prompt):
    """Each token after the prompt is, without a cache, the likeliest but for rounding."""
    assert text[:len(prompt)] == prompt and len(text) == len(prompt) + 20
    scores = logits(model, torch.tensor([text[:-1]]))[0, len(prompt) - 1:]
    chosen = scores.gather(1, torch.tensor(text[len(prompt):])[:, None])[:, 0]
    assert (scores.max(-1).values - chosen).max() < 1e-4


def test_each_feature_occurs():
    """In the dozen's configurations every field of GPTConfig has at least two values, and every choice is taken."""
    values = {field.name: {getattr(config_of(case), field.name) for case in DOZEN} for field in dataclasses.fields(GPTConfig)}
    same_everywhere = {name for name, found in values.items() if len(found) < 2} - {"block_size", "vocab_size"}
    assert not same_everywhere
    for name in CHOICES.keys() - {"activation"}:
        assert values[name] == set(CHOICES[name])
    scalings = {config_of(case).rope.scaling for case in DOZEN}
    assert scalings == {"none", "linear", "llama3", "yarn", "longrope"}
    with_bias = {part for case in DOZEN for part in config_of(case).bias.split()}
    assert with_bias == set(PARTS_WITH_BIAS)


def is_usual(case, method, scheme):
    """A selection of the triples in which each case meets each method, and each method and each case every scheme."""
    return (METHODS.index(method) + DOZEN.index(case)) % len(SCHEMES) == SCHEMES.index(scheme)


def triples():
    for case, method, scheme in itertools.product(DOZEN, METHODS, SCHEMES):
        if possible(case, method[0], scheme):
            every_sixth = (METHODS.index(method) + DOZEN.index(case)) % 6 == 0
            marks = [] if is_usual(case, method, scheme) and every_sixth else [pytest.mark.slow]
            name = "-".join((case, method[0], *map(str, method[1].values()), str(scheme)))
            yield pytest.param(case, *method, scheme, marks=marks, id=name)


@pytest.mark.parametrize("case, method, options, scheme", list(triples()))
def test_from_start_to_merge(case, method, options, scheme, tmp_path):
    model, names = base_of(case, scheme), set(method.split("+"))
    untouched = logits(model)
    torch.manual_seed(1)
    peft.apply(model, method, **OPTIONS | options)
    if not names & {"prefix", "prompt"}:
        assert torch.equal(logits(model), untouched)
    losses = train(model, TOKENS, 6)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.01, losses
    plain, recomputed = gradients(model, False), gradients(model, True)
    assert plain.keys() == recomputed.keys() and all(torch.equal(plain[name], recomputed[name]) for name in plain)
    prompts = [TOKENS[0, :7].tolist(), TOKENS[1, :2].tolist(), TOKENS[1, :13].tolist()]
    for prompt, text in zip(prompts, model.generate(prompts, 20, temperature=0)):
        assert_greedy(model, text, prompt)
    if not names & {"prefix", "prompt", "adapter"}:
        tuned = logits(model)
        peft.merge(model)
        assert (logits(model) - tuned).abs().max() < 1e-4
        checkpoint.save_base(model, tmp_path)
        again = checkpoint.load_base(tmp_path)
        assert again.config == model.config
        assert (logits(again) - tuned).abs().max() < 1e-4


MEMORY_METHODS = ["full", "lora", "qlora", "dora", "vera", "ia3", "prefix", "adapter", "prompt", "bitfit", "top",
                  "lora+prefix"]


def memory_pairs():
    for (i, case), (j, method) in itertools.product(enumerate(DOZEN), enumerate(MEMORY_METHODS)):
        if possible(case, method, "nf4" if method == "qlora" else None):
            usual = i % 6 == 0 and (i + j) % len(DOZEN) == 1     # tests/test_memory.py has others
            yield pytest.param(case, method, marks=[] if usual else [pytest.mark.slow])


@pytest.mark.parametrize("case, method", list(memory_pairs()))
def test_simulated_memory_equals_counted_memory(case, method):
    checkpointing = MEMORY_METHODS.index(method) % 2 == 1
    options = dict(rank=4, top_k=1, adapter_size=4, prefix_length=3, prompt_length=3)
    ours, real = compare(config_of(case), method, 3, 40, checkpointing=checkpointing, accumulation=2, options=options)
    assert_equal(ours, real)


# -----------------------------------------------------------------------------
# adapters out and in

EXPORTS = [("lora", {}), ("lora", dict(targets="q,v,down", rslora=True)), ("dora", {}), ("ia3", {}), ("bitfit", {}),
           ("prompt", {}), ("prefix", dict(prefix_style="after")), ("vera", dict(targets="out,down"))]
WHOLE = [("lora+embed", {}), ("lora+head", {}), ("norm", {})]    # whose modules' names each family has its own for
EVERY = [*DOZEN, *sorted(FIRST - set(DOZEN)), "gpt_neox-whole"]


def has_a_place(case, method):
    """Whether PEFT's layout has a place: the base must have what the method trains, no window may hide a prefix, and no
    norm may have a weight for each head."""
    config = config_of(case)
    hidden = method == "prefix" and config.windows or method == "norm" and config.qk_norm == "heads"
    return possible(case, method, None) and not hidden


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(case) -> [(method, options, base, folder in PEFT's layout, our logits)]."""
    tokenizer = data.Tokenizer.train(["the cat sat on the mat"] * 3, 300)
    root = tmp_path_factory.mktemp("exports")

    @functools.cache
    def of(case):
        base, results = root / case, []
        checkpoint.save_base(base_of(case, vocab_size=tokenizer.vocab_size), base)
        tokenizer.save(base)
        for i, (method, options) in enumerate(WHOLE + EXPORTS * (case in DOZEN)):
            if has_a_place(case, method):
                folder = root / f"{case}-{i}"
                results.append((method, options, base, folder, export(base, root / f"{case}-{i}-run", folder, method, options)))
        return results
    return of


def export(base, run_folder, folder, method, options):
    """A run with random tensors, as train.py leaves it, exported; returns its logits."""
    model, options = checkpoint.load_base(base), OPTIONS | options
    peft.apply(model, method, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, p, trained in peft.parameters_by_method(model):
            if trained:
                p += 0.1 * torch.randn_like(p)
    config = Config(method=method, base=str(base), out_dir=str(run_folder), dtype="float32", **options)
    hub.write_run(config, peft.pack_adapter(model))
    hub.export(run_folder, folder)
    return logits(model)


@pytest.mark.parametrize("case, method, options, words", [
    ("phi4-mini", "vera", {}, "VeRA over self_attn.qkv_proj has no place"),
    ("gemma3-linear", "prefix", dict(prefix_style="after"), r"a prefix over layers with a window \(here of 4 tokens\)")])
def test_without_a_place_in_pefts_layout(tmp_path, case, method, options, words):
    tokenizer = data.Tokenizer.train(["the cat sat on the mat"] * 3, 300)
    checkpoint.save_base(base_of(case, vocab_size=tokenizer.vocab_size), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    with pytest.raises(ValueError, match=words):
        export(tmp_path / "base", tmp_path / "run", tmp_path / "out", method, options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", [*DOZEN[::2], *(pytest.param(case, marks=pytest.mark.slow) for case in DOZEN[1::2])])
def test_out_and_in_again(exported, case, tmp_path):
    for i, (method, options, base, folder, ours) in enumerate(exported(case)):
        hub.import_adapter(folder, base, tmp_path / str(i))
        model, _, config = run.load_run(tmp_path / str(i), "cpu", "float32")
        assert config.method == method
        torch.testing.assert_close(logits(model), ours, rtol=0, atol=1e-5)


def test_a_head_under_two_names(exported, tmp_path):
    """transformers 4 calls GPT-NeoX's head embed_out, 5 lm_head: both go out, and either one comes in, or both if they are equal."""
    _, _, base, folder, ours = exported("gpt_neox-half")[1]
    old, new = (f"base_model.model.{name}.weight" for name in ("embed_out", "lm_head"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["embed_out", "lm_head"]
    tensors = dict(files.read_tensors(folder / "adapter_model.safetensors"))
    for i, (gone, named) in enumerate([({old}, ["lm_head"]), ({new}, ["embed_out"]), ({old}, ["embed_out", "lm_head"])]):
        kept = {name: t for name, t in tensors.items() if name not in gone}
        write(tmp_path / f"out{i}", settings | {"modules_to_save": named}, kept)
        model = hub.import_adapter(tmp_path / f"out{i}", base, tmp_path / f"run{i}")
        torch.testing.assert_close(logits(model), ours, rtol=0, atol=1e-5)
    write(tmp_path / "differ", settings, tensors | {new: tensors[old] + 1})
    with pytest.raises(ValueError, match="embed_out.weight and .*lm_head.weight differ, but both are the head"):
        hub.import_adapter(tmp_path / "differ", base, tmp_path / "run")


def write(folder, settings, tensors):
    """Writes a folder in PEFT's layout."""
    folder.mkdir()
    files.write_safetensors(folder / "adapter_model.safetensors", files.entries_of(tensors))
    files.write_json(folder / "adapter_config.json", settings)


PEFT_LOGITS = """
import json, sys, traceback, torch, transformers
from pathlib import Path
from peft import PeftModel
torch.set_num_threads(1)
given = json.loads(Path(sys.argv[1]).read_text())
for base, folder in given["adapters"]:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        model = PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(given["tokens"])).logits
        torch.save(logits[:, -len(given["tokens"][0]):].contiguous(), folder + "/logits.pt")
    except Exception:
        Path(folder, "error.txt").write_text(traceback.format_exc())
"""


@pytest.mark.peers
def test_peft_computes_the_same_from_what_we_export(interpreters, exported):
    adapters = [adapter for case in EVERY for adapter in exported(case)]
    given = {"tokens": TOKENS.tolist(), "adapters": [[str(base), str(folder)] for _, _, base, folder, _ in adapters]}
    interpreters[5](PEFT_LOGITS, given)
    wrong = {}
    for method, options, base, folder, ours in adapters:
        if (folder / "error.txt").exists():
            wrong[folder.name, method] = (folder / "error.txt").read_text()[-600:]
            continue
        gap = float((torch.load(folder / "logits.pt", weights_only=True) - ours).abs().max())
        if gap > 3e-5:
            wrong[folder.name, method, *options.items()] = gap
    assert not wrong, "\n".join(f"{key}: {value}" for key, value in wrong.items())
