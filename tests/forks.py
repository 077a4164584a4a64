"""
Runs scripts as a shell does, but without the seconds that each would spend on importing torch: a process that has imported what
they import, and has computed nothing, forks a child for every command, and the child runs the script's file as __main__.

    forks = Forks([sys.executable], OURS, ROOT)
    forks.run([ROOT / "train.py", "--rank", "0"], cwd, os.environ)       # -> subprocess.CompletedProcess
"""

import importlib
import json
import os
import resource
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2        # workers share the machine
OURS = "torch._dynamo", "evaluate", "hub", "memory", "sample", "train"         # (the first by optimizers)
PEERS = "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "transformers.models.opt.modeling_opt", "peft", "bitsandbytes"


class Forks:
    """python: the interpreter and its flags; modules: to be imported before the forks, folder: whence."""

    def __init__(self, python, modules, folder):
        self.server = subprocess.Popen([*python, __file__, str(folder), *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
                                       cwd=folder, env=os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"})

    def run(self, argv, cwd, env, timeout=120, limit=(), kills=False):
        """
        limit: (name, bytes) for resource.setrlimit, RLIMIT_AS beyond what the process has already; writing beyond RLIMIT_FSIZE is then an error, as on a full disk. kills: a command
        that does not end has the exit status -9. The result also has `cpu`, seconds, and `peak`, resident bytes.
        """
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            print(json.dumps({"argv": [str(arg) for arg in argv], "cwd": str(cwd), "env": dict(env), "out": str(out), "err": str(err), "limit": limit}), file=self.server.stdin)
            pid = int(self.server.stdout.readline())
            if not select.select([self.server.stdout], [], [], timeout)[0]:
                with suppress(ProcessLookupError):               # It may have ended just now.
                    os.kill(pid, signal.SIGKILL)
            code, cpu, peak = map(float, self.server.stdout.readline().split())
            code = int(code)
            done = subprocess.CompletedProcess(argv, code, out.read_text(errors="replace"), err.read_text(errors="replace"))
        done.cpu, done.peak = cpu, peak
        assert kills or code != -signal.SIGKILL, f"{argv} did not end within {timeout} s\n{done.stdout}{done.stderr}"
        return done

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def serve(folder, *modules):
    sys.path.insert(0, folder)
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        asked = json.loads(line)
        if not (pid := os.fork()):
            become(**asked)
        print(pid, flush=True)
        _, status, used = os.wait4(pid, 0)
        print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, flush=True)


def become(argv, cwd, env, out, err, limit):
    for fd, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        name, size = limit
        if name == "RLIMIT_AS":          # How much torch's libraries take of it differs from version to version.
            size += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, name), (size, size))
    sys.argv, code = argv, 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(*sys.argv[1:])
