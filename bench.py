"""
Speed and memory beside the stack that people use, and beside what the hardware can do.

    python bench.py step --peer --than lora            # a training step: tokens a second, resident peak
    python bench.py epoch --data DIR/e2e --tokenizer DIR/gpt2 --peer      # texts of real lengths
    python bench.py loss --single --dtype float32      # the same losses as peft + bitsandbytes, step by step
    python bench.py quant --peer                       # 4096 x 4096: quantize, dequantize
    python bench.py generate --batch 64                # prompts in a batch, and one at a time
    python bench.py grow                               # by sequence length, rank and model, beside memory.py
    python bench.py gpu --peer                         # a GPU: models of today, dense and QLoRA, in three minutes

Every side is a process of its own, on a GPU one for all jobs; the sides alternate, what is printed are medians,
and the last line is JSON. A preset's weights are random. The peers are peft + bitsandbytes + transformers
(requirements-peers.txt), run by the Python that NANOPEFT_PEERS names: as they come and, on a CPU, with the C
library's allocator told to keep memory, as nanopeft tells it itself.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from lib.checks import Parser, check, checked, parse_json
from lib.config import Config, run_main
from lib.files import write_json


def parse(args):
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "epoch", "loss", "quant", "generate", "grow", "gpu", "worker"))
    parser.add_argument("--base", help="a checkpoint's folder, a preset, or llama-124m (default of loss)")
    parser.add_argument("--method", default="qlora", help="qlora, or any other on a dense base")
    parser.add_argument("--than", default="", help="other methods of ours, joined by commas")
    parser.add_argument("--single", action="store_true", help="the base's scales stay in float32")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--max_new_tokens", type=int, default=32, help="generate: after each prompt")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns")
    parser.add_argument("--data", default="embedded", help="epoch: as for train.py")
    parser.add_argument("--tokenizer", default="", help="epoch: a folder with one, where the base has none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peer", action="store_true", help="measure the peers as well")
    parsed = parser.parse_args(args)
    parsed.base = parsed.base or ("llama-124m" if parsed.what == "loss" else "gpt2")
    return parsed


if __name__ == "__main__":      # --help and mistakes answer here, before torch is imported
    ARGS = run_main(parse, sys.argv[1:])

import torch

import data
import hub
import memory
import peft
import quant
from lib import checkpoint, machine, origin, run
from lib.hollow import hollow
from lib.report import size, table
from model import GPT


@dataclass(frozen=True)
class Job:
    """What a side measures. Ours and the peers' get it as JSON."""
    what: str                   # step, epoch, quant, generate or grow
    base: str                   # the folder of a checkpoint
    rank: int
    batch: int
    seq: int
    steps: int
    dtype: str
    device: str
    double: bool                # QLoRA: the scales are quantized again
    method: str = "qlora"       # any other has a dense base
    adapter: str = ""           # a run's folder, whose adapter is taken (theirs: its folder peft); none: a new one
    max_new_tokens: int = 32    # generate: after each prompt
    sequences: str = ""         # epoch: a JSON file with [[ids, tokens of the prompt], ..]


# -----------------------------------------------------------------------------
# our side: the figures of a job, {name: [values]}


