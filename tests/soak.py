"""Kill runs at random moments, resume them, and compare with the run that nobody killed.

  python -m tests.soak --kills 50
  python -m tests.soak --kills 50 -- --steps-mapper 40 --steps 80      any flags of ipl.py

Each run is the miniature's main job in a process of its own. It is killed (SIGKILL) once, at a
moment drawn evenly from the time that an undisturbed run takes; every third kill waits, from there,
until a checkpoint is being written. Then the same command with --resume must end well, with the
same bytes in networks and history. Reported: the runs, kills in the middle of writing, steps done
that were not on the disk, and runs that were lost or differ, which also are the exit code.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import trange

ROOT = Path(__file__).parents[1]
RESULTS = "generator.pt mapper.safetensors history.jsonl".split()
COUNTED = """
import os, sys
import cli, ipl
progress, steps = ipl.progress, os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def counted(*args, **more):
    for step in progress(*args, **more):
        yield step
        os.write(steps, b".")
ipl.progress = counted
cli.main(sys.argv[2:])
"""  # the command line, which leaves a dot for every step


def start(out, args):
    return subprocess.Popen(
        [sys.executable, "-c", COUNTED, f"{out}.steps", "--out", str(out), *args],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS if (folder / name).exists()}


def steps_saved(folder):
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    return sum(x["done"] for x in torch.load(path, weights_only=True)["loops"].values())


def kill(process, out, seconds, in_writing):
    """-> whether the process was alive until then, and whether a file was half written."""
    time.sleep(seconds)
    while in_writing and process.poll() is None and not list(out.glob(".*")):
        time.sleep(0.0005)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive, any(out.glob(".*"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("args", nargs="*", help="flags of ipl.py, after --")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder, begin = Path(folder), time.perf_counter()
        undisturbed = start(folder / "undisturbed", options.args)
        words = undisturbed.communicate()[1]
        if undisturbed.returncode:
            sys.exit(words)
        whole, expected = time.perf_counter() - begin, contents(folder / "undisturbed")
        total = (folder / "undisturbed.steps").stat().st_size
        print(f"undisturbed: {total} steps, {whole:.0f} s", flush=True)

        lost, different, halves, repeated, late = [], [], 0, [], 0
        for i in trange(options.kills, disable=None):
            alive = False
            while not alive:
                out = folder / f"{i}-{late}"
                process = start(out, options.args)
                alive, half = kill(process, out, chance.uniform(0, whole), i % 3 == 2)
                late += not alive
            dots = Path(f"{out}.steps")
            done, saved = dots.stat().st_size if dots.exists() else 0, steps_saved(out)
            halves += half
            repeated.append(done - saved)
            resumed = start(out, [*options.args, "--resume"])
            words = resumed.communicate()[1]
            if resumed.returncode:
                lost.append(i)
            elif contents(out) != expected:
                different.append(i)
            verdict = words.strip() if i in lost else "DIFFERS" if i in different else "equal"
            kept = f"{saved} saved{', a file half written' * half}"
            print(f"{i + 1}: killed at step {done} of {total}, {kept}; {verdict}", flush=True)
    print(
        f"{options.kills} kills, {len(lost)} lost runs, {len(different)} differences; "
        f"{halves} in the middle of writing, {late} came too late and were drawn again; "
        f"steps to repeat: mean {sum(repeated) / len(repeated):.1f}, most {max(repeated)}"
    )
    sys.exit(bool(lost or different))


if __name__ == "__main__":
    main()
