"""
Speed and memory beside the stack that people use, and beside what the hardware can do. Every side is a process of its own.

    python bench.py step --peer                                  # a training step: tokens a second, resident peak
    python bench.py step --base gpt2 --method qlora --batch 4 --seq 512 --dtype bfloat16 --steps 5 --peer
    python bench.py loss                                         # the same 50 losses as peft + bitsandbytes, step by step
    python bench.py epoch --data DIR/e2e --tokenizer DIR/gpt2 --peer     # texts of real lengths, ours bucketed, theirs padded as usual
    python bench.py quant --peer                                 # 4096 x 4096: quantize, dequantize
    python bench.py generate --base DIR                          # with the cache, in a batch and one at a time
    python bench.py load --base DIR                              # reading and quantizing a checkpoint
    python bench.py grow --base gpt2                             # by sequence length, rank and model size, beside memory.py

The peers are peft + bitsandbytes + transformers (requirements-peers.txt), run by the Python that NANOPEFT_PEERS names: as they come,
and with the C library's allocator told to keep memory, as nanopeft tells it itself. Sides alternate; medians; the last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib.config import Config, run_main

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}

# -----------------------------------------------------------------------------
# our side


def median_time(function, n, sync=lambda: None):
    """[seconds] of n calls after one to warm up."""
    function()
    sync()
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        function()
        sync()
        seconds.append(time.perf_counter() - start)
    return seconds


def storage(job):
    """The quant.Storage of a job, or None."""
    import quant
    return quant.Storage(job["quant"], double=job["double"]) if job["quant"] else None


def setting(job):
    """(model, optimizer, batches) of a job: model from a folder or a preset, LoRA's B random so that every product counts."""
    from lib import checkpoint, machine, run
    import torch
    import peft
    device = machine.pick_device(job["device"])
    if device.type == "cpu":
        machine.tune_memory()
    config = Config(method=job["method"], rank=job["rank"], dtype=job["dtype"], quant=job["quant"], learning_rate=1e-3, lora_plus_ratio=1.0, weight_decay=0.01)
    torch.manual_seed(0)
    model = checkpoint.load_base(job["base"], getattr(torch, job["dtype"]), storage(job), device)
    peft.apply(model, config.method, rank=config.rank)
    model.checkpointing = job.get("checkpointing", False)
    g = torch.Generator().manual_seed(1)
    V = model.config.vocab_size
    batches = [torch.randint(V, (job["batch"], job["seq"]), generator=g).to(device) for _ in range(job["steps"] + 1)]
    return model.train(), run.make_optimizer(model, config), [(t, torch.cat((t[:, 1:], t.new_full((len(t), 1), -1)), 1)) for t in batches], device


def ours_step(job):
    """A training step, after one to warm up."""
    from lib import machine, run
    import torch
    model, optimizer, batches, device = setting(job)
    if job.get("compile"):
        machine.compile_model(model, device)
    if job.get("adapter"):
        load_peft_tensors(model, job["adapter"])
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    losses, left = [], iter(batches)
    seconds = median_time(lambda: losses.append(float(run.step(model, optimizer, [next(left)], 1.0)[0])), job["steps"], sync)
    return {"seconds": seconds, "losses": losses, "peak": machine.peak_bytes(), "rate": matrix_rate(job, device)}


def ours_epoch(job):
    """Steps over texts of real lengths, batched as train.py batches them."""
    from lib import machine, run
    import data
    model, optimizer, _, device = setting(job | {"steps": 0})
    sequences = [tuple(pair) for pair in json.loads(Path(job["sequences"]).read_text())]
    batches = data.Batches(data.Encoded(sequences, model.config.block_size), job["batch"], 1)

    def step():
        run.step(model, optimizer, [tuple(t.to(device) for t in next(batches))], 1.0)[0].item()
    return {"seconds": median_time(step, job["steps"]), "peak": machine.peak_bytes()}


def matrix_rate(job, device):
    """Floating-point operations a second of a large product of this type, here and now."""
    import torch
    a = torch.randn(2048, 2048, device=device).to(getattr(torch, job["dtype"]))
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return 2 * 2048**3 / statistics.median(median_time(lambda: a @ a, 7, sync))


