"""
SIGKILL at random moments of a run that saves at every step, every third time in the middle of writing a file; after each one the run
must go on from a whole state.

    python tests/kill_drill.py 200 SEED --base base --data data.jsonl ...      # flags of train.py; prints the step of each resumed state

A child is forked after the imports, so that a kill costs a fraction of a second. Nothing may be lost but the steps since the last save:
the state on disk is never older than the last step that the child has reported.
"""

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch._dynamo  # noqa: F401 (this and the next, before the fork)
import memory  # noqa: F401
import hub  # noqa: F401
import train
from lib import files
from lib.config import command_line, run_main


def torn(n):
    """Makes the nth file with tensors that lib/files.py writes, from now, end half written, and the process with it."""
    def opened(path, mode="r", **options):
        nonlocal n
        file = open(path, mode, **options)
        n -= "w" in mode and ".pt" in Path(path).name
        if "w" in mode and not n:
            write = file.write

            def half(part):
                write(part[:len(part) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            file.write = half
        return file
    files.open = opened


def child(args, n):
    """(pid, file of its output) of a training process of its own; n: see torn, 0: whole."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, os.fdopen(read)
    os.dup2(write, 1)
    if n:
        torn(n)
    run_main(train.main, command_line(args))
    os._exit(0)


def drill(kills, seed, flags, folder=Path("drill")):
    rng, steps = random.Random(seed), []
    for k in range(kills):
        resume = (folder / "state.pt").exists()
        pid, output = child(["--resume", str(folder)] if resume else [*flags, "--out_dir", str(folder), "--max_iters", "1000000", "--save_interval", "1",
                                                                     "--eval_interval", "7", "--log_interval", "1"],
                            rng.randrange(3, 6) if resume and k % 3 == 0 else 0)
        reported = 0
        deadline = None
        for line in output:                                      # from the first step on it saves all the time
            if match := re.match(r"step +(\d+)/", line):
                reported = int(match[1])
                deadline = deadline or time.monotonic() + rng.random() * 0.15
                if time.monotonic() >= deadline:
                    break
        if not reported:
            raise SystemExit("the run ended by itself")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reported = max([reported, *(int(match[1]) for line in output if (match := re.match(r"step +(\d+)/", line)))])
        output.close()
        step = files.read_file(folder / "state.pt")["progress"]["step"]       # whole, whatever the moment
        if not reported - 1 <= step <= reported + 1:             # a step is reported before it is saved
            raise SystemExit(f"step {reported} was reported, but the state is of step {step}")
        steps.append(step)
    return steps


if __name__ == "__main__":
    print(json.dumps(drill(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
