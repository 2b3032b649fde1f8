"""`quantised.cpp`, compiled for this machine when it is first needed, and called.

vLLM's CPU build compiles as well (torch.compile), by the same compiler; a wheel with machine code of our own would be
one for each kind of machine. The library is kept in vLLM's cache folder, by what it was made of.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vllm_defensive.compat.base import get_logger
from vllm_defensive.platforms import COMPILER_FLAGS, compiler
from vllm_defensive_kernels.widths import CLASSES, PageShape

logger = get_logger("kv_eviction")

SOURCE = Path(__file__).with_name("quantised.cpp")
NUMBERS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# What the functions take, as quantised.cpp declares them.
_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_ATTEND = (_P, _P, _P, _L, _I, _I, _P, _P, _L, _P, _P, _L, _P, _P, _P, _P, _I, _I, _P, _P, _F, _F)
_PACK = (_P, _P, _L, _L, _P, _P, _P, _L, _P, _L, _I, _I, _I, _I)
FLAGS = (*COMPILER_FLAGS, "-O3", "-march=native", "-Wno-psabi")


class CompileError(RuntimeError):
    """The library could not be made; says why in a line."""


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The library for caches of this dtype. Raises CompileError."""
    compile_with = compiler()
    if compile_with is None:
        raise CompileError("no C++ compiler was found (g++, clang++, or the one that CXX names)")
    command = [compile_with, *FLAGS, f"-DNUMBERS={NUMBERS[dtype]}"]
    made_of = (SOURCE.read_bytes(), command, _version(compile_with), platform.machine(), _cpu())
    path = _folder() / f"quantised-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}.so"
    try:
        if not path.exists():
            logger.info("KV eviction compiles its functions for this machine, once: %s", path)
            _compile(command, path)
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(f"{path} cannot be written, or not be loaded ({error})") from None
    loaded.vllm_defensive_attend.argtypes, loaded.vllm_defensive_pack.argtypes = _ATTEND, _PACK
    return loaded


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Under a name of its own first: others may be at it too.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        done = subprocess.run([*command, str(SOURCE), "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            raise CompileError(f"{command[0]} failed: {lines[0] if lines else f'exit code {done.returncode}'}")
        partial.replace(path)


def _folder() -> Path:
    from vllm import envs

    return Path(envs.VLLM_CACHE_ROOT) / "vllm_defensive"


def _version(compile_with: str) -> str:
    return subprocess.run([compile_with, "--version"], capture_output=True, text=True).stdout


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@dataclass(frozen=True)
class ClassRows:
    """What sequences of one KV head each read, one after the other. R sequences, C classes of pages. All int32.

    query_start_R1: first query token of each, and behind them how many there are. table_LRP: pages in each layer:
    shared ones, those of each class, then growing ones. shared_pages_R, growth_tokens_R: pages that stay in place, and
    tokens behind the packed ones. class_pages_LRC, class_tokens_LRC: of each class. class_shape_C3: `class_shape`.
    """

    query_start_R1: Tensor
    table_LRP: Tensor
    shared_pages_R: Tensor
    growth_tokens_R: Tensor
    class_pages_LRC: Tensor
    class_tokens_LRC: Tensor
    class_shape_C3: Tensor

    def __post_init__(self) -> None:
        assert all(each.dtype == torch.int32 and each.is_contiguous() for each in vars(self).values())


def class_shape(classes: Sequence[tuple[str, int]]) -> Tensor:
    """Bits of keys, bits of values, and tokens of a page, int32 `[C, 3]`, of classes by name and tokens of a page."""
    return torch.tensor([[*_bits(name), tokens] for name, tokens in classes], dtype=torch.int32)


class Quantised:
    """The functions of the library, for one cache."""

    def __init__(self, data_PX: Tensor, page: PageShape, key_order_ND: Tensor, value_order_ND: Tensor) -> None:
        """data_PX: the buffer, a page a row, K before V. key_order_ND, value_order_ND: where in each half of a page its
        numbers lie. Raises CompileError."""
        assert page.head_size % 16 == 0, "as vLLM's CPU attention has it"
        self._library = library(data_PX.dtype)
        self._data, self._page = data_PX, page
        by_channel = torch.arange(page.rows * page.head_size).view(page.head_size, page.rows).T
        by_token = torch.arange(page.rows * page.head_size).view(page.rows, page.head_size)
        # vLLM's usual order is read as it lies; any other is put right page by page.
        usual = torch.equal(key_order_ND, by_channel) and torch.equal(value_order_ND, by_token)
        orders = (None if usual else order.int().contiguous() for order in (key_order_ND, value_order_ND))
        self._orders = tuple(orders)

    def attend(
        self,
        query_XGD: Tensor,
        out_XGD: Tensor,
        rows: ClassRows,
        layer: int,
        scale: float,
        cap: float = 0.0,
        void_RG: Tensor | None = None,
    ) -> None:
        """One layer's attention of sequences of one KV head each, into out_XGD; both contiguous, as the cache's dtype
        is. cap, void_RG (fp32, of each sequence's query heads): as in `formulas.window_attention`."""
        assert void_RG is None or (void_RG.dtype == torch.float32 and void_RG.is_contiguous())
        assert query_XGD.is_contiguous() and out_XGD.is_contiguous()
        assert query_XGD.dtype == out_XGD.dtype == self._data.dtype
        table_RP, (key_order, value_order) = rows.table_LRP[layer], self._orders
        self._library.vllm_defensive_attend(
            query_XGD.data_ptr(),
            out_XGD.data_ptr(),
            self._data.data_ptr(),
            self._page.page_bytes,
            self._page.rows,
            self._page.head_size,
            None if key_order is None else key_order.data_ptr(),
            None if value_order is None else value_order.data_ptr(),
            len(table_RP),
            rows.query_start_R1.data_ptr(),
            table_RP.data_ptr(),
            table_RP.stride(0),
            rows.shared_pages_R.data_ptr(),
            rows.class_pages_LRC[layer].data_ptr(),
            rows.class_tokens_LRC[layer].data_ptr(),
            rows.growth_tokens_R.data_ptr(),
            query_XGD.shape[1],
            len(rows.class_shape_C3),
            rows.class_shape_C3.data_ptr(),
            None if void_RG is None else void_RG.data_ptr(),
            scale,
            cap,
        )

    def pack(
        self, key_HTD: Tensor, value_HTD: Tensor, token_PN: Tensor, head_P: Tensor, target_P: Tensor, page_class: str
    ) -> None:
        """Write pages of a class. token_PN: int32, rows of key_HTD, -1 behind a page's last one; value_HTD has the last
        of these. head_P: int32. target_P: int64, pages of the buffer."""
        assert token_PN.dtype == head_P.dtype == torch.int32 and target_P.dtype == torch.int64
        assert key_HTD.dtype == value_HTD.dtype == self._data.dtype
        assert all(each.is_contiguous() for each in (key_HTD, value_HTD, token_PN, head_P, target_P))
        self._library.vllm_defensive_pack(
            key_HTD.data_ptr(),
            value_HTD.data_ptr(),
            key_HTD.shape[1],
            value_HTD.shape[1],
            token_PN.data_ptr(),
            head_P.data_ptr(),
            target_P.data_ptr(),
            len(token_PN),
            self._data.data_ptr(),
            self._page.page_bytes,
            self._page.head_size,
            *_bits(page_class),
            token_PN.shape[1],
        )


def _bits(page_class: str) -> tuple[int, int]:
    return CLASSES[page_class].key_bits, CLASSES[page_class].value_bits
