"""Device, precision, threads and compiler: what is chosen here comes with its reason."""

import ctypes
import os
import platform
import re

import torch
from torch import nn

from transformer_scratch.errors import BadInput, when_main_ends

# The type that autocast computes in, by --amp; None is float32 throughout.
AUTOCAST_TYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_device(accelerator: str, local_rank: int = 0) -> tuple[torch.device, str]:
    """-> the device, and why. Raises BadInput when it is not there, or cannot be used."""
    is_there = {  # asked only where it matters: CUDA answers by starting its driver
        "gpu": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    reason = "as asked"
    if accelerator == "auto":
        accelerator = next(name for name in is_there if is_there[name]())
        reason = "no GPU found" if accelerator == "cpu" else "found here"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if accelerator == "cpu" and visible:
            reason += f" with CUDA_VISIBLE_DEVICES={visible}"
    if not is_there[accelerator]():
        raise BadInput(
            f"--accelerator {accelerator}, but PyTorch finds none here; "
            "--accelerator cpu works everywhere"
        )
    if accelerator != "gpu":
        return torch.device(accelerator), reason
    if local_rank >= torch.cuda.device_count():
        raise BadInput(
            f"process {local_rank + 1} of this machine has no GPU of its own (found: "
            f"{torch.cuda.device_count()}); start fewer with --nproc-per-node, "
            "or give --accelerator cpu"
        )
    device = torch.device("cuda", local_rank)
    try:
        when_main_ends(torch.cuda.set_device, torch.cuda.current_device())
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, ValueError) as error:  # its driver is too old, another program has it
        raise BadInput(
            f"GPU {local_rank} cannot be used: {str(error).splitlines()[0]}; "
            "--accelerator cpu works everywhere"
        ) from None
    return device, reason


def choose_precision(amp: str, device: torch.device, dim: int) -> tuple[str, str]:
    """-> off, fp16 or bf16, and why."""
    has_bf16_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if amp == "fp16" and device.type == "cpu":
        return amp, "as asked; slow on a CPU, good for seeing the loss scaler work"
    if amp == "bf16" and device.type == "cpu" and not has_bf16_units:
        return amp, "as asked; this CPU has no units for it, so it is slower than float32"
    # Casting costs time, too: only matrices from this size on gain more by half precision.
    is_wide = dim >= 256
    # A GPU that computes bf16 has TF32 as well (compute capability 8 or more).
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    in_tf32 = "; it multiplies matrices in TF32, with 10 bits of mantissa instead of 23"
    if amp != "auto":
        return amp, "as asked" + (in_tf32 if amp == "off" and has_bf16 else "")
    if device.type == "cuda" and is_wide:
        if has_bf16:
            return "bf16", "this GPU computes it fast, and it needs no loss scaling"
        return "fp16", "this GPU has no fast bf16"
    if device.type == "cpu" and is_wide and has_bf16_units:
        return "bf16", "this CPU multiplies matrices in it (AMX or AVX-512 BF16)"
    return "off", "nothing to gain here from half precision" + (in_tf32 if has_bf16 else "")


def choose_threads(dim: int, batch_size: int) -> str:
    """Leave a small model to one thread. -> why there are so many.

    A second thread makes its steps little faster, and beside other programs two threads wait for
    each other: `python -m benchmarks.threads` measures both.

    Raises BadInput when OMP_NUM_THREADS is no such number: PyTorch would pass over it.
    """
    variable = os.environ.get("OMP_NUM_THREADS")
    if variable is not None:
        if not re.match(r"\s*[1-9]\d{0,8}\s*(,|$)", variable):  # it may hold a list
            raise BadInput(f"OMP_NUM_THREADS={variable!r} must be a number of threads, or unset")
        taken = variable.split(",")[0].strip() == str(torch.get_num_threads())
        return "OMP_NUM_THREADS" if taken else f"not the {variable} of OMP_NUM_THREADS"
    if dim**2 * batch_size > 64**2 * 128:  # the work of a step
        return "one a core; OMP_NUM_THREADS=1 leaves the others to other programs"
    when_main_ends(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)
    return "a model this small gains little from more"


def choose_kernels() -> None:
    """Choose among a GPU's kernels, until main ends.

    float32 matrices are multiplied in TF32: faster, with 10 bits of mantissa instead of 23. And
    attention leaves cuDNN alone, which makes a plan for every shape that it has not met before:
    batches, and the positions of decoding, come in dozens of shapes.
    """
    when_main_ends(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("high")
    when_main_ends(torch.backends.cuda.enable_cudnn_sdp, torch.backends.cuda.cudnn_sdp_enabled())
    torch.backends.cuda.enable_cudnn_sdp(False)


def keep_freed_memory() -> None:
    """Let the C library keep what one step frees for the next, until main ends.

    Taking memory anew costs a page fault every 4 KiB. Only glibc has the call; it affects the
    whole process, and only its use of memory.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # mallopt's parameters, in malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**26)
        # What glibc itself comes to, once it has met blocks of 2**25 bytes.
        when_main_ends(libc.malloc_trim, 0)
        when_main_ends(libc.mallopt, top_pad, 2**17)
        when_main_ends(libc.mallopt, trim_threshold, 2**26)


def compile_model(model: nn.Module) -> str:
    """Compile each block of encoder and decoder in place, if a compiler works. -> what was done.

    Blocks of a kind are alike, so two compilations serve all of them; the whole model in one piece
    would take many times as long.
    """
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=next(model.parameters()).device))
    except Exception as error:  # torch wraps a missing compiler in many types
        kind = type(error).__name__
        return f"no: no working compiler here ({kind}), so the model runs as it is written"
    for block in [*model.encoder, *model.decoder]:
        block.compile(dynamic=True)  # batches differ in length
    return "yes: torch.compile; the first step is slow"
