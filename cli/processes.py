"""The process of a run: its words to the user, its signals, its device, its fellow processes."""

import argparse
import contextlib
import ctypes
import fcntl
import io
import os
import re
import signal
import sys
import tempfile
import unicodedata
import warnings
from functools import partial, wraps
from itertools import groupby

import torch
import torch.distributed as dist


def parse(kind, argv, prog="ipl.py", **more):
    """tyro.cli, with errors of one line: a dataclass -> its value, a function -> its call to make.

    Raises ValueError for words that do not fit, and for those that are no text; exits after --help.
    """
    import tyro

    for before, word in zip(["", *argv], argv, strict=False):
        if any(unicodedata.category(x) in ("Cc", "Cs") for x in word):
            flag = before if before.startswith("-") else "a word"
            raise ValueError(f"{flag} is {word!r}; wanted: UTF-8 without control characters")
    if not isinstance(kind, type):
        function = kind
        kind = wraps(function)(lambda *args, **kwargs: partial(function, *args, **kwargs))
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=argv, prog=prog, **more)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise ValueError(f"{_out_of_box(box.getvalue())}; see {prog} --help") from exit_


def parse_command(functions, argv):
    """The call of the one that argv[0] names, as `parse`. Raises ValueError if none does."""
    name, known = argv[0], {function.__name__: function for function in functions}
    if name not in known:
        wanted = f"{', '.join(known)}, or flags alone such as --target anime"
        raise ValueError(f"no command {name!r}; wanted: {wanted}")
    return parse(known[name], argv[1:], f"ipl.py {name}")


def _out_of_box(text):
    """What tyro says is wrong, and the flag that it thinks was meant, without frame and help."""
    lines = [line.strip("│╭╮╰╯ ") for line in text.splitlines()]
    rule = re.compile("[─-]+")  # the latter where stdout is not UTF-8
    first = 2 if rule.fullmatch(lines[1]) else 1  # after the title
    wrong, *help_ = (
        list(group) for is_rule, group in groupby(lines[first:], rule.fullmatch) if not is_rule
    )
    words = re.sub(r" Got errors:.*", "", " ".join(filter(None, wrong))).rstrip(".")
    known = "Argument helptext:", "Perhaps you meant:"
    meant = help_[0][1:2] if help_ and help_[0][0] in known else []
    return "; wanted: ".join([words, *meant])


def split(argv, flag):
    """A command line for each value of a flag that may be given several times."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(flag, action="append", default=[], dest="values")
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError:  # the flag without a value, for `parse` to refuse
        return [argv]
    return [[*rest, flag, value] for value in found.values] or [argv]


def in_words(error):
    """An OSError without its number."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


@contextlib.contextmanager
def plain_words(prog="ipl.py", speaks=True):
    """Warnings and errors inside are one line on stderr each.

    Exit code 2: bad input. 1: a run that failed. 128 + n: stopped by signal n. speaks: whether this
    is the process that says what all of them see.
    """

    def say(kind, what):
        words = " ".join(str(what).split())
        words = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in words)
        words = words if len(words) <= 500 else f"{words[:250]} ... {words[-200:]}"
        print(f"{prog}: {kind}: {words}", file=sys.stderr, flush=True)

    def fail(what, code, speaks=True):
        if speaks:
            say("error", what)
        raise SystemExit(code)

    def warn(message, *_, **__):
        if speaks and rank() == 0:
            say("warning", message)

    with warnings.catch_warnings():
        warnings.showwarning = warn
        try:
            yield
        except BrokenPipeError:  # whoever reads the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except FloatingPointError as error:
            fail(error, 1, speaks and rank() == 0)
        except ValueError as error:
            fail(error, 2, speaks and rank() == 0)
        except OSError as error:
            fail(in_words(error), 2)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                fail(error if str(error).startswith("out of memory") else "out of memory", 1)
            if not isinstance(error, dist.DistError) and not dist.is_initialized():
                raise
            lost = "lost the other processes of this run; the same command with --resume goes on"
            fail(f"rank {os.environ.get('RANK')}: {lost} ({str(error).splitlines()[0]})", 1)
        except KeyboardInterrupt as stop:
            where, number = stop.args or ("stopped", signal.SIGINT)
            if speaks and rank() == 0:
                print(f"\n{prog}: {where}", file=sys.stderr, flush=True)
            raise SystemExit(128 + number) from None


