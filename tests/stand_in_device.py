"""A stand-in for a GPU, for machines without one: it computes on the CPU and watches as it does.

    python tests/stand_in_device.py "train.py --amp bf16" "evaluate.py --beam 5" "-m benchmarks.x"

runs each command with the stand-in in the place of the GPU; the last line is a JSON list with what
was counted during each of them:

waits: how often the host would have waited for the device, by the line of the project.
operations: the kernels that the device would have been given, by name; views are none.

As on a GPU, tensors of two devices are refused. What the stand-in cannot show is time, memory, the
rounding of a GPU's kernels, and whether memory that is sent aside was pinned.

It registers a device for the whole process, and that cannot be undone: hence a process of its own.
"""

import json
import linecache
import runpy
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

PROJECT = Path(__file__).resolve().parent.parent
NAME = "stand_in"
aten = torch.ops.aten

# Their results have a size, or a value, that the host must know before it can go on.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
# Memory that no kernel fills, or another view of it.
NO_KERNEL = {
    "_local_scalar_dense",
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
}

waits: Counter = Counter()
operations: Counter = Counter()


class DeviceTensor(Tensor):
    """A tensor on the stand-in. `value` is the CPU tensor that holds its numbers."""

    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor) -> "DeviceTensor":
        with torch.inference_mode(False):  # a view of a parameter must be a tensor like it
            tensor = Tensor._make_wrapper_subclass(
                cls,
                value.size(),
                strides=value.stride(),
                storage_offset=value.storage_offset(),
                dtype=value.dtype,
                device=torch.device(NAME, 0),
            )
        tensor.value = value
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), options=None):
        return compute(operation, arguments, options or {})

    # With these two a model's parameters are swapped in place when it moves, as on a GPU.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["value"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: None, size, stride):
        return DeviceTensor(parts["value"])

    # What Python asks of a tensor without an operation of PyTorch's.
    def tolist(self) -> object:
        return read(self).tolist()

    def __repr__(self, **options: object) -> str:
        return repr(read(self))

    def __format__(self, form: str) -> str:
        return format(read(self), form)


class StandIn(TorchDispatchMode):
    """While this is active, tensors can be made on the stand-in: torch.zeros(3, device=...)."""

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        return compute(operation, arguments, options or {})


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, list | tuple | dict):
        return [tensor for part in parts for tensor in tensors_in(part)]
    return []


