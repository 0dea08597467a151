"""Kill runs at random moments, resume them, and compare with the run that nobody killed.

  python -m tests.soak --kills 50
  python -m tests.soak --kills 50 -- --steps-mapper 40 --steps 80      any flags of ipl.py

Each run is the miniature's main job in a process of its own. It is killed (SIGKILL) once, at a
moment drawn evenly from the time that an undisturbed run takes; every third kill waits, from there,
until a file is being written. Then the same command with --resume must end well, with the same
bytes in networks and history. The exit code says whether a run was lost, or differs.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import trange

SCRIPT = Path(__file__).parents[1] / "ipl.py"
RESULTS = "generator.pt mapper.safetensors history.jsonl".split()


def start(out, args):
    words = [sys.executable, str(SCRIPT), "--out", str(out), *args]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, **pipes)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS if (folder / name).exists()}


def kill(process, out, seconds, in_writing):
    """-> whether the process was alive until then, and whether a file was half written."""
    time.sleep(seconds)
    while in_writing and process.poll() is None and not list(out.glob(".*")):
        time.sleep(0.0005)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive, any(out.glob(".*"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("args", nargs="*", help="flags of ipl.py, after --")
    options = parser.parse_args()
    chance, halves, bad, late = random.Random(options.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folder, begin = Path(folder), time.perf_counter()
        undisturbed = start(folder / "undisturbed", options.args)
        words = undisturbed.communicate()[1]
        if undisturbed.returncode:
            sys.exit(words)
        whole, expected = time.perf_counter() - begin, contents(folder / "undisturbed")
        for i in trange(options.kills, disable=None):
            alive = False
            while not alive:
                out, moment = folder / f"{i}-{late}", chance.uniform(0, whole)
                alive, half = kill(start(out, options.args), out, moment, i % 3 == 2)
                late += not alive
            resumed = start(out, [*options.args, "--resume"])
            words = resumed.communicate()[1].strip()
            equal = contents(out) == expected
            verdict = words if resumed.returncode else "equal" if equal else "DIFFERS"
            halves, bad = halves + half, bad + (resumed.returncode != 0 or not equal)
            kind = ", a file half written" * half
            print(
                f"{i + 1}: killed after {moment:.1f} of {whole:.1f} s{kind}; {verdict}", flush=True
            )
    print(f"{options.kills} kills, {halves} of them in the middle of writing; {bad} lost or differ")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
