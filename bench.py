"""
Speed and memory beside the stack that people use, and beside what the hardware can do.

    python bench.py step --peer --than lora            # a training step: tokens a second, resident peak
    python bench.py epoch --data DIR/e2e --tokenizer DIR/gpt2 --peer      # texts of real lengths
    python bench.py loss --single --dtype float32      # the same losses as peft + bitsandbytes, step by step
    python bench.py quant --peer                       # 4096 x 4096: quantize, dequantize
    python bench.py generate --batch 64                # prompts in a batch, and one at a time
    python bench.py grow                               # by sequence length, rank and model, beside memory.py

Every side is a process of its own; the sides alternate, what is printed are medians, and the last line is
JSON. The peers are peft + bitsandbytes + transformers (requirements-peers.txt), run by the Python that
NANOPEFT_PEERS names: as they come, and with the C library's allocator told to keep memory, as nanopeft
tells it itself.
"""

import argparse
import dataclasses
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


def parse(args):
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "epoch", "loss", "quant", "generate", "grow", "worker"))
    parser.add_argument("job", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--base", help="a checkpoint's folder, a preset, or llama-124m (default of loss)")
    parser.add_argument("--than", default="", help="other methods of ours, joined by commas")
    parser.add_argument("--single", action="store_true", help="the base's scales stay in float32")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
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
    """The torch.device of a job, ready for the first product."""
    device = machine.pick_device(job.device)
    machine.prepare(device)
    return device


def storage_of(job):
    """The quant.Storage of a job's base, or None."""
    return quant.Storage("nf4", double=job.double) if job.method == "qlora" else None


def set_up(job):
    """(model, optimizer, device) of a job, ready to train."""
    device = prepared_device(job)
    torch.manual_seed(0)
    model = checkpoint.load_base(job.base, getattr(torch, job.dtype), storage_of(job), device)
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


def measure_step(job):
    """Training steps; and the rate of a large product of this type, in floating-point operations a second."""
    model, optimizer, device = set_up(job)
    batches = iter(random_batches(job, model, device))
    losses = []

    def step():
        loss, _ = run.step(model, optimizer, [next(batches)], grad_clip=1.0)
        losses.append(float(loss))

    seconds = timed(step, job.steps, device)
    peak = machine.peak_bytes()
    a = torch.randn(2048, 2048, device=device).to(getattr(torch, job.dtype))
    rates = [2 * 2048**3 / t for t in timed(lambda: a @ a, 7, device)]
    return {"seconds": seconds, "losses": losses, "peak": [peak], "rate_of_products": rates}


def measure_epoch(job):
    """Steps over texts of real lengths, batched as train.py batches them."""
    model, optimizer, device = set_up(job)
    pairs = json.loads(Path(job.sequences).read_text())          # of ids and the length of the prompt
    sequences = [(ids, [i >= n_prompt for i in range(len(ids))]) for ids, n_prompt in pairs]
    batches = data.Batches(data.Encoded.of(sequences, model.config.block_size), job.batch, seed=1)

    def step():
        tokens, targets = next(batches)
        run.step(model, optimizer, [(tokens.to(device), targets.to(device))], grad_clip=1.0)

    return {"seconds": [sum(timed(step, job.steps, device))], "peak": [machine.peak_bytes()]}


def measure_quant(job):
    """A 4096 x 4096 matrix to NF4, and back to bfloat16 in memory that is kept."""
    device = prepared_device(job)
    W = torch.randn(4096, 4096, device=device)
    q, out = quant.quantize(W, "nf4"), torch.empty(4096, 4096, dtype=torch.bfloat16, device=device)
    return {"quantize": timed(lambda: quant.quantize(W, "nf4"), 5, device),
            "dequantize": timed(lambda: q.dequantize(out=out), 9, device)}


def measure_generate(job):
    """32 tokens after each of a batch of prompts, together and one at a time."""
    device = prepared_device(job)
    model = checkpoint.load_base(job.base, getattr(torch, job.dtype), storage_of(job), device).eval()
    V, g = model.config.vocab_size, torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 40, (job.batch,), generator=g).tolist()
    prompts = [torch.randint(V, (n,), generator=g).tolist() for n in lengths]

    def one_at_a_time():
        for prompt in prompts:
            model.generate([prompt], 32, temperature=0)

    return {"together": timed(lambda: model.generate(prompts, 32, temperature=0), 3, device),
            "alone": timed(one_at_a_time, 1, device)}


def measure_grow(job):
    """A step's seconds, and the bytes of the last step as memory.Tracker counts them."""
    model, optimizer, device = set_up(job)
    *batches, last = random_batches(job, model, device)
    remaining = iter(batches)

    def step():
        run.step(model, optimizer, [next(remaining)], grad_clip=1.0)

    seconds = timed(step, job.steps - 1, device)
    with memory.Tracker(model, optimizer) as tracker:
        run.step(model, optimizer, [last], grad_clip=1.0)
    return {"seconds": seconds, "counted": [tracker.report()["peak"]]}


MEASURES = {"step": measure_step, "epoch": measure_epoch, "quant": measure_quant,
            "generate": measure_generate, "grow": measure_grow}

# -----------------------------------------------------------------------------
# the peers' side: code for their interpreter