def with_tensors(value: object, kind: type, change: Callable[[Tensor], Tensor]) -> object:
    """The value with all tensors of a kind changed, in lists, tuples and dicts too."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: with_tensors(part, kind, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_tensors(part, kind, change) for part in value)
    return value


@cache
def aliases(operation) -> bool:
    """Whether the result is, or looks into, the memory of an argument."""
    return any(output.alias_info for output in operation._schema.returns)


def compute(operation, arguments: tuple, options: dict) -> object:
    """Carry out one operation of PyTorch on the CPU, and note what it would mean on a GPU."""
    tensors = tensors_in((arguments, options))
    on_device = [isinstance(tensor, DeviceTensor) for tensor in tensors]
    name, device = operation._opname, options.get("device")
    if device is not None:
        to_device = torch.device(device).type == NAME
    else:
        to_device = on_device[0] if name == "copy_" else any(on_device)

    # In inference mode operations that consist of others come whole.
    here = to_device or any(on_device)
    if torch.is_inference_mode_enabled() and here and operation._can_decompose():
        if operation is aten.scaled_dot_product_attention.default:
            return attention(*arguments, **options)
        with StandIn():
            return operation.decompose(*arguments, **options)
    if device is not None:
        options = {**options, "device": torch.device("cpu")}

    if name in ("copy_", "_to_copy"):
        from_device, source = on_device[-1], tensors[-1]
        # Only contiguous memory can be sent while the host goes on.
        sent_aside = source.is_contiguous() and (
            options.get("non_blocking") or (name == "copy_" and arguments[2:] == (True,))
        )
        if (from_device and not to_device) or (to_device and not from_device and not sent_aside):
            count_wait()
    elif any(on_device):
        others = [t for t, ours in zip(tensors, on_device, strict=True) if not ours and t.dim()]
        if others:
            raise RuntimeError(
                f"{operation}: expected all tensors on one device, "
                f"found {tuple(others[0].shape)} on the CPU"
            )
        by_mask = name.startswith("index") and any(t.dtype == torch.bool for t in tensors[1:])
        if name in READS or by_mask:
            count_wait()

    values, named = with_tensors((arguments, options), DeviceTensor, lambda t: t.value)
    result = operation(*values, **named)
    if not to_device:
        return result
    is_view = aliases(operation) and not operation._schema.is_mutable
    if not is_view and name not in NO_KERNEL:
        operations[name] += 1
    result = with_tensors(result, Tensor, DeviceTensor)
    if not aliases(operation):
        return result
    return return_and_correct_aliasing(operation, arguments, options, result)


def read(tensor: DeviceTensor) -> Tensor:
    count_wait()
    return tensor.detach().value


def count_wait() -> None:
    """Count a wait of the host for the device, under the line of the project that causes it."""
    frame = sys._getframe()
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        installed = file.is_relative_to(sys.prefix)  # a .venv lies in the project
        if file.is_relative_to(PROJECT) and not installed and file != Path(__file__).resolve():
            line = linecache.getline(str(file), frame.f_lineno).partition("  #")[0].strip()
            waits[f"{file.name}: {line}"] += 1
            return
        frame = frame.f_back
    waits["outside of the project"] += 1


# ------------------------------------------------------------------- What PyTorch asks of a device


class Module:
    """torch.stand_in, the counterpart of torch.cuda. Its random numbers are the CPU's."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_rng_state(device: object = None) -> Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
    """The kernel that scaled_dot_product_attention takes on a CPU: the bits are the same."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
            ~attn_mask, -torch.inf
        )
    if dropout_p > 0:  # as in nn.Transformer; that kernel has none
        formula = aten._scaled_dot_product_attention_math.default
        return formula(query, key, value, attn_mask, dropout_p, is_causal)[0]
    kernel = aten._scaled_dot_product_flash_attention_for_cpu.default
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask)[0]


# What autocast does on every device, as far as a Transformer needs it.
IN_HALF_PRECISION = ("linear", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention")
IN_FLOAT32 = ("cross_entropy_loss", "log_softmax.int", "softmax.int", "layer_norm")


def under_autocast(operation, half: bool):
    """The operation as autocast runs it: its arguments are cast first."""

    def run(*arguments, **options):
        dtype = torch.get_autocast_dtype(NAME) if half else torch.float32
        autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            arguments, options = with_tensors(
                (arguments, options),
                Tensor,
                lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor,
            )
            return operation(*arguments, **options)

    return run


def register() -> list[torch.library.Library]:
    """Make the device known. -> what must be kept for as long as it is used."""
    _setup_privateuseone_for_python_backend(NAME, Module())
    # torch.tensor(3, device=...) then copies from the CPU in an operation that is seen.
    torch._C._set_only_lift_cpu_tensors(True)
    # Otherwise clipping would take the tensors one by one.
    _foreach_supported_types.append(DeviceTensor)
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")
    for name in IN_HALF_PRECISION + IN_FLOAT32:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet), overload or "default")
        cast_first = under_autocast(operation, name in IN_HALF_PRECISION)
        library.impl(operation, cast_first, "AutocastPrivateUse1")
    return [others, library]


# ------------------------------------------------------------------------------ Running on it


def main(commands: list[str]) -> None:
    sys.path.insert(0, str(PROJECT))
    import evaluate
    import train
    from transformer_scratch import config, hardware

    kept = register()
    device = torch.device(NAME, 0)
    for module in (train, evaluate, config, hardware):
        module.choose_device = lambda *arguments: (device, "a stand-in for a GPU")
    counted = []
    with StandIn():
        for command in commands:
            waits.clear()
            operations.clear()
            name, *arguments = shlex.split(command)
            if name in ("train.py", "evaluate.py"):
                {"train.py": train, "evaluate.py": evaluate}[name].main(arguments)
            else:
                sys.argv = arguments
                runpy.run_module(arguments[0], run_name="__main__")
            counted.append({"waits": dict(waits), "operations": dict(operations)})
    print(json.dumps(counted))
    del kept


if __name__ == "__main__":
    main(sys.argv[1:])
