"""
What a training step on a GPU is made of: python tests/profile_gpu.py [MODEL]. For QLoRA and LoRA the seconds of a step, how long
the GPU and the Python thread work in it, and the kernels that take longest; and the loss by the size of its chunks.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench  # noqa: E402
import memory  # noqa: E402
import peft  # noqa: E402
from lib import kernels, run  # noqa: E402
from lib.config import Config  # noqa: E402

ROWS, LENGTH = 4, 512


def profile(name, method, device, dtype):
    """Prints a step's seconds and its kernels."""
    model = bench.random_base(memory.architecture(name), dtype, peft.default_storage(method), device).train()
    peft.apply(model, method)
    optimizer = run.make_optimizer(model, Config())
    tokens = torch.randint(model.config.vocab_size, (2, ROWS, LENGTH), device=device)

    def step():
        run.step(model, optimizer, [tokens], 1.0)

    seconds = min(bench.timed(step, 4, device))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        step()
    totals = seen.key_averages()
    on_device = sum(event.self_device_time_total for event in totals)
    launched = sum(event.count for event in totals if "Launch" in event.key)
    print(f"{name} {method}: a step takes {1000 * seconds:.1f} ms, the GPU's kernels {on_device / 1000:.1f} ms in {launched} launches")
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for event in sorted(totals, key=lambda event: -getattr(event, by))[:12]:
        print(f"    {getattr(event, by) / 1000:9.2f} ms {event.count:6} x {event.key[:90]}")


def loss_by_chunk(name, device, dtype):
    """Prints the milliseconds of the loss, forward and backward, by the size of its chunks."""
    config = memory.architecture(name)
    weight = torch.randn(config.vocab_size, config.n_embd, device=device).mul_(0.02).to(dtype)
    x = torch.randn(ROWS * LENGTH, config.n_embd, device=device).to(dtype).requires_grad_()
    targets = torch.randint(config.vocab_size, (ROWS * LENGTH,), device=device)
    before = kernels.CHUNK
    for exponent in (24, 25, 26, 27):
        kernels.CHUNK = 2**exponent
        seconds = min(bench.timed(lambda: kernels.cross_entropy(x, weight, targets).backward(), 4, device))
        print(f"    the loss in chunks of 2^{exponent} numbers: {1000 * seconds:.2f} ms")
    kernels.CHUNK = before


def main(name="llama-3.2-1b"):
    """Profiles both methods."""
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for method in ("qlora", "lora"):
        profile(name, method, device, dtype)
    loss_by_chunk(name, device, dtype)
    print(f"{time.monotonic() - start:.1f} seconds")


if __name__ == "__main__":
    main(*sys.argv[1:])