PEER = r'''
import json, resource, sys, time
import torch

job = json.loads(sys.argv[1])
g = torch.Generator().manual_seed(1)

def timed(function, n):
    seconds = []
    for _ in range(n + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]

def quantization():
    import bitsandbytes.functional as F
    W = torch.randn(4096, 4096)
    q, state = F.quantize_4bit(W, blocksize=64, quant_type="nf4")
    state.dtype = torch.bfloat16
    return {"quantize": timed(lambda: F.quantize_4bit(W, blocksize=64, quant_type="nf4"), 5),
            "dequantize": timed(lambda: F.dequantize_4bit(q, state), 9)}

def load_model():
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from peft import LoraConfig, PeftModel, get_peft_model
    dtype = getattr(torch, job["dtype"])
    storage = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                 bnb_4bit_use_double_quant=job["double"], bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype, attn_implementation="sdpa",
                                                 quantization_config=storage)
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
        tokens = torch.randint(vocab_size, (job["batch"], job["seq"]), generator=g)
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
        yield dict(input_ids=tokens, labels=labels, attention_mask=mask)

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
    seconds = timed(step, job["steps"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": [sum(seconds)] if epoch else seconds, "losses": losses, "peak": [peak]}

print(json.dumps(quantization() if job["what"] == "quant" else training()))
'''

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184",
             "MALLOC_TOP_PAD_": "268435456"}        # glibc keeps freed memory

# -----------------------------------------------------------------------------
# sides


@dataclass(frozen=True)
class Side:
    """A process that measures a job and prints {name: [values]} as JSON in the last line."""
    name: str
    job: Job
    command: tuple              # the job follows as the last argument
    environment: dict

    def figures(self):
        """Runs the process. ValueError with its last words where it fails."""
        command = [*self.command, json.dumps(dataclasses.asdict(self.job))]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | self.environment
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        _, _, last_words = done.stderr.strip().rpartition("\n")
        check(done.returncode == 0, f"a side of the benchmark failed: {last_words}")
        return json.loads(done.stdout.strip().rpartition("\n")[2])


def ours(job, name="nanopeft"):
    """Our side of a job."""
    return Side(name, job, (sys.executable, str(Path(__file__).resolve()), "worker"), {})


def peers(job):
    """The peers' sides of a job: as they come, and with an allocator that keeps memory."""
    check("NANOPEFT_PEERS" in os.environ, "the peers need NANOPEFT_PEERS, a Python with requirements-peers.txt")
    command = os.environ["NANOPEFT_PEERS"], "-I", "-W", "ignore", "-c", PEER
    return [Side("peft + bitsandbytes", job, command, {}),
            Side("the same, allocator set", job, command, ALLOCATOR)]


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
    share = flops_per_token(job) * own["tokens_per_second"]["median"] / rate
    own |= {"rate_of_products": rate, "share_of_it": share}
    print(f"nanopeft runs at {share:.0%} of the {rate / 1e12:.2f} Tflop/s of a large product")
    return report


def flops_per_token(job):
    """Operations of the products with the frozen matrices, forward and backward; without the attention's."""
    with torch.device("meta"):
        model = GPT(origin.read_config(job.base))
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
    """Milliseconds to quantize and to dequantize."""
    rows, report = [["4096 x 4096, NF4, block 64", "quantize, ms", "dequantize, ms"]], {}
    for name, figures in all_figures(job, args).items():
        report[name] = {}
        for what, seconds in figures.items():
            report[name][what] = spread([1000 * t for t in seconds])
        rows.append([name, *map(spread_text, report[name].values())])
    print(table(rows))
    return report


def bench_generate(job, args, folder):
    """Seconds for prompts in a batch, and one at a time."""
    figures = ours(job).figures()
    together, alone = statistics.median(figures["together"]), figures["alone"][0]
    print(f"{job.batch} prompts, 32 tokens each: {together:.2f} s together, {alone:.2f} s one at a time, "
          f"{alone / together:.1f} times as fast")
    return figures


def bench_grow(job, args, folder):
    """Seconds and bytes of a step by sequence length, rank and model; the bytes beside memory.py's."""
    job = replace(job, batch=1, steps=3)
    report = []
    for what, value, changed in variants(job, folder):
        config = origin.read_config(changed.base)
        figures = ours(changed).figures()
        dtype = getattr(torch, changed.dtype)
        predicted = memory.simulate(config, changed.method, 1, changed.seq, dtype, "cpu", storage_of(changed),
                                    rank=changed.rank)
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
        yield "model", name, replace(job, base=base_folder(name, folder / name))


# -----------------------------------------------------------------------------

BENCHES = {"step": bench_step, "epoch": bench_epoch, "loss": bench_loss, "quant": bench_quant,
           "generate": bench_generate, "grow": bench_grow}


def base_folder(name, folder):
    """
    A checkpoint's folder as it is; or the given folder, with random weights of a preset's shape written into
    it, so that both sides read the same. llama-124m is a Llama of GPT-2's width and depth.
    """
    if Path(name, "config.json").is_file():
        return str(Path(name).resolve())
    if name == "llama-124m":
        config = replace(memory.preset("llama-7b"), n_layer=12, n_head=12, n_embd=768, n_ffn=2048)
    else:
        config = memory.preset(name)
    torch.manual_seed(0)
    checkpoint.save_base(GPT(config), folder)
    return str(folder)


def main(args):
    """Measures, prints a table, and as the last line JSON."""
    if args.what == "worker":
        content = parse_json(args.job or "", "the worker's job")
        kinds = {field.name: field.type for field in dataclasses.fields(Job)}
        job = Job(**{name: checked(name, content.get(name), kind) for name, kind in kinds.items()})
        print(json.dumps(MEASURES[job.what](job)))
        return
    dtype = machine.pick_dtype(args.dtype, machine.pick_device(args.device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = "" if args.what == "quant" else base_folder(args.base, folder / "base")
        job = Job(args.what, base, args.rank, args.batch, args.seq, args.steps, machine.dtype_name(dtype),
                  args.device, double=not args.single)
        report = BENCHES[args.what](job, args, folder)
    print(json.dumps(dataclasses.asdict(job) | {"base": args.base, "result": report}))


if __name__ == "__main__":
    run_main(main, ARGS)