def timed(function, n, device):
    """The seconds of each of n calls, after one to warm up."""
    seconds = []
    for _ in range(n + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def prepared_device(job):
    """The torch.device of a job, ready for the first product and rid of the last job's memory."""
    device = machine.pick_device(job.device)
    machine.prepare(device)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return device


def storage_of(job):
    """The quant.Storage of a job's base, or None."""
    return quant.Storage("nf4", double=job.double) if job.method == "qlora" else None


def load_base(job, device):
    """The base of a job, of whose folder config.json alone is there where the weights shall be random."""
    dtype = getattr(torch, job.dtype)
    if [path.name for path in Path(job.base).iterdir()] == ["config.json"]:
        return random_base(origin.read_config(job.base), dtype, storage_of(job), device)
    return checkpoint.load_base(job.base, dtype, storage_of(job), device)


def random_base(config, dtype, storage, device):
    """A base with random weights as checkpoint.load_base makes it, each made on the device and stored before the next."""
    model = hollow(config, dtype)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if storage:
        quant.store(model, storage, empty=True)
    for name, shape in shapes.items():
        weight = torch.ones(shape, dtype=dtype, device=device)
        if len(shape) > 1:
            weight.normal_(std=0.02)
        checkpoint.set_parameter(model, name, weight, dtype, storage)
    if config.tied:
        model.head.weight = model.embed.tokens.weight
    model.make_frequencies(device)
    model.base_fingerprint = "random"
    return model.requires_grad_(False)


def set_up(job):
    """(model, optimizer, device) of a job, ready to train."""
    device = prepared_device(job)
    torch.manual_seed(0)
    model = load_base(job, device)
    peft.apply(model, job.method, rank=job.rank)
    if job.adapter:
        peft.load_adapter(model, Path(job.adapter, "adapter.pt"))
    optimizer = run.make_optimizer(model, Config(learning_rate=1e-3, lora_plus_ratio=1.0, weight_decay=0.01))
    return model.train(), optimizer, device


def random_batches(job, model, device):
    """
    [(tokens, targets)], each (batch, seq) int64: a micro-batch for each step and one to warm up. The peers
    draw the same tokens.
    """
    g = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(job.steps + 1):
        tokens = torch.randint(model.config.vocab_size, (job.batch, job.seq), generator=g).to(device)
        targets = tokens.roll(-1, 1)
        targets[:, -1] = -1
        batches.append((tokens, targets))
    return batches


def peak_of(device):
    """The most bytes of this process; on a GPU of its allocator since measure_from_here."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else machine.peak_bytes()


def measure_from_here(device):
    """A GPU's peak shall be that of what follows, not of making the model."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def limits(device, dtype):
    """
    What the hardware can do: {"rate_of_products": floating-point operations a second of a large product,
    "bandwidth": bytes a second that a copy reads and writes}, several values each.
    """
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    source = torch.zeros(16 * n, n, dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    products = timed(lambda: a @ a, 7, device)
    copies = timed(lambda: out.copy_(source), 7, device)
    return {"rate_of_products": [2 * n**3 / t for t in products],
            "bandwidth": [2 * source.nbytes / t for t in copies]}


def measure_step(job):
    """Training steps; the hardware's limits; on a GPU the peak that memory.py predicts, without CUDA's context."""
    model, optimizer, device = set_up(job)
    batches = iter(random_batches(job, model, device))
    losses = []

    def step():
        loss, _ = run.step(model, optimizer, [next(batches)], grad_clip=1.0)
        losses.append(float(loss))

    measure_from_here(device)
    seconds = timed(step, job.steps, device)
    figures = {"seconds": seconds, "losses": losses, "peak": [peak_of(device)]}
    dtype = getattr(torch, job.dtype)
    if device.type == "cuda":
        peak = memory.predicted_peak(model.config, job.method, job.batch, job.seq, dtype=dtype,
                                     storage=storage_of(job), rank=job.rank)
        figures["predicted"] = [peak - memory.CUDA_CONTEXT]
    return figures | limits(device, dtype)


def measure_epoch(job):
    """Steps over texts of real lengths, batched as train.py batches them."""
    model, optimizer, device = set_up(job)
    pairs = json.loads(Path(job.sequences).read_text())          # of ids and the length of the prompt
    sequences = [(ids, [i >= n_prompt for i in range(len(ids))]) for ids, n_prompt in pairs]
    batches = data.Batches(data.Encoded.of(sequences, model.config.block_size), job.batch, seed=1)

    def step():
        tokens, targets = next(batches)
        run.step(model, optimizer, [(tokens.to(device), targets.to(device))], grad_clip=1.0)

    measure_from_here(device)
    return {"seconds": [sum(timed(step, job.steps, device))], "peak": [peak_of(device)]}


def shape_of_quant(device):
    """(rows, columns) of the matrix that is quantized: one that a GPU's cache does not hold."""
    return (28672, 8192) if device.type == "cuda" else (4096, 4096)


def measure_quant(job):
    """A matrix to NF4, and back to bfloat16 in memory that is kept; with double quantization too."""
    device = prepared_device(job)
    W = torch.randn(shape_of_quant(device), device=device)
    q, double = quant.quantize(W, "nf4"), quant.quantize(W, "nf4", double=True)
    out = torch.empty(W.shape, dtype=torch.bfloat16, device=device)
    figures = {"quantize": timed(lambda: quant.quantize(W, "nf4"), 5, device),
               "dequantize": timed(lambda: q.dequantize(out=out), 9, device),
               "dequantize, double": timed(lambda: double.dequantize(out=out), 9, device)}
    return figures | limits(device, getattr(torch, job.dtype))


def measure_generate(job):
    """New tokens after each of a batch of prompts, together and one at a time."""
    device = prepared_device(job)
    model = load_base(job, device).eval()
    V, g = model.config.vocab_size, torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 40, (job.batch,), generator=g).tolist()
    prompts = [torch.randint(V, (n,), generator=g).tolist() for n in lengths]

    def one_at_a_time():
        for prompt in prompts:
            model.generate([prompt], job.max_new_tokens, temperature=0)

    def together():
        model.generate(prompts, job.max_new_tokens, temperature=0)

    return {"together": timed(together, 3, device), "alone": timed(one_at_a_time, 1, device)}


def measure_grow(job):
    """A step's seconds; the bytes of the last step, on a CPU as memory.Tracker counts them."""
    model, optimizer, device = set_up(job)
    *batches, last = random_batches(job, model, device)
    remaining = iter(batches)

    def step():
        run.step(model, optimizer, [next(remaining)], grad_clip=1.0)

    seconds = timed(step, job.steps - 1, device)
    if device.type == "cuda":
        measure_from_here(device)
        run.step(model, optimizer, [last], grad_clip=1.0)
        return {"seconds": seconds, "counted": [peak_of(device) + memory.CUDA_CONTEXT]}
    with memory.Tracker(model, optimizer) as tracker:
        run.step(model, optimizer, [last], grad_clip=1.0)
    return {"seconds": seconds, "counted": [tracker.report()["peak"]]}


MEASURES = {"step": measure_step, "epoch": measure_epoch, "quant": measure_quant,
            "generate": measure_generate, "grow": measure_grow}

# -----------------------------------------------------------------------------
# the peers' side: code for their interpreter

PEER = r'''
import gc, json, resource, sys, time
import torch

def sync():
    if device.type == "cuda":
        torch.cuda.synchronize()

def timed(function, n):
    seconds = []
    for _ in range(n + 1):
        start = time.perf_counter()
        function()
        sync()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]

def quantization():
    import bitsandbytes.functional as F
    W = torch.randn((28672, 8192) if device.type == "cuda" else (4096, 4096), device=device)
    figures = {"quantize": timed(lambda: F.quantize_4bit(W, blocksize=64, quant_type="nf4"), 5)}
    for name, double in (("dequantize", False), ("dequantize, double", True)):
        q, state = F.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=double)
        state.dtype = torch.bfloat16
        figures[name] = timed(lambda: F.dequantize_4bit(q, state), 9)
    return figures

def random_base(dtype):
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.from_pretrained(job["base"])
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return stored(model, dtype) if job["method"] == "qlora" else model

def stored(model, dtype):   # what from_pretrained does with BitsAndBytesConfig
    import bitsandbytes as bnb
    settings = dict(quant_type="nf4", compress_statistics=job["double"])
    for name, old in list(model.named_modules()):
        if isinstance(old, torch.nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, old.bias is not None, dtype, device="meta", **settings)
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, module=new, **settings)
            new.bias = old.bias
            model.set_submodule(name, new.to(device))
    model.is_loaded_in_4bit = True
    return model

def load_base():
    import os
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    dtype = getattr(torch, job["dtype"])
    if os.listdir(job["base"]) == ["config.json"]:
        return random_base(dtype)
    options = {}
    if job["method"] == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=job["double"], bnb_4bit_compute_dtype=dtype)
    if device.type == "cuda":
        options["device_map"] = {"": 0}
    return AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype, attn_implementation="sdpa", **options)

def load_model():
    from peft import LoraConfig, PeftModel, get_peft_model
    model = load_base()
    model.config.use_cache = False
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, job["adapter"] + "/peft", is_trainable=True)
    else:
        gpt2 = model.config.model_type == "gpt2"
        targets = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        if not gpt2:
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(task_type="CAUSAL_LM", r=job["rank"], lora_alpha=16, target_modules=targets,
                            fan_in_fan_out=gpt2)
        model = get_peft_model(model, config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()

def random_batches(vocab_size):
    for _ in range(job["steps"] + 1):
        tokens = torch.randint(vocab_size, (job["batch"], job["seq"]), generator=g).to(device)
        yield dict(input_ids=tokens, labels=tokens)

def padded_batches():       # random sequences, padded to the longest of a batch as the usual collator does
    sequences = json.load(open(job["sequences"]))
    order = torch.randperm(len(sequences), generator=g).tolist()
    for i in range(0, len(order), job["batch"]):
        chosen = [sequences[j] for j in order[i:i + job["batch"]]]
        shape = len(chosen), max(len(ids) for ids, _ in chosen)
        tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        mask = torch.zeros_like(tokens)
        for row, (ids, n_prompt) in enumerate(chosen):
            tokens[row, :len(ids)] = torch.tensor(ids)
            labels[row, n_prompt:len(ids)] = torch.tensor(ids[n_prompt:])
            mask[row, :len(ids)] = 1
        yield {"input_ids": tokens.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}

def training():
    model = load_model()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01)
    epoch = job["what"] == "epoch"
    batches = padded_batches() if epoch else iter(list(random_batches(model.config.vocab_size)))
    losses = []
    def step():
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, job["steps"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"seconds": [sum(seconds)] if epoch else seconds, "losses": losses, "peak": [peak]}

def generation():
    from transformers import GenerationConfig
    model = load_base().eval()
    model.generation_config.eos_token_id = None
    g.manual_seed(0)
    lengths = torch.randint(8, 40, (job["batch"],), generator=g).tolist()
    tokens, mask = torch.zeros(2, job["batch"], max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        tokens[row, -n:] = torch.randint(model.config.vocab_size, (n,), generator=g)
        mask[row, -n:] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    config = GenerationConfig(max_new_tokens=job["max_new_tokens"], do_sample=False, pad_token_id=0, eos_token_id=None)
    def generate():
        found = model.generate(input_ids=tokens, attention_mask=mask, generation_config=config)
        assert found.shape[1] == tokens.shape[1] + job["max_new_tokens"]
    return {"together": timed(generate, 3)}

for line in sys.stdin:
    job = json.loads(line)
    g = torch.Generator().manual_seed(1)
    device = torch.device(job["device"])
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    measures = {"quant": quantization, "generate": generation}
    print(json.dumps(measures.get(job["what"], training)()), flush=True)
'''

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184",
             "MALLOC_TOP_PAD_": "268435456"}        # glibc keeps freed memory

