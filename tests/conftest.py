"""What the tests share: real data, the interpreter that has the peers, and a run of a script as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real models and data that NANOPEFT_DATA names."""
    if "NANOPEFT_DATA" not in os.environ:
        pytest.skip("NANOPEFT_DATA does not name a folder with e2e/, stories260k/ and gpt2/")
    return Path(os.environ["NANOPEFT_DATA"])


@pytest.fixture(scope="session")
def script():
    """script("train.py", "--rank", 8, cwd=...) -> CompletedProcess, started as a user starts it."""
    def run(name, *args, cwd=ROOT, timeout=120, **env):
        return subprocess.run([sys.executable, str(ROOT / name), *map(str, args)], cwd=cwd, timeout=timeout, capture_output=True,
                              text=True, env=os.environ | {"OMP_NUM_THREADS": "2"} | env)
    return run


@pytest.fixture
def refused(script):
    """The one line on standard error with which a script refuses; fails on a traceback or another exit status."""
    def run(name, *args, **kwargs):
        done = script(name, *args, **kwargs)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1, (done.returncode, done.stdout, done.stderr)
        return lines[0]
    return run
