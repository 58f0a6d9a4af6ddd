"""Starts the scripts that train in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_script"]

# What a launcher leaves in the environment of the process that it ran in: a script starts processes of its own.
_LEFT = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT")


def run_script(script: Path, *arguments: object, timeout: int = 180) -> None:
    """Run a script that starts its own ranks, on one thread each; its last words are the failure's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in _LEFT:
        environment.pop(name, None)
    command = [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
