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
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.command import finish, start

RESULTS = "generator.pt mapper.safetensors history.jsonl".split()


def contents(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS if (folder / name).exists()}


def kill(job, out, seconds, in_writing):
    """-> whether a file was half written then, or None if the process had ended before."""
    time.sleep(seconds)
    while in_writing and job.poll() is None and not any(out.glob(".*")):
        time.sleep(0.0005)
    alive = job.poll() is None
    job.kill()
    job.communicate()
    return any(out.glob(".*")) if alive else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("args", nargs="*", help="flags of ipl.py, after --")
    options = parser.parse_args()
    chance, halves, bad = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        out, begin = Path(folder) / "run", time.perf_counter()
        words = ["--out", out, *options.args]
        finish(start(*words))
        whole, expected = time.perf_counter() - begin, contents(out)
        for i in range(options.kills):
            half = None
            while half is None:
                shutil.rmtree(out, ignore_errors=True)
                moment = chance.uniform(0, whole)
                half = kill(start(*words), out, moment, i % 3 == 2)
            resumed = start(*words, "--resume")
            said = resumed.communicate()[1].strip()
            equal = resumed.returncode == 0 and contents(out) == expected
            verdict = said if resumed.returncode else "equal" if equal else "DIFFERS"
            halves, bad = halves + half, bad + (not equal)
            when = f"killed after {moment:.1f} of {whole:.1f} s" + ", a file half written" * half
            print(f"{i + 1}: {when}; {verdict}", flush=True)
    print(f"{options.kills} kills, {halves} of them in the middle of writing; {bad} lost or differ")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