# -----------------------------------------------------------------------------
# sides


class Worker:
    """A process that measures: a job comes in as a line of JSON, its figures go out as one."""

    def __init__(self, command, environment):
        self.errors = tempfile.TemporaryFile("w+")
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=environment)

    def figures(self, job):
        """What it has measured, {name: [values]}. ValueError with its last words where it fails."""
        try:
            self.process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass                                                 # It has failed; why is read below.
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        _, _, last_words = self.errors.read().strip().rpartition("\n")
        raise ValueError(f"a side of the benchmark failed: {last_words}")

    def end(self):
        """No more jobs come."""
        self.process.communicate()
        self.errors.close()


@dataclass(frozen=True)
class Side:
    """Who measures a job."""
    name: str
    job: Job
    command: tuple
    environment: dict

    def figures(self):
        """The figures of the job, {name: [values]}."""
        worker = WORKERS.pop(self.name, None) or Worker(self.command, self.environment)
        try:
            found = worker.figures(self.job)
        except ValueError:
            worker.end()
            raise
        if serves_on(self.job):
            WORKERS[self.name] = worker
        else:
            worker.end()
        return found


WORKERS = {}        # those that serve on, by the side's name


def serves_on(job):
    """Whether a worker measures more than one job: not on a CPU, where the peak is that of the process."""
    return job.device != "cpu"


