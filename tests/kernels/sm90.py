"""Compiles what the wrappers launch for Hopper, without a GPU, and reports what the machine code uses.

    python -m tests.kernels.sm90 [--all | --sizes] [PART]     one JSON object a kernel; PART of a variant's name

The wrappers themselves are called, with the shapes of real models, so that specialisation (alignment of pointers and
strides, constants) is what a GPU would see; only the launch is left out. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vllm_defensive_kernels import (
    PackedSource,
    PackedState,
    PagedKV,
    RaggedTokens,
    Rotation,
    addressing,
    compact,
    compact_quantised,
    learned_page_scores,
    learned_scores,
    list_kept,
    ragged_paged_decode,
    reconstruction_scores,
    value_norm,
    window_scores,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn


class HopperOnPaper:
    """The part of Triton's driver that compilation asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def capture() -> list[tuple[str, Any]]:
    """Make every launch of this process compile only; returns the list that (kernel name, compiled kernel) go to."""
    assert not addressing.INTERPRETED, "unset TRITON_INTERPRET: interpreted kernels are not compiled"
    triton.runtime.driver.set_active(HopperOnPaper())
    addressing.INTERPRETED = True  # the wrappers then take the kernel's path on the CPU; kernels are decorated already
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__.strip("_"), kernel))
        return kernel

    JITFunction.run = compile_only
    return compiled


def int32(*shape: int) -> torch.Tensor:
    """Zeros; only shape, stride and alignment matter here."""
    return torch.zeros(*shape, dtype=torch.int32)


def cache(dtype: torch.dtype, heads: int, page_tokens: int, head_size: int) -> PagedKV:
    """Two layers of vLLM's CUDA layout."""
    return PagedKV.from_layers(list(torch.zeros(2, 9, heads, page_tokens, 2 * head_size).to(dtype)))


def tokens_apart(pages: PagedKV, dtype: torch.dtype) -> PagedKV:
    """The same in the layout that has the heads inside the tokens: rows of a page do not follow one another."""
    heads, tokens, size = pages.num_kv_heads, pages.page_tokens, pages.head_size
    return PagedKV.from_layers(list(torch.zeros(2, 9, tokens, heads, 2 * size).to(dtype).transpose(2, 3)))


def decode(
    dtype: torch.dtype, group: int, page_tokens: int, head_size: int, kv: torch.dtype, queries: int, heads: int = 8,
    classes: tuple[str, ...] = (), apart: bool = False, cap: float = 0.0, void: bool = False,
) -> None:  # fmt: skip
    """classes: beside 16. void: with logits of nothing."""
    pages = cache(kv, heads, page_tokens, head_size)
    pages = tokens_apart(pages, kv) if apart else pages
    query = torch.zeros(4 * queries, heads * group, head_size, dtype=dtype)
    rows = int32(4, 64), int32(5), int32(4), int32(4)
    state = PackedState.empty(4, 16, 2, heads, "cpu", ("16", *classes))
    softmax = {"cap": cap, "void_Q": torch.zeros(heads * group, dtype=dtype) if void else None}
    ragged_paged_decode(query, pages, 1, *rows, state, max_query_len=queries, **softmax)


