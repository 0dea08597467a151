"""The CUDA kernels: compiled on first use, launched, and wrapped as operators with derivatives.

NVRTC, which PyTorch brings along, compiles `kernels/*.cu` through the package cuda-core: no CUDA
toolkit and no host compiler are needed. Every combination of element type, factors, filter size or
activation is a small program of its own, compiled in some hundredths of a second and kept in the
user's cache directory.

The operators are `torch.ops.stylegan2_ops.upfirdn2d` and `.bias_act`. Call them through the
functions of the same names, which prepare their arguments.
"""

import ctypes
import functools
import hashlib
import math
import os
import tempfile
import warnings
from pathlib import Path

import torch

KERNELS = Path(__file__).parent / "kernels"
TYPES = {  # the names of kernels/scalar.cuh
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "half",
    torch.bfloat16: "bfloat16",
}
BLOCK = 256  # threads
INT_LIMIT = 2**30  # from here on the kernels count in 64 bits; leaves room for sums


# ----------------------------------------------------------------------------------------------
# Compiling


@torch.compiler.assume_constant_result
def usable(impl, device, dtype):
    """Whether the kernels can run on tensors of this torch.device and torch.dtype.

    If not: impl "cuda" raises RuntimeError with the reason, "auto" warns of it, once.
    """
    reason = obstacle(device, dtype)
    if reason is None:
        return True
    if impl == "cuda":
        raise RuntimeError(f'no CUDA kernel: {reason} (impl="ref" needs none)')
    _warn(f"no CUDA kernel, so PyTorch's own operations are used: {reason}")
    return False


@functools.cache
def _warn(message):
    warnings.warn(message, stacklevel=5)  # the caller of the public function


@functools.cache
def obstacle(device, dtype):
    """What keeps the kernels from such tensors, in one line, or None: found out by loading one."""
    if device.type != "cuda":
        return f"the tensor is on the {device.type}"
    if dtype not in TYPES:
        return f"there is none for {dtype}"
    try:
        macros = ("INT", "int"), ("PACK", 1), ("ACT", "LINEAR"), ("ORDER", 0)
        load("bias_act", (("T", TYPES[dtype]), *macros), architecture(device))
    except ImportError as error:  # not every torch brings cuda-bindings along
        major = (torch.version.cuda or "13").partition(".")[0]
        return f"{error}; wanted: pip install cuda-core 'cuda-bindings=={major}.*'"
    except Exception as error:  # any failure to build must leave the reference in working order
        return f"{type(error).__name__}: {' '.join(str(error).replace(chr(0), ' ').split())}"