def ours(job, name="nanopeft"):
    """Our side of a job."""
    return Side(name, job, (sys.executable, str(Path(__file__).resolve()), "worker"), {})


def peers(job):
    """The peers' sides of a job: as they come and, on a CPU, with an allocator that keeps memory."""
    check("NANOPEFT_PEERS" in os.environ, "the peers need NANOPEFT_PEERS, a Python with requirements-peers.txt")
    # With -P our peft.py, in this folder, does not stand in for theirs.
    command = os.environ["NANOPEFT_PEERS"], "-P", "-W", "ignore", "-c", PEER
    sides = [Side("peft + bitsandbytes", job, command, {})]
    if not serves_on(job):
        sides.append(Side("the same, allocator set", job, command, ALLOCATOR))
    return sides


def all_figures(job, args):
    """
    {side: {name: [values]}} of our side, of our other methods, and of the peers. They take turns, args.rounds
    times.
    """
    sides = [ours(job)]
    for method in filter(None, args.than.split(",")):
        sides.append(ours(replace(job, method=method), f"nanopeft, {method}"))
    if args.peer:
        sides += peers(job)
    figures = {side.name: defaultdict(list) for side in sides}
    for _ in range(args.rounds):
        for side in sides:
            for name, values in side.figures().items():
                figures[side.name][name] += values
    return figures


