"""The words of a run to its user: streams that cannot fail, and errors in one line.

Whatever the surroundings are like (closed streams, a locale that lacks letters, filters of
warnings), a run that is finished has not failed.
"""

import contextlib
import os
import re
import shutil
import signal
import sys
import warnings

import torch
import torch.distributed as dist

import ipl
from cli.settings import Settings, flag


class Stream:
    """stdout or stderr: what a closed, broken or full one cannot take is lost, and no error; what
    its encoding lacks is escaped."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _try(self, function, *args):
        try:
            return function(*args)
        except (OSError, ValueError):  # ValueError: it is closed
            with contextlib.suppress(OSError, ValueError):  # what waits in it leads nowhere, too
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)

    def isatty(self):
        return bool(self._try(self.stream.isatty))

    def write(self, words):
        encoding = self.stream.encoding or "utf-8"
        words = words.encode(encoding, "backslashreplace").decode(encoding)
        return self._try(self.stream.write, words)

    def flush(self):
        self._try(self.stream.flush)


@contextlib.contextmanager
def lenient_streams():
    """Inside, nothing that is wrong with stdout and stderr is an error.

    Those that were closed before Python began lead nowhere, instead of into the next file that is
    opened: it would get their number, and with it what C libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
    with contextlib.ExitStack() as stack:
        if shutil.get_terminal_size().columns < 40:  # tyro's help would never end in a very few
            before = {k: x for k, x in os.environ.items() if k == "COLUMNS"}
            stack.callback(lambda: (os.environ.pop("COLUMNS"), os.environ.update(before)))
            os.environ["COLUMNS"] = "40"
        null = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(Stream(sys.stdout or null)))
        stack.enter_context(contextlib.redirect_stderr(Stream(sys.stderr or null)))
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def as_flags(words):
    """The sentences of ipl.py speak of fields; the command line's, of flags."""
    names = "|".join(sorted(Settings.__dataclass_fields__, key=len, reverse=True))
    words = re.sub(rf"(?<![\w/.-])({names})=(\S+)", lambda x: f"{flag(x[1])} {x[2]}", words)
    names = "|".join(x for x in Settings.__dataclass_fields__ if "_" in x or x in ("lr", "ema"))
    return re.sub(rf"(?<![\w/.-])({names})\b(?![/.])", lambda x: flag(x[1]), words)


def in_words(error):
    """An OSError without its number."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


@contextlib.contextmanager
def plain_words(prog="ipl.py", speaks=True):
    """Warnings and errors inside are one line on stderr each.

    Exit code 2: bad input. 1: a run that failed. 128 + n: stopped by signal n. speaks: whether this
    is the process that says what all of them see.
    """
    first = speaks and ipl.ranks()[0] == 0

    def tell(kind, what):
        words = as_flags(" ".join(str(what).split()))
        words = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in words)
        words = words if len(words) <= 500 else f"{words[:250]} ... {words[-200:]}"
        print(f"{prog}: {kind}: {words}", file=sys.stderr, flush=True)

    def fail(what, code, speaks=True):
        if speaks:
            tell("error", what)
        raise SystemExit(code)

    def warn(message, *_, **__):
        if first:
            tell("warning", message)

    with warnings.catch_warnings():
        warnings.resetwarnings()  # one that is made an error, by -W, would end the run
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = warn
        try:
            yield
        except FloatingPointError as error:
            fail(error, 1, first)
        except ImportError as error:
            wanted = "" if "wanted" in str(error) else "; wanted: pip install -r requirements.txt"
            fail(f"{error}{wanted}", 2, speaks)
        except ValueError as error:
            fail(error, 2, first)
        except OSError as error:
            fail(in_words(error), 2)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                fail(error if str(error).startswith("out of memory") else "out of memory", 1)
            network = "connection|closed|reset|broken pipe|timed out|gloo|nccl|peer"
            if not isinstance(error, dist.DistError) and not (
                dist.is_initialized() and re.search(network, str(error), re.IGNORECASE)
            ):
                raise
            lost = "lost the other processes of this run; the same command with --resume goes on"
            fail(f"rank {os.environ.get('RANK')}: {lost} ({str(error).splitlines()[0]})", 1)
        except KeyboardInterrupt as stop:
            where, number = stop.args or ("stopped", signal.SIGINT)
            if first:
                print(f"\n{prog}: {where}", file=sys.stderr, flush=True)
            raise SystemExit(128 + number) from None


def is_out_of_memory(error):
    """Whether that is what an error says; not all that do are of torch's own class."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return bool(re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)))