def ours_quant(job):
    """A 4096 x 4096 matrix to NF4 and back, into memory that is kept."""
    from lib import machine
    import torch
    import quant
    device = machine.pick_device(job["device"])
    if device.type == "cpu":
        machine.tune_memory()
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    W = torch.randn(4096, 4096, device=device)
    q, out = quant.quantize(W, "nf4", 64), torch.empty(4096, 4096, dtype=torch.bfloat16, device=device)
    return {"quantize": median_time(lambda: quant.quantize(W, "nf4", 64), 5, sync), "dequantize": median_time(lambda: q.dequantize(out=out), 9, sync)}


def ours_generate(job):
    """A batch of prompts together and one at a time, 32 tokens each."""
    from lib import checkpoint, machine
    import torch
    device = machine.pick_device(job["device"])
    model = checkpoint.load_base(job["base"], getattr(torch, job["dtype"]), storage(job), device).eval()
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.config.vocab_size, (int(n),), generator=g).tolist() for n in torch.randint(8, 40, (job["batch"],), generator=g)]
    together = median_time(lambda: model.generate(prompts, 32, temperature=0), 3)
    alone = median_time(lambda: [model.generate([p], 32, temperature=0) for p in prompts], 1)
    return {"together": together, "alone": alone}


def ours_load(job):
    """A checkpoint read, and quantized on the way."""
    from lib import checkpoint, machine, run
    import torch
    import peft
    before = machine.resident_bytes()
    start = time.perf_counter()
    model = checkpoint.load_base(job["base"], getattr(torch, job["dtype"]), storage(job))
    seconds = time.perf_counter() - start
    return {"seconds": [seconds], "peak": machine.peak_bytes() - before, "held": sum(run.storage_by_type(model).values()), "parameters": peft.count_parameters(model)["base"]}


def load_peft_tensors(model, folder):
    """Sets the adapter to the one in a folder of PEFT's."""
    import hub
    import peft
    _, _, tensors = hub.from_peft(folder, model.config)
    peft.load_state(model, {n: t.contiguous() for n, t in tensors.items()})


# -----------------------------------------------------------------------------
# the peers' side: code for their interpreter

PEER = r'''
import json, resource, sys, time
import torch
job = json.loads(sys.argv[1])
def median_time(function, n):
    function()
    seconds = []
    for _ in range(n):
        start = time.perf_counter(); function(); seconds.append(time.perf_counter() - start)
    return seconds
if job["what"] == "quant":
    import bitsandbytes.functional as F
    W = torch.randn(4096, 4096)
    q, s = F.quantize_4bit(W, blocksize=64, quant_type="nf4")
    s.dtype = torch.bfloat16
    result = {"quantize": median_time(lambda: F.quantize_4bit(W, blocksize=64, quant_type="nf4"), 5), "dequantize": median_time(lambda: F.dequantize_4bit(q, s), 9)}
else:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from peft import LoraConfig, PeftModel, get_peft_model
    dtype = getattr(torch, job["dtype"])
    kwargs = {}
    if job["quant"]:
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=job["double"], bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype, attn_implementation="sdpa", **kwargs)
    model.config.use_cache = False
    gpt2 = model.config.model_type == "gpt2"
    if job.get("adapter"):
        model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    else:
        targets = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"] if gpt2 else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=job["rank"], lora_alpha=16, target_modules=targets, fan_in_fan_out=gpt2))
    model.train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.0
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01)
    g = torch.Generator().manual_seed(1)
    losses = []
    if job["what"] == "epoch":      # random batches padded to their longest, as the usual collator does
        sequences = json.load(open(job["sequences"]))
        order = torch.randperm(len(sequences), generator=g).tolist()
        def batch(i):
            part = [sequences[j] for j in order[i * job["batch"]:(i + 1) * job["batch"]]]
            T = max(len(ids) for ids, _ in part)
            tokens, labels, mask = torch.zeros(len(part), T, dtype=torch.long), torch.full((len(part), T), -100), torch.zeros(len(part), T, dtype=torch.long)
            for row, (ids, n) in enumerate(part):
                tokens[row, :len(ids)] = torch.tensor(ids)
                labels[row, n:len(ids)] = torch.tensor(ids[n:])
                mask[row, :len(ids)] = 1
            return dict(input_ids=tokens, labels=labels, attention_mask=mask)
        batches = map(batch, range(10**9))
    else:
        batches = (dict(input_ids=t, labels=t) for t in [torch.randint(model.config.vocab_size, (job["batch"], job["seq"]), generator=g) for _ in range(job["steps"] + 1)])
    def step():
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step(); optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    result = {"seconds": median_time(step, job["steps"]), "losses": losses, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
print(json.dumps(result))
'''