def spread(values):
    """The median, the least and the most of the values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def spread_text(values):
    """A spread as a table's cell."""
    median, least, most = (f"{value:,.2f}" for value in values.values())
    return f"{median} ({least} to {most})"


# -----------------------------------------------------------------------------
# what is measured: each prints a table and returns what goes into the JSON


def speed_report(figures, amount, unit, title):
    """
    {side: {"UNIT_per_second": spread, "peak": bytes}}, printed as a table. amount: how much of the unit each
    of the figures' "seconds" was for.
    """
    speed, report = f"{unit}_per_second", {}
    for name, side in figures.items():
        speeds = [amount / seconds for seconds in side["seconds"]]
        report[name] = {speed: spread(speeds), "peak": max(side["peak"])}
    own = report["nanopeft"]
    rows = [[title, f"{unit} a second", "peak", "nanopeft is", "and takes"]]
    for name, side in report.items():
        times = own[speed]["median"] / side[speed]["median"]
        share = own["peak"] / side["peak"]
        rows.append([name, spread_text(side[speed]), size(side["peak"], 2),
                     f"{times:.2f} times as fast", f"{share:.2f} of the memory"])
    print(table(rows))
    return report


def bench_step(job, args, folder):
    """A training step of each side, and the share of the rate of one large product that ours reaches."""
    figures = all_figures(job, args)
    title = f"{args.base}, {job.batch} x {job.seq}, {job.dtype}"
    report = speed_report(figures, job.batch * job.seq, "tokens", title)
    own = report["nanopeft"]
    rate = statistics.median(figures["nanopeft"]["rate_of_products"])
    share = flops_per_token(origin.read_config(job.base)) * own["tokens_per_second"]["median"] / rate
    own |= {"rate_of_products": rate, "share_of_it": share}
    print(f"nanopeft runs at {share:.0%} of the {rate / 1e12:.2f} Tflop/s of a large product")
    return report


@functools.cache
def flops_per_token(config):
    """Operations of the products with the frozen matrices, forward and backward; without the attention's."""
    model = hollow(config)
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    return 4 * sum(p.numel() for p in (*matrices, model.head.weight))


def bench_epoch(job, args, folder):
    """Sequences a second over a shuffled part of an epoch; the peers get the same texts."""
    tokenizer = data.Tokenizer.load(args.tokenizer or job.base)
    context = origin.read_config(job.base).block_size
    encoded = data.encode(data.load(args.data).train, tokenizer, context)
    path = folder / "sequences.json"
    sequences = [encoded.sequence(i) for i in range(len(encoded))]
    path.write_text(json.dumps([(ids.tolist(), int(counts.argmax())) for ids, counts in sequences]))
    figures = all_figures(replace(job, sequences=str(path)), args)
    title = f"{args.base}, batches of {job.batch} out of {len(encoded)} texts, {job.dtype}"
    return speed_report(figures, job.steps * job.batch, "sequences", title)


