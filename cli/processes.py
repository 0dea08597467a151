"""The process of a run: its signals, its memory and threads, its device, its fellow processes."""

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import ipl
from cli.messages import is_out_of_memory, plain_words

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # that save and stop

# ----------------------------------------------------------------------------------------------
# Signals


@contextlib.contextmanager
def ends_cleanly():
    """SIGTERM and SIGHUP inside, unless something hears them already, are a KeyboardInterrupt: they
    leave no half written file."""

    def stop(number, frame):
        raise KeyboardInterrupt("stopped", number)

    heard = [signal.SIGTERM, signal.SIGHUP]
    if threading.current_thread() is not threading.main_thread():
        heard = []
    heard = [number for number in heard if signal.getsignal(number) == signal.SIG_DFL]
    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def deferred_signals():
    """SIGNALS inside wait: they are appended to the list that this yields.

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
        for number in SIGNALS:
            if threading.current_thread() is not threading.main_thread():
                break  # which alone may have handlers
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                before[number] = signal.signal(number, receive)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------
# Memory and kernels


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


def warn_of_emulation(settings, device):
    """Half precision on a CPU that has none: a product of matrices takes longer than in float32."""
    if settings.autocast == "none" or device.type != "cpu":
        return
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[settings.half]
    best = {}
    for dtype in (torch.float32, half):
        x, best[dtype] = torch.ones(256, 256, dtype=dtype), float("inf")
        for _ in range(5):
            start = time.perf_counter()
            x @ x
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    if (times := best[half] / best[torch.float32]) > 1.5:
        name = str(half).removeprefix("torch.")
        warnings.warn(
            f"this CPU emulates {name}, {times:.0f} times as slow as float32; wanted: "
            "--autocast none",
            stacklevel=2,
        )


def fit_threads(cgroup="/sys/fs/cgroup"):
    """torch takes as many threads as there are cores; those of a container that may use the time of
    fewer would wait for each other. OMP_NUM_THREADS has the last word."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # there is no quota
            words = [Path(cgroup, name).read_text() for name in names]
            quota, period = map(int, " ".join(words).split())
            if 0 < quota < period * torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, quota // period))


def keep_memory(keep=True):
    """glibc's malloc keeps the memory of freed tensors for the next ones, or gives it back.

    It gives large ones back of itself, and the system then clears the pages of the next one: on a
    CPU a step can take half as long again. The price is a process that stays as large as it was at
    its peak. Without effect where malloc is not glibc's. The main command and AIR call this for the
    miniature, which is small, and for others if asked.
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
    there, processes = torch.cuda.device_count(), 1
    if dist.is_torchelastic_launched():
        processes = int(os.environ["LOCAL_WORLD_SIZE"])
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"no device {name!r}; wanted: auto, cpu, cuda or cuda:<n>")
    if name == "cpu":
        return torch.device("cpu")
    if processes > 1:
        if name != "cuda":
            found = f"--device {name} and {processes} processes"
            raise ValueError(f"{found}; wanted: cuda, for a GPU each")
        if processes > there:
            found = f"{processes} processes, {there} GPUs"
            raise ValueError(f"{found}; wanted: a GPU for each, or --device cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        x = torch.zeros(1, device=name)  # by a kernel, which an old GPU, or a busy one, refuses
        x.item()
        return x.device
    except (RuntimeError, AssertionError) as error:
        sees = f"{there} GPUs" if there else "no GPU"
        found = f"--device {name}: torch {torch.__version__} sees {sees}"
        why = f" ({str(error).splitlines()[0]:.120})" * bool(there)
        raise ValueError(f"{found}{why}; wanted: auto, cpu, cuda or cuda:<n>") from error


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
    with plain_words():
        runs = share(runs)
    for run in runs:
        try:
            with plain_words():
                make(run)
        except SystemExit as exit_:
            codes.append(exit_.code)
            if exit_.code > 128:
                codes = codes[-1:]
                break
    if dist.is_initialized():
        if not codes:  # after an error it might wait for processes that are gone
            dist.barrier()  # without which gloo can wait for itself, in torch before 2.8
            dist.destroy_process_group()
        leave(codes[0] if codes else 0)
    if codes:
        raise SystemExit(codes[0])


def leave(code=0):
    """Ends this process, one of several that worked on one run, without Python's own end.

    There, a thread of gloo that still frees a tensor and asks for Python's lock would be ended in
    the midst of C++, and that aborts the process: now and then a finished run would have failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
    return ipl.ranks()[0]


def any_rank(flag):
    """Whether the flag is set in any process of the run."""
    if not dist.is_initialized():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    count = torch.tensor(int(flag), device=device)
    dist.all_reduce(count)
    return count.item() > 0