def peer(job, allocator=False):
    """The peers' side of a job, in their interpreter."""
    if "NANOPEFT_PEERS" not in os.environ:
        raise ValueError("--peer needs NANOPEFT_PEERS: a Python with requirements-peers.txt")
    return run([os.environ["NANOPEFT_PEERS"], "-I", "-W", "ignore", "-c", PEER, json.dumps(job)], ALLOCATOR if allocator else {}, "/")


def ours(job):
    """Our side of a job, in a process of its own."""
    return run([sys.executable, str(Path(__file__).resolve()), "worker", json.dumps(job)], {}, ".")


def run(command, environment, folder):
    """What a side prints in its last line."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment)
    if done.returncode:
        raise ValueError(f"a side of the benchmark failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# -----------------------------------------------------------------------------
# side by side


def base_folder(name, folder):
    """A folder as it is, or random weights of a preset's shape written as a checkpoint, so that both sides read the same."""
    from lib import checkpoint
    if Path(name, "config.json").is_file():
        return str(Path(name).resolve())
    import dataclasses
    import torch
    from memory import preset
    from model import GPT
    shapes = {"llama-124m": dict(n_layer=12, n_head=12, n_embd=768, n_ffn=2048)}       # the width and depth of GPT-2
    config = dataclasses.replace(preset("llama-7b"), **shapes[name]) if name in shapes else preset(name)
    torch.manual_seed(0)
    checkpoint.save_base(GPT(config), folder)
    return str(folder)


def alternate(sides, rounds):
    """{name: [result]}: each side in turn, rounds times."""
    results = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            results[name].append(side())
    return results


def spread(values):
    """Of the values: median, least, most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def bench_step(job, args):
    """A training step of each side: tokens a second, resident peak, share of the rate of one large product."""
    sides = {"nanopeft": lambda: ours(job)}
    for other in args.than.split(",") if args.than else ():
        sides[f"nanopeft, {other}"] = lambda other=other: ours(job | {"method": other, "quant": "nf4" if other == "qlora" else args.quant})
    if args.peer:
        sides |= {"peft + bitsandbytes": lambda: peer(job), "the same, allocator set": lambda: peer(job, True)}
    results = alternate(sides, args.rounds)
    tokens, report = job["batch"] * job["seq"], {}
    for name, runs in results.items():
        rate = [tokens / s for r in runs for s in r["seconds"]]
        report[name] = {"tokens_per_second": spread(rate), "peak": max(r["peak"] for r in runs)}
    ours_ = report["nanopeft"]
    ours_["matrix_rate"] = statistics.median(r["rate"] for r in results["nanopeft"])
    ours_["share_of_it"] = flops_per_token(job) * ours_["tokens_per_second"]["median"] / ours_["matrix_rate"]
    print(f"{Path(job['name']).name}, {job['method']} rank {job['rank']}, {job['batch']} x {job['seq']}, {job['dtype']}")
    for name, r in report.items():
        t = r["tokens_per_second"]
        ratio = f"  {ours_['tokens_per_second']['median'] / t['median']:5.2f} times as fast, {ours_['peak'] / r['peak']:.2f} of its memory" if r is not ours_ else \
            f"  {ours_['share_of_it']:.0%} of the {ours_['matrix_rate'] / 1e12:.2f} Tflop/s of a large product"
        print(f"  {name:26} {t['median']:8.0f} tokens/s ({t['least']:.0f} to {t['most']:.0f})  {r['peak'] / 1e9:5.2f} GB{ratio}")
    return report


def bench_epoch(job, args):
    """Sequences a second over a shuffled part of an epoch; the peers get the same texts."""
    from lib import checkpoint
    import data
    encoded = data.encode(data.load(args.data).train, data.Tokenizer.load(args.tokenizer or job["base"]), checkpoint.read_config(job["base"]).block_size)
    Path(job["folder"], "sequences.json").write_text(json.dumps(encoded.sequences))
    job["sequences"] = str(Path(job["folder"], "sequences.json"))
    sides = {"nanopeft": lambda: ours(job)}
    if args.peer:
        sides |= {"peft + bitsandbytes": lambda: peer(job), "the same, allocator set": lambda: peer(job, True)}
    report = {name: {"sequences_per_second": spread([job["steps"] * job["batch"] / sum(r["seconds"]) for r in runs]), "peak": max(r["peak"] for r in runs)}
              for name, runs in alternate(sides, args.rounds).items()}
    print(f"{Path(job['name']).name}, {job['method']} rank {job['rank']}, batches of {job['batch']} out of {len(encoded.sequences)} texts, {job['dtype']}")
    best = report["nanopeft"]["sequences_per_second"]["median"]
    for name, r in report.items():
        print(f"  {name:26} {r['sequences_per_second']['median']:8.2f} sequences/s  {r['peak'] / 1e9:5.2f} GB" + (f"  {best / r['sequences_per_second']['median']:5.2f} times as fast" if name != "nanopeft" else ""))
    return report


def flops_per_token(job):
    """Of the products that cannot be left out: forward, and backward to the inputs, of every frozen matrix; attention's scores apart."""
    from lib import checkpoint
    import torch
    from model import GPT
    with torch.device("meta"):
        model = GPT(checkpoint.read_config(job["base"]))
    matrices = sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2) + model.head.weight.numel()
    return 4 * matrices if job["method"] != "full" else 6 * matrices