def bench_loss(job, args, folder):
    """
    Our losses and the peers' from the same weights, adapter and data. The base must be a Llama, because with
    the peers GPT-2's fused q, k, v take another LoRA.
    """
    model = checkpoint.load_base(job.base)
    peft.apply(model, "lora", rank=job.rank)
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data.normal_(std=0.02)
    peft.save_adapter(model, folder / "adapter.pt")
    hub.write_peft(folder / "peft", peft.pack_adapter(model), model.origin, job.base)
    job = replace(job, what="step", adapter=str(folder))
    own, theirs = (side.figures()["losses"] for side in (ours(job), peers(job)[0]))
    difference = max(abs(a - b) for a, b in zip(own, theirs, strict=True))
    rows = [[f"{len(own)} steps, {job.dtype}", "first loss", "last loss"]]
    for name, losses in (("nanopeft", own), ("peft + bitsandbytes", theirs)):
        rows.append([name, f"{losses[0]:.5f}", f"{losses[-1]:.5f}"])
    print(table(rows))
    print(f"largest difference {difference:.2e}")
    return {"ours": own, "peers": theirs, "largest_difference": difference}


def bench_quant(job, args, folder):
    """Milliseconds to quantize and to dequantize; on a GPU what share of a copy's bandwidth that is."""
    rows, cols = shape_of_quant(torch.device(job.device))
    report = {}
    table_rows = [[f"{rows} x {cols}, NF4, block 64", *(f"{what}, ms" for what in QUANT)]]
    figures = all_figures(job, args)
    bandwidth = statistics.median(figures["nanopeft"]["bandwidth"])
    for name, side in figures.items():
        report[name] = {what: spread([1000 * t for t in side[what]]) for what in QUANT}
        table_rows.append([name, *map(spread_text, report[name].values())])
        shares = {}
        for what in QUANT[1:]:
            shares[what] = share_of_copy(what, rows * cols, statistics.median(side[what]), bandwidth)
        report[name]["share_of_copy"] = shares
        table_rows.append(["  of a copy's bandwidth", "", *(f"{share:.0%}" for share in shares.values())])
    print(table(table_rows))
    return report


QUANT = ("quantize", "dequantize", "dequantize, double")


def share_of_copy(what, n, seconds, bandwidth):
    """Of a copy's bytes a second, those that dequantizing n weights reads and writes."""
    scales = n / 64 * (1 + 4 / 256) if what.endswith("double") else n / 64 * 4
    return (n / 2 + scales + 2 * n) / seconds / bandwidth


def bench_generate(job, args, folder):
    """Tokens a second of prompts in a batch, and one at a time."""
    all_of_them = all_figures(job, args)
    texts = f"{job.batch} prompts, {job.max_new_tokens} tokens each"
    rows = [[f"{args.base}, {job.method}, {job.dtype}, {texts}", "tokens a second"]]
    for name, side in all_of_them.items():
        rows.append([name, f"{job.max_new_tokens * job.batch / statistics.median(side['together']):,.0f}"])
    print(table(rows))
    own = all_of_them["nanopeft"]
    together, alone = statistics.median(own["together"]), own["alone"][0]
    print(f"{texts}: {together:.2f} s together, {alone:.2f} s one at a time, "
          f"{alone / together:.1f} times as fast")
    return all_of_them