def window(
    dtype: torch.dtype, group: int, page_tokens: int, head_size: int, kv: torch.dtype, heads: int = 8, **options: Any
) -> None:
    pages, tokens = cache(kv, heads, page_tokens, head_size), RaggedTokens.of([options.pop("count", 9000)], "cpu")
    query = torch.zeros(2, 1, options.pop("rows", 32), heads * group, head_size, dtype=dtype)
    if options.pop("void", False):
        options["void_LQ"] = torch.zeros(2, heads * group, dtype=dtype)
    window_scores(query, pages, int32(1, 1 + 10000 // page_tokens), tokens, **options)


def echoes(
    dtype: torch.dtype, group: int, page_tokens: int, head_size: int, kv: torch.dtype, heads: int = 8,
    counts: tuple[int, ...] = (64,), document: int = 4000, cap: float = 0.0, void: bool = False,
) -> None:  # fmt: skip
    """Steps of so many echoes, one after the other: so few that their keys are shared out."""
    pages, first = cache(kv, heads, page_tokens, head_size), document
    query = torch.zeros(sum(counts), heads * group, head_size, dtype=dtype)
    softmax = {"cap": cap, "void_Q": torch.zeros(heads * group, dtype=dtype) if void else None}
    table, peak = int32(1 + len(counts), 2 + 10000 // page_tokens), torch.zeros(len(counts), heads, document)
    for step, count in enumerate(counts):
        reconstruction_scores(
            query[first - document :][:count], pages, step % 2, table[step : step + 1], peak_HS=peak[step],
            scored=(step, 2048), first=first, normalised="chunk", sink=step, **softmax,
        )  # fmt: skip
        first += count


def norm(
    dtype: torch.dtype, page_tokens: int, head_size: int, kv: torch.dtype, order: int, heads: int = 8, group: int = 4
) -> None:
    pages, tokens, queries = cache(kv, heads, page_tokens, head_size), RaggedTokens.of([4000], "cpu"), heads * group
    # order 1 gets Wo as it lies in the model, [hidden, Q*D]; order 2 the contiguous factor
    weight = torch.zeros(4096, queries * head_size, dtype=dtype).view(4096, queries, head_size).permute(1, 2, 0)
    weight = weight if order == 1 else torch.zeros(queries, head_size, head_size, dtype=dtype)
    value_norm(pages, 0, int32(1, -(-4000 // page_tokens)), tokens, weight, order=order)


def learned(
    page_tokens: int, head_size: int, kv: torch.dtype, turned: int | None = None, heads: int = 8,
    table: torch.dtype = BF16, interleaved: bool = False, counts: tuple[int, ...] = (4000,),
) -> None:  # fmt: skip
    """Layers of prompts of so many tokens, then as many of packed pages; turned: numbers of a head, None: all."""
    pages, size = cache(kv, heads, page_tokens, head_size), head_size if turned is None else turned
    rotation = Rotation(torch.ones(8192, size).to(table), interleaved) if size else None
    weight = torch.zeros(len(counts) * heads, 2 * head_size + 1)
    blocks = int32(1 + len(counts), 2 + 8192 // page_tokens)
    page, row, position = torch.zeros(99, dtype=torch.int64), int32(99), int32(99, page_tokens)
    for step, count in enumerate(counts):
        own, tokens = weight[step * heads :][:heads], RaggedTokens.of([count], "cpu")
        learned_scores(pages, step % 2, blocks[step : step + 1], tokens, own, rotation)
        part = slice(step, step + min(count, 90))
        learned_page_scores(pages, page[part], row[part], position[part], own, rotation)


def copy(source: torch.dtype, target: torch.dtype, page_tokens: int, head_size: int, heads: int = 8) -> None:
    pair = (cache(dtype, heads, page_tokens, head_size) for dtype in (source, target))
    token, scale = int32(4 * 2 * heads * page_tokens), 1.0 if source == target else 0.5
    compact(next(pair), int32(64), int32(2 * heads + 1), token, next(pair), int32(4), key_scale=scale)


def repack(dtype: torch.dtype, page_tokens: int, head_size: int, heads: int = 8, most: tuple[int, ...] = (64,)) -> None:
    """Of heads that have so many packed pages at most, one after the other."""
    pages, offset = cache(dtype, heads, page_tokens, head_size), int32(2 * heads + 1)
    token = int32(4 * 2 * heads * page_tokens)
    for pages_most in most:
        packed = PackedSource(int32(4), offset, pages_most)
        compact(pages, int32(8), offset, token, pages, int32(4), packed=packed)


def copy_codes(
    kv: torch.dtype, page_tokens: int, head_size: int, page_class: str, heads: int = 8, apart: bool = False
) -> None:
    source = cache(kv, heads, page_tokens, head_size)
    source = tokens_apart(source, kv) if apart else source
    token = int32(4 * 2 * heads, source.page_shape.tokens(page_class))
    own = int32(64), int32(2 * heads + 1), token, source, int32(4)
    compact_quantised(source, *own, page_class=page_class, first_page=0)


def listing(page_tokens: int = 16, *, behind: bool = False) -> None:
    """behind: of what another class has left."""
    taken = {"taken_R": torch.zeros(16).long(), "taken_last_R1": torch.zeros(16, 1)} if behind else {}
    options = {"pages": 640, "page_tokens": page_tokens, "first_token": 0}
    list_kept(torch.zeros(16, 16 * 640), torch.zeros(16, 1), int32(17), **options, **taken)


GROUPS = ((1, 64), (2, 16), (3, 48), (8, 64), (16, 32))  # G and N that no other variant has
# Head sizes and a class of codes: with what ALL has, each class of each size that most models have.
CODED = {64: "4", 128: "k8v4", 256: "8"}
QUICK: dict[str, Callable[[], None]] = {
    "decode bf16": lambda: decode(BF16, 4, 16, 128, BF16, 1),
    "window bf16": lambda: window(BF16, 4, 16, 128, BF16),
    "reconstruction bf16": lambda: echoes(BF16, 4, 16, 128, BF16),
    "value_norm bf16 L1": lambda: norm(BF16, 16, 128, BF16, 1),
    "learned bf16": lambda: learned(16, 128, BF16),
    "list_kept": listing,
    "compact bf16": lambda: copy(BF16, BF16, 16, 128),
    "compact bf16 again": lambda: repack(BF16, 16, 128),
    "list_kept 39 behind": lambda: listing(39, behind=True),
    **{f"codes bf16 D={size} {name}": partial(copy_codes, BF16, 16, size, name) for size, name in CODED.items()},
    **{
        f"decode bf16 D={size} {name}": partial(decode, BF16, 4, 16, size, BF16, 1, classes=(name,))
        for size, name in CODED.items()
    },
    "decode bf16 fp8 pages": lambda: decode(BF16, 4, 16, 128, FP8, 1),
    "decode bf16 D=256 G=2 cap": lambda: decode(BF16, 2, 16, 256, BF16, 1, cap=50.0),
    "window bf16 D=64 G=8 void": lambda: window(BF16, 8, 16, 64, BF16, void=True),
    "decode bf16 D=512": lambda: decode(BF16, 8, 16, 512, BF16, 1),
    "value_norm bf16 L2 D=256": lambda: norm(BF16, 16, 256, BF16, 2),
}
ALL: dict[str, Callable[[], None]] = QUICK | {
    "decode fp16 D=64 N=32": lambda: decode(FP16, 4, 32, 64, FP16, 1),
    "decode bf16 G=7 D=80": lambda: decode(BF16, 7, 16, 80, BF16, 1),
    "decode bf16 G=1": lambda: decode(BF16, 1, 16, 128, BF16, 1),
    "decode bf16 5 queries": lambda: decode(BF16, 4, 16, 128, BF16, 5),
    "decode bf16 long queries": lambda: decode(BF16, 4, 16, 128, BF16, 512),
    # The heads of Gemma 2, of 9 and 27 billion parameters, and of gpt-oss; and both at once.
    **{
        f"{name} bf16 D={size} G={group} {label}": partial(call, BF16, group, 16, size, BF16, *more, **softmax)
        for name, call, more in (
            ("decode", decode, (1,)),
            ("decode long queries", decode, (512,)),
            ("window", window, ()),
            ("reconstruction", echoes, ()),
        )
        for size, group, label, softmax in (
            (256, 2, "cap", {"cap": 50.0}),
            (128, 2, "cap", {"cap": 50.0}),
            (64, 8, "void", {"void": True}),
            (128, 4, "cap and void", {"cap": 50.0, "void": True}),
        )
    },
    "decode bf16 8+4 void": lambda: decode(BF16, 8, 16, 64, BF16, 1, classes=("8", "4"), void=True),
    "decode bf16 fp8 pages void": lambda: decode(BF16, 8, 16, 64, FP8, 1, void=True),
    "window bf16 fp8 pages void": lambda: window(BF16, 8, 16, 64, FP8, void=True),
    "decode fp32": lambda: decode(FP32, 4, 16, 128, FP32, 1),
    "window bf16 short": lambda: window(BF16, 4, 16, 128, BF16, count=900),
    "window bf16 no pool": lambda: window(BF16, 4, 16, 128, BF16, pool=1),
    "window bf16 pool 3": lambda: window(BF16, 4, 16, 128, BF16, pool=3),
    "window bf16 mean": lambda: window(BF16, 4, 16, 128, BF16, aggregate="mean"),
    "window bf16 fp8 pages": lambda: window(BF16, 4, 16, 128, FP8),
    "window fp16 G=7 D=80 N=32": lambda: window(FP16, 7, 32, 80, FP16),
    "window fp16 D=64": lambda: window(FP16, 3, 16, 64, FP16),
    "reconstruction bf16 fp8 pages": lambda: echoes(BF16, 4, 16, 128, FP8),
    "reconstruction fp16 G=7 D=80 N=32": lambda: echoes(FP16, 7, 32, 80, FP16),
    "reconstruction fp32": lambda: echoes(FP32, 4, 16, 128, FP32),
    "value_norm fp32 L1": lambda: norm(FP32, 16, 128, FP32, 1),
    "value_norm bf16 L2": lambda: norm(BF16, 16, 128, BF16, 2),
    "value_norm fp16 D=80 L1": lambda: norm(FP16, 32, 80, FP16, 1),
    "value_norm bf16 fp8 pages L2": lambda: norm(BF16, 16, 128, FP8, 2),
    "learned fp16 D=80 N=32": lambda: learned(32, 80, FP16),
    "learned bf16 fp8 pages": lambda: learned(16, 128, FP8),
    "learned fp32": lambda: learned(16, 128, FP32, table=FP32),
    "learned bf16 neighbours": lambda: learned(16, 128, BF16, 64, interleaved=True),
    "learned bf16 fp32 table": lambda: learned(16, 128, BF16, table=FP32),
    "learned bf16 not turned": lambda: learned(16, 128, BF16, 0),
    "learned bf16 D=256 N=544": lambda: learned(544, 256, BF16, heads=2),
    "learned of any number": lambda: learned(16, 128, BF16, 64, heads=1, counts=(64, 1, 2, 5, 16, 300, 4001)),
    "compact fp16 to fp8": lambda: copy(FP16, FP8, 16, 128),
    "compact fp8 again": lambda: repack(FP8, 16, 128),
    "compact fp16 D=64 N=32 again of any number": lambda: repack(FP16, 32, 64, most=(1, 5, 16, 64)),
    "compact fp8": lambda: copy(FP8, FP8, 16, 128),
    "compact fp32 D=80": lambda: copy(FP32, FP32, 16, 80),
    "compact bf16 N=64": lambda: copy(BF16, BF16, 64, 128),
    **{f"decode bf16 G={group} N={n}": partial(decode, BF16, group, n, 128, BF16, 1) for group, n in GROUPS},
    **{f"window bf16 G={group} N={n}": partial(window, BF16, group, n, 128, BF16) for group, n in GROUPS},
    **{f"reconstruction bf16 G={group} N={n}": partial(echoes, BF16, group, n, 128, BF16) for group, n in GROUPS},
    "reconstruction of any number": lambda: echoes(BF16, 4, 16, 128, BF16, 2, (64, 1, 2, 5, 16, 300), 4001),
    **{
        f"codes bf16 D={size} {name} apart": partial(copy_codes, BF16, 16, size, name, apart=True)
        for size, name in ((64, "8"), (80, "4"), (128, "4"), (256, "k8v4"))
    },
    **{
        f"decode bf16 D={size} {'+'.join(names)}{' apart' * apart}": partial(
            decode, BF16, 4, 16, size, BF16, 1, 8, names, apart
        )
        for size in (64, 80, 128, 256)
        for names, apart in ((("k8v4",), size != 128), (("8", "4"), False))
    },
    "codes fp32 D=80 N=32 k8v4": lambda: copy_codes(FP32, 32, 80, "k8v4"),
    "decode bf16 5 queries k8v4": lambda: decode(BF16, 4, 16, 128, BF16, 5, classes=("k8v4",)),
    "decode fp16 D=64 N=32 8+4": lambda: decode(FP16, 4, 32, 64, FP16, 1, classes=("8", "4")),
    "decode bf16 long queries D=128 k8v4": lambda: decode(BF16, 4, 16, 128, BF16, 512, classes=("k8v4",)),
    "decode bf16 long queries D=256 8+4": lambda: decode(BF16, 4, 16, 256, BF16, 512, classes=("8", "4")),
    "window bf16 8 queries": lambda: window(BF16, 4, 16, 128, BF16, rows=8),
    "decode bf16 D=256 N=544": lambda: decode(BF16, 8, 544, 256, BF16, 1, heads=2),
    "window bf16 D=256 N=544": lambda: window(BF16, 8, 544, 256, BF16, heads=2),
    "reconstruction bf16 D=256 N=544": lambda: echoes(BF16, 8, 544, 256, BF16, heads=2),
    "value_norm bf16 D=256 N=544 L2": lambda: norm(BF16, 544, 256, BF16, 2, heads=2, group=8),
    "compact bf16 D=256 N=544": lambda: copy(BF16, BF16, 544, 256, heads=2),
}
# Head sizes, with KV heads and query heads of each as models have them: Llama, Danube, Phi-3, Qwen3, Nemotron, Gemma.
SHAPES = {64: (8, 4), 80: (8, 4), 96: (32, 1), 128: (8, 8), 192: (8, 12), 256: (1, 4), 512: (4, 8)}


def of_size(head_size: int, kv: torch.dtype) -> dict[str, Callable[[], None]]:
    """What an engine launches for bf16 queries on pages of a dtype, by what it is."""
    heads, group = SHAPES[head_size]
    return {
        "decode": lambda: decode(BF16, group, 16, head_size, kv, 1, heads),
        "decode long queries": lambda: decode(BF16, group, 16, head_size, kv, 512, heads),
        "window": lambda: window(BF16, group, 16, head_size, kv, heads),
        "reconstruction": lambda: echoes(BF16, group, 16, head_size, kv, heads),
        "value_norm": lambda: norm(BF16, 16, head_size, kv, 1, heads, group),  # L2 takes fewer registers
        "learned": lambda: learned(16, head_size, kv, heads=heads),
        "compact": lambda: copy(kv, kv, 16, head_size, heads),
    }


SIZES = {
    f"{name} D={head_size} {label}": call
    for head_size in SHAPES
    for label, kv in (("bf16", BF16), ("fp8", FP8))
    for name, call in of_size(head_size, kv).items()
}


def resources(kernel: Any, folder: Path) -> dict[str, Any]:
    """Registers, memory and the instructions that tell slow from fast code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    sass = subprocess.run([TOOLS / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    instructions = {
        "spills": r"\b(?:STL|LDL)\b",
        "wide_loads": r"\b(?:LDG\.E(?:\.\w+)*\.128|LDGSTS\.E(?:\.\w+)*\.128)",
        "wide_stores": r"\bSTG\.E(?:\.\w+)*\.128",
        "async_copies": r"\bLDGSTS\b",
        "hmma": r"\bHMMA\b",
        "hgmma": r"\b[HQ]GMMA\b",
    }
    found |= {name: len(re.findall(pattern, sass)) for name, pattern in instructions.items()}
    meta = kernel.metadata
    return found | {"shared": meta.shared, "warps": meta.num_warps, "stages": meta.num_stages}


def reports(variants: dict[str, Callable[[], None]]) -> Iterator[dict[str, Any]]:
    """One report for each kernel that each variant launches; kernels that variants share come once."""
    compiled, seen = capture(), set()
    with tempfile.TemporaryDirectory() as folder:
        for variant, call in variants.items():
            call()
            for name, kernel in compiled:
                if (name, kernel.hash) not in seen:
                    seen.add((name, kernel.hash))
                    yield {"variant": variant, "kernel": name, **resources(kernel, Path(folder))}
            compiled.clear()


if __name__ == "__main__":
    part = next((argument for argument in sys.argv[1:] if not argument.startswith("--")), "")
    chosen = ALL if "--all" in sys.argv[1:] else SIZES if "--sizes" in sys.argv[1:] else QUICK
    for report in reports({name: call for name, call in chosen.items() if part in name}):
        print(json.dumps(report), flush=True)
