"""Runs a script again and again in forks of this process, kills each, and lets it go on to its end.

    python killed_runs.py SCRIPT RECIPE FOLDER POINTS

The first run, FOLDER/whole, is left alone. A line of JSON says of each other one when it was killed.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


def start(main: Callable[[list[str]], None], recipe: str, folder: Path) -> int:
    """Return the process that runs the script."""
    process = os.fork()
    if process == 0:
        sys.stdout = sys.stderr
        status = 1
        try:
            main([recipe, "--output_dir", str(folder)])
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return process


def finish(process: int):
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"A run that wasn't killed ended with {status}.")


def kill_while_saving(process: int, folder: Path, which: int, delay: float):
    """Kill a process soon after it began to write its `which`-th checkpoint."""
    seen = set()
    while len(seen) < which and os.waitpid(process, os.WNOHANG) == (0, 0):
        seen |= {partial.name for partial in folder.glob("*.partial")}
        time.sleep(0.0002)
    time.sleep(delay)


def main(script: str, recipe: str, folder: str, points: str):
    run = __import__(script).main
    generator = random.Random(0)
    begin = time.monotonic()
    finish(start(run, recipe, Path(folder) / "whole"))
    duration = time.monotonic() - begin
    for number in range(int(points)):
        output_dir = Path(folder) / str(number)
        process = start(run, recipe, output_dir)
        if number % 2:
            kill_while_saving(process, output_dir, generator.randint(1, 6), generator.uniform(0, 0.01))
        else:
            time.sleep(generator.uniform(0.1, 0.95) * duration)
        try:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            killed = True
        except (ProcessLookupError, ChildProcessError):
            killed = False
        left = sorted(path.name for path in output_dir.glob("checkpoint-*"))
        finish(start(run, recipe, output_dir))
        print(json.dumps({"folder": str(number), "killed": killed, "left": left}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