@functools.cache
def architecture(device):
    """Such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def load(name, macros, arch):
    """The cuda.core.Kernel of `kernels/<name>.cu` with the macros ((name, value), ...)."""
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(cubin(source(name, macros), arch)).get_kernel(name)


def source(name, macros):
    """The program text of a kernel."""
    defines = "".join(f"#define {macro} {value}\n" for macro, value in macros)
    return (KERNELS / "scalar.cuh").read_text() + defines + (KERNELS / f"{name}.cu").read_text()


def cubin(text, arch):
    """Machine code for the program text, from the cache if it is there.

    The cache is $XDG_CACHE_HOME/stylegan2_ops, or ~/.cache/stylegan2_ops. A file is the SHA-256 of
    the code and then the code, so that a damaged one is noticed, and compiled anew. A cache that
    cannot be written is no error.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    key = hashlib.sha256(f"{arch} {torch.version.cuda}\n{text}".encode()).hexdigest()
    path = cache / "stylegan2_ops" / f"{key}.cubin"
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            return content[32:]
    except OSError:
        pass
    code = compile_cubin(text, arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            whole = Path(aside) / path.name
            whole.write_bytes(hashlib.sha256(code).digest() + code)
            whole.replace(path)
    except OSError:
        pass
    return code


def compile_cubin(text, arch):
    """Machine code for the program text, from NVRTC. Needs no GPU."""
    from cuda.core import Program, ProgramOptions

    return Program(text, "c++", ProgramOptions(arch=arch, std="c++17")).compile("cubin").code


# ----------------------------------------------------------------------------------------------
# Launching


def launch(name, y, macros, count, threads, pointers, integers, reals):
    """Start a kernel with output y and `threads` threads on the current stream of its device.

    Kernels take pointers (here tensors, or None), then INTs, then Reals. `count` is the largest
    number that an INT has to hold.
    """
    wide = count >= INT_LIMIT
    integer = ctypes.c_int64 if wide else ctypes.c_int32
    real = ctypes.c_double if y.dtype == torch.float64 else ctypes.c_float
    arguments = [
        *(0 if tensor is None else tensor.data_ptr() for tensor in pointers),
        *map(integer, integers),
        *map(real, reals),
    ]
    macros = (("T", TYPES[y.dtype]), ("INT", "long long" if wide else "int"), *macros.items())
    start(name, macros, y.device, -(-threads // BLOCK), arguments)


def start(name, macros, device, blocks, arguments):
    """Hand a kernel and its arguments, in the form that cuda.core takes, to the GPU."""
    import cuda.core

    kernel = load(name, macros, architecture(device))
    config = cuda.core.LaunchConfig(grid=blocks, block=BLOCK)
    with torch.cuda.device(device):
        # A new thread, such as autograd's, has no context before PyTorch's own first kernel in it.
        cuda.core.Device(device.index).set_current()
        stream = _stream(torch.cuda.current_stream().cuda_stream)
        cuda.core.launch(stream, config, kernel, *arguments)


@functools.cache
def _stream(handle):
    import cuda.core

    return cuda.core.Stream.from_handle(handle)


def operator(arguments):
    """Makes a function of CUDA tensors, which returns a tensor, `torch.ops.stylegan2_ops.<name>`.

    The arguments' types are spelled out: torch 2.6 cannot read `list[int]` off a signature.
    """

    def wrap(function):
        name, schema = f"stylegan2_ops::{function.__name__}", f"{arguments} -> Tensor"
        return torch.library.custom_op(
            name, function, mutates_args=(), device_types="cuda", schema=schema
        )

    return wrap


# ----------------------------------------------------------------------------------------------
# upfirdn2d


@operator("(Tensor x, Tensor f, int[] up, int[] down, int[] padding, bool flip, float gain)")
def upfirdn2d(x, f, up, down, padding, flip, gain):
    """The operation for a filter f [fh, fw], float64 if x is and else float32.

    x: [B, C, H, W], of any strides. up, down: [x, y]. padding: [x0, x1, y0, y1]. The result is
    channels_last if x is, else contiguous.
    """
    y = upfirdn2d_output(x, f, up, down, padding, flip, gain)
    if y.numel() == 0:
        return y
    (up_x, up_y), (down_x, down_y), (pad_x, _, pad_y, _) = up, down, padding
    batch, channels, height, width = y.shape
    rows = (3 + up_y) // up_y * up_y  # at least 4, and a multiple of up_y
    macros = dict(
        CHANNELS_LAST=int(not y.is_contiguous()), ROWS=rows,
        UP_X=up_x, UP_Y=up_y, DOWN_X=down_x, DOWN_Y=down_y,
        PHASE_X=pad_x % up_x, PHASE_Y=pad_y % up_y, TAPS_X=f.shape[1], TAPS_Y=f.shape[0],
    )
    extent = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    count = max(extent, y.numel(), height * down_y, width * down_x)
    threads = batch * channels * -(-height // rows) * width
    integers = [
        threads, channels, *x.shape[2:], height, width, -(pad_y // up_y), -(pad_x // up_x),
        *x.stride(), *y.stride(), flip,
    ]
    launch("upfirdn2d", y, macros, count, threads, [x, f.contiguous(), y], integers, [gain])
    return y


@upfirdn2d.register_fake
def upfirdn2d_output(x, f, up, down, padding, flip, gain):
    """The result, not yet filled."""
    batch, channels, height, width = x.shape
    (up_x, up_y), (down_x, down_y), (x0, x1, y0, y1) = up, down, padding
    height = (height * up_y + y0 + y1 - f.shape[0]) // down_y + 1
    width = (width * up_x + x0 + x1 - f.shape[1]) // down_x + 1
    if height < 1 or width < 1:
        raise RuntimeError(f"filter {tuple(f.shape)} is larger than the padded image")
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(
        (batch, channels, height, width), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _upfirdn2d_setup(ctx, inputs, output):
    x, f, *ctx.options = inputs
    ctx.save_for_backward(f)
    ctx.size, ctx.output_size = x.shape[2:], output.shape[2:]


def _upfirdn2d_backward(ctx, g):
    """The transposed operation: factors change places, the filter turns round, and the padding
    is what brings the first and the last pixel back to their places.
    """
    (f,) = ctx.saved_tensors
    up, down, (x0, _, y0, _), flip, gain = ctx.options
    (height, width), (g_height, g_width) = ctx.size, ctx.output_size
    padding = [
        f.shape[1] - 1 - x0, (width - 1) * up[0] + 1 - g_width * down[0] + x0,
        f.shape[0] - 1 - y0, (height - 1) * up[1] + 1 - g_height * down[1] + y0,
    ]
    g = upfirdn2d(g, f, down, up, padding, not flip, gain)
    return g, None, None, None, None, None, None


upfirdn2d.register_autograd(_upfirdn2d_backward, setup_context=_upfirdn2d_setup)


# ----------------------------------------------------------------------------------------------
# bias_act

STRAIGHT = ("linear", "relu", "lrelu")  # no second derivative


@operator(
    "(Tensor x, Tensor? b, Tensor? g, Tensor? v,"
    " int dim, str act, float alpha, float gain, float clamp)"
)
def bias_act(x, b, g, v, dim, act, alpha, gain, clamp):
    """The operation y(x + b), or with g its derivative g y', or with g and v too g v y''.

    x, g and v: of one shape and type. b: [x.shape[dim]], or None. clamp: math.inf for none. The
    result has the strides of x, if that has neither gaps nor overlaps.
    """
    y = bias_act_output(x, b, g, v, dim, act, alpha, gain, clamp)
    if y.numel() == 0:
        return y
    x, g, v = (
        t if t is None or t.stride() == y.stride() else torch.empty_like(y).copy_(t)
        for t in (x, g, v)
    )
    step, channels = 1, 1
    if b is not None and len(b) > 1:
        b, step, channels = b.contiguous(), x.stride(dim), len(b)
    pack, count = 16 // y.element_size(), y.numel()
    if count % pack or any(t is not None and t.data_ptr() % 16 for t in (x, g, v, y)):
        pack = 1
    order = (g is not None) + (v is not None)
    macros = dict(PACK=pack, ACT=act.upper(), ORDER=order)
    integers, reals = [count, step, channels], [alpha, gain, clamp]
    launch("bias_act", y, macros, count, count // pack, [x, b, g, v, y], integers, reals)
    return y


@bias_act.register_fake
def bias_act_output(x, b, g, v, dim, act, alpha, gain, clamp):
    """The result, not yet filled."""
    return torch.empty_like(x)


def _bias_act_setup(ctx, inputs, output):
    x, b, g, v, *ctx.options = inputs
    dim, ctx.act, alpha, gain, clamp = ctx.options
    ctx.b_shape = [1] * x.ndim
    if b is not None:
        ctx.b_shape[dim] = len(b)
    if g is None and ctx.act in STRAIGHT and alpha >= 0 and gain > 0 and clamp == math.inf:
        x, b = output, None  # which has the sign of x + b, and is in memory anyway
    ctx.save_for_backward(x, b, g, v)


def _bias_act_backward(ctx, c):
    x, b, *factors = ctx.saved_tensors
    factors = [factor for factor in factors if factor is not None]

    def derivative(*factors):
        return bias_act(x, b, *factors, *[None] * (2 - len(factors)), *ctx.options)

    grads = [None] * 4
    if any(ctx.needs_input_grad[:2]) and not (factors and ctx.act in STRAIGHT):
        if len(factors) == 2:
            raise NotImplementedError('bias_act has no third derivative; impl="ref" has')
        grads[0] = derivative(*factors, c)
        if ctx.needs_input_grad[1]:
            grads[1] = grads[0].sum_to_size(ctx.b_shape).reshape(-1)
    if ctx.needs_input_grad[2]:
        grads[2] = derivative(c, *factors[1:])
    if ctx.needs_input_grad[3]:
        grads[3] = derivative(factors[0], c)
    return *grads, None, None, None, None, None


bias_act.register_autograd(_bias_act_backward, setup_context=_bias_act_setup)