def bench_grow(job, args, folder):
    """Seconds and bytes of a step by sequence length, rank and model; the bytes beside memory.py's."""
    job = replace(job, batch=1, steps=3)
    report = []
    for what, value, changed in variants(job, folder):
        config = origin.read_config(changed.base)
        figures = ours(changed).figures()
        dtype = getattr(torch, changed.dtype)
        predicted = memory.simulate(config, changed.method, 1, changed.seq, dtype, job.device,
                                    storage_of(changed), rank=changed.rank)
        row = {"what": what, "value": value, "seconds": statistics.median(figures["seconds"]),
               "counted": figures["counted"][0], "predicted": predicted["peak"]}
        print("{what:6}{value!s:>12}  {seconds:7.2f} s a step  {counted:13,} bytes counted  "
              "{predicted:13,} predicted".format(**row), flush=True)
        report.append(row)
    return report


def variants(job, folder):
    """Yields (what, value, job with that value)."""
    context = origin.read_config(job.base).block_size
    for seq in (128, 256, 512, 1024, 2048):
        if seq <= context:
            yield "seq", seq, replace(job, seq=seq)
    for rank in (1, 16, 256):
        yield "rank", rank, replace(job, rank=rank)
    for name in ("gpt2", "gpt2-medium", "gpt2-large"):
        yield "model", name, replace(job, base=base_folder(name, folder / name, job.device == "cpu"))


# -----------------------------------------------------------------------------
# a GPU that is lent by the minute: all at once

MODELS = {"llama-3.2-1b": 4, "qwen3-0.6b": 4, "llama-7b": 1}     # and how many rows of 512 tokens a batch has
BATCH_OF_PROMPTS = 16
SECONDS = 140                   # after which no job begins


def gpu_jobs(job, args, folder):
    """Yields (name of the model, job), round after round."""
    folders = {name: base_folder(name, folder / name, False) for name in MODELS}
    for _ in range(args.rounds):
        for name, batch in MODELS.items():
            for method in ("qlora", "lora"):
                yield name, replace(job, what="step", base=folders[name], method=method, batch=batch)
        yield "", replace(job, what="quant")
        for name in MODELS:
            for method in ("qlora", "lora"):
                yield name, replace(job, what="generate", base=folders[name], method=method, batch=BATCH_OF_PROMPTS)


