"""What depends on the device: our worker, the smallest block, and options that only GPUs refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from typing import Any, NamedTuple

from vllm_defensive.packing import LADDER, WIDTHS
from vllm_defensive.policy import PRESETS
from vllm_defensive.settings.engine import NONE, TURN_OFF, EvictionConfig, option_name
from vllm_defensive_kernels import MAX_HEAD_SIZE
from vllm_defensive_kernels.widths import CLASSES

COMPILER_FLAGS = ("-std=c++17", "-fPIC", "-shared", "-fopenmp")
"""Of what CPU workers compile, beside those for speed."""


class Platform(NamedTuple):
    """worker: its class's path. block_tokens: the smallest block that the platform's fast attention takes: small pages
    waste least."""

    worker: str
    block_tokens: int


PLATFORMS = {
    "cpu": Platform("vllm_defensive.worker.cpu.worker.EvictionCPUWorker", 32),
    "cuda": Platform("vllm_defensive.worker.cuda.worker.EvictionGPUWorker", 16),
}

Row = tuple[Any, str, Any, str]  # (whether it is refused, option, value, way out)

CPU_ONLY = "supported on CPUs only; choose another policy on a GPU"


def current() -> Platform:
    """This process's platform. Raises ValueError for one that we have no worker for."""
    from vllm.platforms import current_platform

    kind = "cuda" if current_platform.is_cuda() else "cpu" if current_platform.is_cpu() else None
    if kind is None:  # ROCm, too, calls its device type cuda
        raise ValueError(refusal("device", current_platform.device_name, "use an NVIDIA GPU or the CPU build of vLLM"))
    return PLATFORMS[kind]


def choose_policies(settings: EvictionConfig, platform: Platform) -> EvictionConfig:
    """The settings, with the policies that requests may name where these are compiled.

    A GPU's are no others than those named, which the worker warms up: else any client could make the engine, and with
    it everybody else, wait for a compiler. Raises ValueError if there are none to choose from.
    """
    if platform != PLATFORMS["cuda"] or settings.policies is not None:
        return settings
    if settings.policy == NONE:
        raise ValueError(
            f"{option_name('per_request')}=True: name the policies that requests may choose, which a GPU compiles at "
            f"start, with {option_name('policies')} (--kv-eviction-policies auto)"
        )
    named = dict.fromkeys((settings.policy, *settings.stands_for(settings.policy)))
    return settings.model_copy(update={"policies": tuple(named)})


def choose_widths(settings: EvictionConfig, platform: Platform) -> EvictionConfig:
    """The settings, with what requests may be packed in, and what the policy `auto` packs in.

    On GPUs the decode kernel is compiled for the kinds of pages that the server's own settings ask for. On CPUs any can
    be read where there is a compiler. Raises ValueError where there is none and the settings ask for one.
    """
    if platform == PLATFORMS["cuda"]:
        names = {"16", *(name for widths in settings.own_widths for name, _ in WIDTHS[widths])}
        return settings.model_copy(update={"classes": tuple(name for name in CLASSES if name in names)})
    if compiler() is not None:
        return settings.model_copy(update={"auto_widths": not has_amx()})
    if any(widths != "16" for widths in settings.own_widths):
        raise ValueError(
            f"{option_name('widths')}={settings.widths}: CPUs read such pages by functions that are compiled at start, "
            "and no C++ compiler was found (g++, clang++, or the one that CXX names); install one, or choose 16"
        )
    return settings.model_copy(update={"classes": ("16",)})


def choose_repeats(settings: EvictionConfig, platform: Platform) -> EvictionConfig:
    """The settings, with what can evict a request more than once, or late: on GPUs policies whose scores last, where
    the server's own settings say so, for it takes kernels, which are compiled at start, and memory, which is set aside.
    """
    if platform != PLATFORMS["cuda"]:
        return settings
    asked = settings.answers == "evict" or settings.when == "full"
    return settings.model_copy(update={"repeats": "lasting" if asked else "none"})


@cache
def compiler() -> str | None:
    """The machine's C++ compiler, looked for as torch.compile does, that makes libraries with OpenMP; None: there is
    none."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    found = (shutil.which(name) for name in names if name)
    return next((path for path in found if path is not None and _compiles(path)), None)


def _compiles(path: str) -> bool:
    """Whether a few lines can be compiled and linked: a fraction of a second, where a worker finds out after many."""
    command = [path, *COMPILER_FLAGS, "-x", "c++", "-", "-o", os.devnull]
    source = '#include <omp.h>\n#include <vector>\nextern "C" int threads() { return omp_get_max_threads(); }\n'
    try:
        return subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0
    except OSError:
        return False


def has_amx() -> bool:
    """Whether vLLM's attention keeps its cache in the order of AMX tiles, which our functions read number by number:
    nobody has measured that, and nothing packs such pages there unless it is told to."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def refusal(option: str, value: Any, way_out: str) -> str:
    """What a user reads of an option that does not go together with eviction."""
    return f"{option}={value}: not supported together with --kv-eviction; {way_out}, or {TURN_OFF}"


def only_on_cpus(policy: str) -> bool:
    """Whether the policy reads attention that only CPUs look at, or has pages whose classes only these count."""
    return policy in PRESETS and (PRESETS[policy].accumulates or PRESETS[policy].widths == LADDER)


def refused_on_cuda(vllm_config: Any) -> tuple[Row, ...]:
    """Rows for `limits.check` that only GPUs have."""
    model = vllm_config.model_config
    attention, chosen = vllm_config.attention_config, getattr(vllm_config.attention_config.backend, "name", None)
    fp8 = vllm_config.cache_config.cache_dtype.startswith("fp8")
    return (
        (not vllm_config.use_v2_model_runner, "VLLM_USE_V2_MODEL_RUNNER", 0, "use model runner V2, vLLM's default"),
        (
            chosen not in (None, "FLASH_ATTN", "TRITON_ATTN"),
            "attention_backend",
            chosen,
            "choose FLASH_ATTN or TRITON_ATTN",
        ),
        (
            fp8 and chosen == "FLASH_ATTN",
            "attention_backend",
            "FLASH_ATTN with an fp8 KV cache",
            "choose TRITON_ATTN",
        ),
        (attention.backend_per_kind, "attention_config.backend_per_kind", attention.backend_per_kind, "drop it"),
        (
            model.get_head_size() > MAX_HEAD_SIZE,
            "model",
            f"{model.model} (heads of {model.get_head_size()} numbers)",
            f"on GPUs use a model with heads of at most {MAX_HEAD_SIZE}",
        ),
        (model.is_hybrid, "model", f"{model.model} (recurrent layers)", "evict such models on CPUs"),
        (
            model.attention_chunk_size is not None,
            "model",
            f"{model.model} (attention in chunks)",
            "evict such models on CPUs",
        ),
    )


def refused_drafts(speculative: Any, on_cuda: bool) -> Row:
    """Row for `limits.check`. Drafts looked up in the text are verified like any other tokens of a row; draft models
    and heads have a KV cache of their own, or read the target's hidden states, and nobody has tried them with packed
    pages."""
    method = None if speculative is None else speculative.method
    # Model runner V2, which GPUs need, has another n-gram drafter, of which only the device knows what was accepted.
    allowed, way_out = ((), "drop it: drafts work on CPUs only") if on_cuda else (("ngram",), "use ngram")
    return method is not None and method not in allowed, "speculative_config.method", method, way_out