def bench_loss(job, args):
    """Ours and the peers' losses from the same weights, adapters and data. On a Llama shape: GPT-2's fused q, k, v take another LoRA there."""
    from lib import checkpoint, files
    import hub
    import torch
    import peft
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint.load_base(job["base"])
        peft.apply(model, "lora", rank=job["rank"])
        with torch.no_grad():
            torch.manual_seed(5)
            for n, p, m in peft.parameters_by_method(model):
                if m and n.endswith(".B"):
                    p.normal_(std=0.02)
        said, tensors = hub.to_peft(peft.pack_adapter(model), model.config)
        del model
        files.write_safetensors(Path(folder, "adapter_model.safetensors"), {n: (torch.float32, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()})
        Path(folder, "adapter_config.json").write_text(json.dumps(said))
        job["adapter"] = folder
        a, b = ours(job)["losses"], peer(job)["losses"]
    worst = max(abs(x - y) for x, y in zip(a, b))
    print(f"{len(a)} steps, {job['dtype']}: ours {a[0]:.5f} to {a[-1]:.5f}, theirs {b[0]:.5f} to {b[-1]:.5f}; largest difference {worst:.2e}")
    return {"ours": a, "peers": b, "largest_difference": worst}


def bench_quant(job, args):
    """Milliseconds to quantize and dequantize."""
    sides = {"nanopeft": lambda: ours(job)}
    if args.peer:
        sides |= {"bitsandbytes": lambda: peer(job), "the same, allocator set": lambda: peer(job, True)}
    results = {name: {what: spread([1e3 * s for r in runs for s in r[what]]) for what in ("quantize", "dequantize")} for name, runs in alternate(sides, args.rounds).items()}
    print("4096 x 4096, NF4, block 64; milliseconds")
    for name, r in results.items():
        print(f"  {name:26}" + "".join(f"  {what} {r[what]['median']:7.1f} ({r[what]['least']:.1f} to {r[what]['most']:.1f})" for what in r))
    return results


def bench_generate(job, args):
    """Prompts in a batch against one at a time."""
    result = ours(job)
    a, b = statistics.median(result["together"]), result["alone"][0]
    print(f"{job['batch']} prompts, 32 tokens each: {a:.2f} s together, {b:.2f} s one at a time, {b / a:.1f} times as fast")
    return result


def bench_load(job, args):
    """Seconds and bytes to read a checkpoint into storage."""
    result = ours(job)
    print(f"{result['parameters']:,} parameters, {job['quant'] or job['dtype']}: {result['seconds'][0]:.2f} s, {result['held'] / 1e6:.1f} MB held, {result['peak'] / 1e6:.1f} MB at the peak")
    return result


def bench_grow(job, args):
    """Time and memory by sequence length, rank and model size; measured beside what memory.py says. Bytes are counted by memory.Tracker."""
    from lib import checkpoint
    import torch
    import memory
    context = checkpoint.read_config(job["base"]).block_size
    rows = [("seq", n, dict(seq=n, batch=1)) for n in (128, 256, 512, 1024, 2048) if n <= context] + [("rank", n, dict(rank=n, batch=1)) for n in (1, 16, 256)]
    rows += [("model", n, dict(name=n, batch=1)) for n in ("gpt2", "gpt2-medium", "gpt2-large")[:args.models]]
    report = []
    for what, value, change in rows:
        with tempfile.TemporaryDirectory() as folder:
            changed = job | change
            if "name" in change:
                changed["base"] = base_folder(value, Path(folder))
            r = ours(changed | {"what": "grow"})
            expected = memory.simulate(checkpoint.read_config(changed["base"]), job["method"], changed["batch"], changed["seq"], getattr(torch, job["dtype"]), "cpu",
                                       storage(job), rank=changed["rank"])["peak"]
        report.append({"what": what, "value": value, "seconds": statistics.median(r["seconds"]), "counted": r["counted"], "predicted": expected})
        print(f"  {what:6}{value!s:>12}  {report[-1]['seconds']:7.2f} s a step  {r['counted'] / 1e6:9.1f} MB counted  {expected / 1e6:9.1f} MB predicted", flush=True)
    return report


def ours_grow(job):
    """A step's seconds, and its bytes as memory.Tracker counts them."""
    from lib import run
    import memory
    result = ours_step(job | {"steps": 2})
    model, optimizer, batches, _ = setting(job | {"steps": 1})
    run.step(model, optimizer, batches[:1], 1.0)
    with memory.Tracker(model, optimizer) as tracker:
        run.step(model, optimizer, batches[1:2], 1.0)
    return result | {"counted": tracker.report()["peak"]}


# -----------------------------------------------------------------------------


def parse(args):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "epoch", "loss", "quant", "generate", "load", "grow", "worker"))
    parser.add_argument("job", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--base", default="", help="a folder with a checkpoint, or a preset, or llama-124m; default gpt2, for loss llama-124m")
    parser.add_argument("--method", default="qlora")
    parser.add_argument("--than", default="", help="step: other methods of ours, joined by commas, to measure in the same run")
    parser.add_argument("--quant", default="", help="the base in storage; qlora: nf4")
    parser.add_argument("--single", action="store_true", help="the base's scales in float32, not quantized again")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: bfloat16 where the hardware multiplies it natively")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data", default="embedded", help="epoch: as for train.py")
    parser.add_argument("--tokenizer", default="", help="epoch: a folder with one, where the base has none")
    parser.add_argument("--models", type=int, default=3, help="grow: how many sizes of GPT-2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--peer", action="store_true")
    return parser.parse_args(args)