@contextlib.contextmanager
def deferred_signals():
    """SIGINT and SIGTERM inside wait: they are appended to the list that this yields.

    A second SIGINT does not wait, but under torchrun, which sends every signal on to its processes,
    often for the second time, and kills those that take too long.
    """
    received, before = [], {}

    def receive(number, frame):
        received.append(number)
        alone = not dist.is_torchelastic_launched()
        if alone and signal.SIGINT in before:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
        if len(received) == 1 and rank() == 0:
            words = "stopping after this step" + "; Ctrl-C stops at once" * alone
            print(f"\n{words}", file=sys.stderr, flush=True)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                before[number] = signal.signal(number, receive)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_out_of_memory(error):
    """Whether that is what an error says; not all that do are of torch's own class."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return bool(re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)))


@contextlib.contextmanager
def memory_advice(advice):
    """Out of memory inside is a MemoryError with what advice() says."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"out of memory {advice()}") from error
        raise


def choose_kernels(deterministic, tf32):
    """deterministic: torch is asked for kernels that repeat their bits; it warns where it has none.
    tf32: a GPU may compute in TensorFloat-32, which torch else allows for convolutions.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def keep_memory(keep=True):
    """glibc's malloc keeps the memory of freed tensors for the next ones, or gives it back.

    It gives large ones back of itself, and the system then clears the pages of the next one: on a
    CPU a step can take half as long again. Without effect where malloc is not glibc's.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        largest = 32 << 20  # up to here glibc raises its threshold of itself
        for parameter, kept, given_back in (
            (-1, -1, 2 * largest),  # M_TRIM_THRESHOLD: free bytes at the end of the heap
            (-3, largest, largest),  # M_MMAP_THRESHOLD: bytes from which on it maps pages ...
            (-4, 0, 65536),  # M_MMAP_MAX: ... and how often at most
        ):
            mallopt(parameter, kept if keep else given_back)


# ----------------------------------------------------------------------------------------------
# Device and fellow processes. torchrun says by environment variables who we are.


def pick_device(name):
    """auto, cpu, cuda or cuda:<n> -> torch.device. Under torchrun each process has a GPU.

    Raises ValueError if there is none.
    """
    local, processes = (
        int(os.environ.get(x, y)) for x, y in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if processes > 1 and name.startswith("cuda:"):
        raise ValueError(f"--device {name} and {processes} processes; wanted: cuda, for a GPU each")
    if name == "cuda" and processes > 1:
        if processes > torch.cuda.device_count():
            found = f"{processes} processes, {torch.cuda.device_count()} GPUs"
            raise ValueError(f"{found}; wanted: a GPU for each, or --device cpu")
        name = f"cuda:{local}"
    try:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise AssertionError
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r}; wanted: auto, cpu, cuda or cuda:<n>") from error


def is_first():
    """Whether no other process of this machine, under torchrun, comes before this one."""
    return not dist.is_torchelastic_launched() or os.environ["LOCAL_RANK"] == "0"


def join(device):
    """Under torchrun: this process works with the others on one run from now on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def share(runs):
    """The runs of this process. Under torchrun, all work on one; of several, each takes its own."""
    if not dist.is_torchelastic_launched():
        return runs
    if len(runs) > 1:
        return runs[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]
    join(pick_device(runs[0].device))
    return runs


def make_all(runs, make):
    """make(run) of those of this process. One that fails does not keep the others from being made.

    Raises SystemExit with the code of the first that failed, or at once if a signal stops it.
    """
    codes = []
    keep_memory()
    with plain_words():
        runs = share(runs)
    for run in runs:
        try:
            with plain_words():
                make(run)
        except SystemExit as exit_:
            codes.append(exit_.code)
            if exit_.code > 128:
                raise
    if codes:
        raise SystemExit(codes[0])
    if dist.is_initialized():  # after an error it might wait for processes that are gone
        dist.destroy_process_group()


@contextlib.contextmanager
def one_at_a_time():
    """Of the processes of a machine, such as those that fetch the same file."""
    if not dist.is_torchelastic_launched():
        yield
        return
    name = f"ipl-{os.getuid()}-{os.environ['TORCHELASTIC_RUN_ID']}.lock"
    with open(os.path.join(tempfile.gettempdir(), name), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def rank():
    """Which of the processes of one run this is; the one of rank 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def any_rank(flag):
    """Whether the flag is set in any process of the run."""
    if not dist.is_initialized():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    count = torch.tensor(int(flag), device=device)
    dist.all_reduce(count)
    return count.item() > 0
