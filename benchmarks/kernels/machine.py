"""The machine: what it is, what it can do at most, and how long a call takes on it."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU: a kernel must not find its input there
MIN_REPEATS, MAX_REPEATS, SECONDS = 10, 200, 0.5


def driver() -> str:
    """Version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()


@dataclass(frozen=True)
class Machine:
    """Names and versions, for the report's head."""

    device: str
    driver: str
    cuda: str
    torch: str
    triton: str
    python: str
    command: str

    @classmethod
    def here(cls, device: str) -> Machine:
        import triton

        name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, Triton's interpreter"
        command = f"python -m benchmarks.kernels {' '.join(sys.argv[1:])}".strip()
        versions = (torch.version.cuda, torch.__version__, triton.__version__, platform.python_version())
        cuda, own_torch, own_triton, python = map(str, versions)
        return cls(name, driver() if device == "cuda" else "-", cuda, own_torch, own_triton, python, command)

    def rows(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Limits:
    """Measured, not from a data sheet. copy: bytes read plus bytes written a second. matmul: bf16 flops a second."""

    copy: float
    matmul: float

    @classmethod
    def measure(cls) -> Limits:
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = 2 * source.numel() / median_seconds(lambda: target.copy_(source), "cuda")
        a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        b = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        return cls(copy, 2 * 8192**3 / median_seconds(lambda: a @ b, "cuda"))


def median_seconds(call: Callable[[], object], device: str) -> float:
    """Median time of a call on the device, with a cold L2 cache; on the CPU one call, only to show that it runs."""
    if device != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    call()  # compiles
    torch.cuda.synchronize()
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    begin = time.perf_counter()
    while len(pairs) < MIN_REPEATS or (len(pairs) < MAX_REPEATS and time.perf_counter() - begin < SECONDS):
        # Flushing takes longer than launching, so that the call is queued before the device gets to it: what is
        # measured is the device's time, not Python's.
        for _ in range(4):
            flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        pairs.append((start, stop))
        stop.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in pairs) / 1000