def main(args):
    """Measures, prints a table, and as the last line JSON."""
    from lib import machine
    if args.what == "worker":
        job = json.loads(args.job)
        print(json.dumps(globals()[f"ours_{'step' if job['what'] == 'loss' else job['what']}"](job)))
        return
    for name in ("rank", "batch", "seq", "steps", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; it must be at least 1")
    job = {k: getattr(args, k) for k in ("what", "method", "rank", "batch", "seq", "dtype", "steps", "device", "compile", "checkpointing")}
    if args.dtype == "auto":
        job["dtype"] = str(machine.pick_dtype("auto", machine.pick_device(args.device))).removeprefix("torch.")
    job |= {"double": not args.single, "quant": args.quant or ("nf4" if args.method == "qlora" else ""), "name": args.base or ("llama-124m" if args.what == "loss" else "gpt2")}
    with tempfile.TemporaryDirectory() as folder:
        job["folder"] = folder
        job["base"] = "" if args.what == "quant" else base_folder(job["name"], Path(folder))
        report = globals()[f"bench_{args.what}"](job, args)
    print(json.dumps({"what": args.what, **{k: v for k, v in job.items() if k not in ("what", "base", "adapter", "folder", "sequences")}, "result": report}))


if __name__ == "__main__":
    ARGS = parse(sys.argv[1:])
    run_main(main, ARGS)
