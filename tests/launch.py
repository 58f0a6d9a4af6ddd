"""Runs scripts in processes of their own, each a copy of one that has imported Lightning and this package.

Importing them takes longer than most scripts do: one process imports them once, and forks itself for every script.
Run as a program, this file is that process: it reads a request a line, and answers with the exit codes.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

__all__ = ["held_to", "run_code", "run_script"]

# What a launcher leaves in the environment of the process that it ran in: a script starts processes of its own.
_LEFT = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_script(
    script: Path, *arguments: object, ranks: int = 0, timeout: int = 180, code: int = 0, **variables: str
) -> str:
    """What a script prints, run as a process that has computed nothing yet, on one thread.

    Args:
        arguments: of the command line.
        ranks: processes of one group, each told its rank as a cluster does it; with 0 the script starts its own.
        timeout: in seconds, for all of them.
        code: with which the script should end; the negative of a signal that ends it.
        variables: of its environment. It has imported already what this package imports.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    for name in _LEFT:
        environment.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "argv": [str(script), *map(str, arguments)], "path": sys.path, "folder": str(Path.cwd()),
            "environments": [{**environment, **names} for names in _group(ranks)] if ranks else [environment],
            "said": str(Path(folder, "said")), "timeout": timeout,
        }  # fmt: skip
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        said = Path(folder, "said").read_text(encoding="utf-8", errors="replace")
    assert codes == [code] * max(1, ranks), f"exit codes {codes}, expected {code}\n{said[-4000:]}"
    return said


def run_code(code: str, **variables: str) -> str:
    """The same for the text of a program."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "program.py")
        script.write_text(code, encoding="utf-8")
        return run_script(script, **variables)


def held_to(isa: str, said: str) -> bool:
    """Whether torch's library for integer products, with ONEDNN_VERBOSE=1, began with no more instructions than these.

    What computes before it forks has made the library choose already, and then it says nothing.
    """
    beyond = {"AVX2": "isa:Intel AVX-512", "AVX512_CORE": "isa:Intel AVX-512 with Intel DL Boost"}.get(isa, "no more")
    return any(",isa:" in line and beyond not in line for line in said.splitlines())


def _group(ranks: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [{**master, "WORLD_SIZE": str(ranks), "NODE_RANK": "0", "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@functools.cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in _LEFT:
        environment.pop(name, None)
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip

    def stop() -> None:
        server.communicate()

    atexit.register(stop)
    return server


def _serve() -> None:
    for name in ("sklearn.datasets", "networkx", "lightning.pytorch", "lightning_lowbit.callbacks.quant"):
        importlib.import_module(name)
    gc.freeze()  # a collection in a copy would write to, and so copy, all pages that it shares
    for line in sys.stdin:
        request = json.loads(line)
        started = {_fork(request, environment): i for i, environment in enumerate(request["environments"])}
        print(json.dumps(_ended(started, request["timeout"])), flush=True)


def _fork(request: dict[str, Any], environment: dict[str, str]) -> int:
    """The number of a new process; the process itself runs the script, and does not return."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()  # so that the processes of a script end with it
        said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        silence = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, silence), (1, said), (2, said)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(request["folder"])
        script = request["argv"][0]
        sys.argv, sys.path[:] = request["argv"], [str(Path(script).parent), *request["path"]]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(processes: dict[int, int], timeout: float) -> list[int]:
    """Exit codes in the order of the ranks; once one has failed, or the time is over, the others are killed."""
    codes: dict[int, int] = {}
    stop = time.monotonic() + timeout
    while len(codes) < len(processes):
        process, status = os.waitpid(-1, os.WNOHANG)
        if process in processes:
            codes[processes[process]] = os.waitstatus_to_exitcode(status)
        if not process:
            time.sleep(0.01)
        if any(codes.values()) or time.monotonic() > stop:
            for process, rank in processes.items():
                if rank not in codes:
                    os.killpg(process, signal.SIGKILL)
                    codes[rank] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return [codes[rank] for rank in range(len(processes))]


if __name__ == "__main__":
    _serve()
