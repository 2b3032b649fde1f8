"""Let this process believe that it has an NVIDIA GPU: vLLM's CUDA code runs, on the CPU and on CPU memory.

Import it before vLLM, then call `finish()`. From then on a tensor "on cuda" is an ordinary one, Triton kernels run in
Triton's interpreter, streams and events do nothing, and the compiled operations that a small Llama needs are written in
torch (`operations.py`), FlashAttention's too, and graphs compute anew what they would replay (`graphs.py`). So what
can be seen is whether the right things are computed, and in which order they are asked for; nothing can be seen of
speed, of two streams, of compiled code, or of a forgotten copy between host and device.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from typing import Any

for name, value in {
    "TRITON_INTERPRET": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DEFENSIVE_INTERNAL_POLICIES": "1",  # keep-all and random-uneven
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ[name] = value

import torch  # noqa: E402
import torch._dynamo  # noqa: E402  # it walks over torch.cuda's functions: let it see the real ones
import torch.distributed.tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

NAME = "NVIDIA H200"
CAPABILITY = tuple(int(x) for x in os.environ.get("PRETEND_CAPABILITY", "9.0").split("."))
TOTAL_MEMORY = 2 << 30


# -- the driver -------------------------------------------------------------------------------------------------------


def _driver() -> types.ModuleType:
    """What vLLM asks NVML, through its own copy of the bindings."""

    class NVMLError(Exception):
        """Never raised."""

    answers = {
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "gpu",
        "nvmlDeviceGetHandleByUUID": "gpu",
        "nvmlDeviceGetIndex": 0,
        "nvmlDeviceGetCudaComputeCapability": CAPABILITY,
        "nvmlDeviceGetName": NAME,
        "nvmlDeviceGetUUID": "GPU-0",
        "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=TOTAL_MEMORY, free=TOTAL_MEMORY, used=0),
        "nvmlSystemGetDriverVersion": "580.0",
        "nvmlSystemGetCudaDriverVersion": 13000,
    }
    module = types.ModuleType("vllm.third_party.pynvml")
    module.NVMLError = NVMLError
    for name in ("nvmlInit", "nvmlShutdown"):
        setattr(module, name, constant(None))
    for name, answer in answers.items():
        setattr(module, name, constant(answer))
    return module


def constant(value: Any) -> Any:
    """A function that returns `value`; a new object each time, because dynamo keeps a table by identity."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        return value

    return answer


# -- streams, events, memory, devices ---------------------------------------------------------------------------------


class Quiet:
    """A stream, event or graph: every method returns at once."""

    cuda_stream = stream_id = device_index = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Quiet) -> float:
        return 1.0  # milliseconds

    def record_event(self, event: Quiet | None = None) -> Quiet:
        return event or Quiet()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return constant(None)


_STREAM = Quiet()
_PROPERTIES = types.SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=TOTAL_MEMORY,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_multiprocessor=233472,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    is_integrated=False,
    gcnArchName="",
    uuid="0",
)
_ANSWERS: dict[Any, dict[str, Any]] = {
    torch.cuda: {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": CAPABILITY,
        "get_device_name": NAME,
        "get_device_properties": _PROPERTIES,
        "mem_get_info": (TOTAL_MEMORY, TOTAL_MEMORY),
        "memory_stats": {},
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "current_stream": _STREAM,
        "default_stream": _STREAM,
        "stream": contextlib.nullcontext(),
        "device": contextlib.nullcontext(),
        "is_current_stream_capturing": False,
        "can_device_access_peer": True,
        "get_allocator_backend": "native",
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": [],
        "current_blas_handle": 0,
        **dict.fromkeys(
            [
                "init", "_lazy_init", "set_device", "set_stream", "synchronize", "empty_cache", "manual_seed",
                "manual_seed_all", "set_rng_state", "set_rng_state_all", "reset_peak_memory_stats",
            ]
        ),
    },
    torch.cuda.memory: {"get_allocator_backend": "native"},
    torch.cuda.random: {"manual_seed_all": None},
    torch.accelerator: {
        "is_available": True,
        "device_count": 1,
        "current_accelerator": torch.device("cuda"),
        "current_device_index": 0,
        "current_stream": _STREAM,
        "get_memory_info": (TOTAL_MEMORY, TOTAL_MEMORY),
        "memory_stats": {"allocated_bytes.all.peak": 0},
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        **dict.fromkeys(
            ["set_device_index", "set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats",
             "empty_host_cache"]
        ),
    },
    torch.Tensor: {"is_pinned": True, "record_stream": None},
}  # fmt: skip


class _OnCPU(TorchFunctionMode):
    """Every call that names the GPU as a device gets the CPU; pinned memory is ordinary memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu(kwargs["device"], integers=True)
        return func(*(_cpu(arg) for arg in args), **kwargs)


def _cpu(value: Any, integers: bool = False) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    if isinstance(value, str):
        return "cpu" if value.partition(":")[0] == "cuda" else value
    return "cpu" if integers and isinstance(value, int) else value


class _AnyGenerator(type(torch.Generator)):
    def __call__(cls, device: Any = "cpu", **kwargs: Any) -> Any:
        return _GENERATOR(device=_cpu(device))

    def __instancecheck__(cls, instance: Any) -> bool:
        return type(instance) is _GENERATOR


_GENERATOR = torch.Generator


def _start() -> None:
    for owner, answers in _ANSWERS.items():
        for name, value in answers.items():
            setattr(owner, name, constant(value))
    for name in ("Stream", "ExternalStream", "Event"):
        setattr(torch.cuda, name, type(name, (Quiet,), {}))
    torch.Event = torch.cuda.Event
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    with contextlib.suppress(TypeError):
        torch.Generator = _AnyGenerator("Generator", (_GENERATOR,), {})
    _OnCPU().__enter__()  # for the life of the process


def finish() -> None:
    """The rest, which needs vLLM: call it before anything else of vLLM's is imported."""
    from vllm.platforms import current_platform

    for cls in type(current_platform).__mro__:  # first, for vLLM's own operations register under this key
        if "dispatch_key" in vars(cls):
            cls.dispatch_key = "CPU"
        if "dist_backend" in vars(cls):
            cls.dist_backend = "gloo"

    import vllm.v1.sample.ops.topk_topp_sampler as sampler
    import vllm.v1.worker.gpu_worker as gpu_worker

    gpu_worker.kernel_warmup = constant(None)  # it tunes kernels of models that are not there
    sampler.HAS_TRITON = False  # its Triton kernel takes seconds a step in the interpreter
    operations.finish()
    graphs.install()

    from vllm_defensive_kernels import decode

    decode.choose_splits = constant(2)  # the interpreter starts a program in milliseconds; two still have to be merged


from tests.cuda import graphs, operations  # noqa: E402

operations.install()
_start()

import vllm.third_party  # noqa: E402  # the parents of the module that comes next

sys.modules["vllm.third_party.pynvml"] = vllm.third_party.pynvml = _driver()