def bench_gpu(job, args, folder):
    """
    Steps, storage and generation of models of today, dense and QLoRA, until SECONDS are over. What fails is
    told and left out. A line of JSON tells each measurement at once, for the case that somebody ends it.
    """
    start = time.monotonic()
    measured = defaultdict(lambda: defaultdict(list))
    try:
        for model, own in gpu_jobs(job, args, folder):
            sides = [ours(own)]
            if args.peer:
                sides += peers(own)
            for side in sides:
                if time.monotonic() - start < SECONDS:
                    add_figures(measured[own.what, model, own.method, side.name], side, model)
                    print(f"{time.monotonic() - start:.1f} seconds", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    print(gpu_table(measured, job))
    return [[*key, figures] for key, figures in measured.items()]


def add_figures(measured, side, model):
    """Adds what a side measures to {name: [values]}, and tells it."""
    told = {"model": model, "side": side.name, "what": side.job.what, "method": side.job.method}
    try:
        figures = side.figures()
    except ValueError as error:
        print(json.dumps(told | {"failed": str(error)}), flush=True)
        return
    print(json.dumps(told | figures), flush=True)
    for name, values in figures.items():
        measured[name] += values


def gpu_table(measured, job):
    """The table of bench_gpu's medians: our side, the peers', and ours beside the limits."""
    rows = [["", "nanopeft", "peers", "times", "memory", "peers'", "predicted", "of the limit"]]
    known = {}
    for key, figures in measured.items():
        known[key] = {name: statistics.median(values) for name, values in figures.items()}
    for (what, model, method, side), own in known.items():
        if side == "nanopeft" and own:
            theirs = known.get((what, model, method, "peft + bitsandbytes"), {})
            stored = "NF4" if method == "qlora" else "dense"
            rows += ROWS[what](f"{model} {stored}", replace(job, base=model), own, theirs)
    limits = next((own for own in known.values() if "bandwidth" in own), None)
    if limits:
        rate = limits["rate_of_products"] / 1e12
        bandwidth = limits["bandwidth"] / 1e9
        rows.append([f"limits: a product {rate:,.0f} Tflop/s, a copy {bandwidth:,.0f} GB/s", *[""] * 7])
    return table(rows)


def compared(own, theirs):
    """Three cells: two speeds and their ratio; "-" where there is no second one."""
    return [f"{own:,.0f}", f"{theirs:,.0f}" if theirs else "-", f"{own / theirs:.2f}" if theirs else "-"]


def step_rows(title, job, own, theirs):
    """The row of a training step. job.base: the preset's name."""
    batch = MODELS[job.base]
    speeds = [batch * job.seq / figures["seconds"] if figures else 0 for figures in (own, theirs)]
    flops = flops_per_token(memory.architecture(job.base)) * speeds[0]
    peaks = [size(figures["peak"], 2) if figures else "-" for figures in (own, theirs)]
    ratio = own.get("predicted", 0) / own["peak"]
    share = flops / own["rate_of_products"]
    yield [f"{title}, {batch} x {job.seq}, tokens/s", *compared(*speeds), *peaks, f"{ratio:.3f}", f"{share:.0%}"]


def generate_rows(title, job, own, theirs):
    """The row of generation."""
    n_tokens = job.max_new_tokens * BATCH_OF_PROMPTS
    speeds = [n_tokens / figures["together"] if figures else 0 for figures in (own, theirs)]
    yield [f"generate {title}, {BATCH_OF_PROMPTS} prompts, tokens/s", *compared(*speeds), *[""] * 4]


def quant_rows(title, job, own, theirs):
    """The rows of quantizing and dequantizing, in weights a microsecond."""
    rows, cols = shape_of_quant(torch.device(job.device))
    for what in QUANT:
        speeds = [rows * cols / figures[what] / 1e6 if figures else 0 for figures in (own, theirs)]
        share = share_of_copy(what, rows * cols, own[what], own["bandwidth"])
        limit = "" if what == "quantize" else f"{share:.0%}"
        yield [f"{what}, weights a microsecond", *compared(*speeds), "", "", "", limit]


ROWS = {"step": step_rows, "generate": generate_rows, "quant": quant_rows}

# -----------------------------------------------------------------------------

BENCHES = {"step": bench_step, "epoch": bench_epoch, "loss": bench_loss, "quant": bench_quant,
           "generate": bench_generate, "grow": bench_grow, "gpu": bench_gpu}


def base_folder(name, folder, weights):
    """
    A checkpoint's folder as it is; or the given folder, with the config.json of a preset's shape written into it
    and, with weights, random ones, so that both sides read the same. llama-124m is a Llama of GPT-2's width and
    depth.
    """
    if Path(name, "config.json").is_file():
        return str(Path(name).resolve())
    if name == "llama-124m":
        config = replace(memory.architecture("llama-7b"), n_layer=12, n_head=12, n_embd=768, n_ffn=2048)
    else:
        config = memory.architecture(name)
    if weights:
        torch.manual_seed(0)
        checkpoint.save_base(GPT(config), folder)
    else:
        folder.mkdir()
        write_json(folder / "config.json", origin.new_origin(config).content)
    return str(folder)


def main(args):
    """Measures, prints a table, and as the last line JSON."""
    if args.what == "worker":
        for line in sys.stdin:
            content = parse_json(line, "the worker's job")
            kinds = {field.name: field.type for field in dataclasses.fields(Job)}
            job = Job(**{name: checked(name, content.get(name), kind) for name, kind in kinds.items()})
            print(json.dumps(MEASURES[job.what](job)), flush=True)
        return
    device = machine.pick_device(args.device)
    dtype = machine.pick_dtype(args.dtype, device)
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), ""
        if args.what not in ("quant", "gpu"):
            base = base_folder(args.base, folder / "base", device.type == "cpu" or args.what == "loss")
        job = Job(args.what, base, args.rank, args.batch, args.seq, args.steps, machine.dtype_name(dtype),
                  str(device), not args.single, args.method, max_new_tokens=args.max_new_tokens)
        report = BENCHES[args.what](job, args, folder)
    for worker in WORKERS.values():
        worker.end()
    print(json.dumps(dataclasses.asdict(job) | {"base": args.base, "result": report}))


if __name__ == "__main__":
    run_main(main, ARGS)
