"""From settings to a vLLM config: choose our classes, refuse what does not work, before any process is started."""

from __future__ import annotations

import os
from typing import Any

from vllm_defensive import config, vllm_compat
from vllm_defensive.config import EvictionConfig
from vllm_defensive.policy import PRESETS
from vllm_defensive.request import RequestFieldError, names_fields, refuse_beam_search, refuse_booleans, resolve

SCHEDULER = "vllm_defensive.engine.scheduler.make_scheduler"
# device type -> our worker, and the smallest block that the platform's fast attention takes: small pages waste least
PLATFORMS = {
    "cpu": ("vllm_defensive.worker.cpu_worker.EvictionCPUWorker", 32),
    "cuda": ("vllm_defensive.worker.cuda_worker.EvictionGPUWorker", 16),
}
_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")


def prepare(engine_args: Any) -> EvictionConfig | None:
    """Set the engine arguments that eviction needs; None (and nothing touched) if it is off.

    Raises ValueError for wrong settings and for options that contradict it.
    """
    additional = engine_args.additional_config
    if not isinstance(additional, dict) or config.KEY not in additional:
        return None
    settings = config.parse(additional[config.KEY])
    if settings is None:
        del additional[config.KEY]
        return None
    from vllm_defensive import status  # it imports a web framework, which engines without eviction need not

    worker, block = _platform()
    for name, ours, unset in (("scheduler_cls", SCHEDULER, None), ("worker_cls", worker, "auto")):
        chosen = getattr(engine_args, name)
        if chosen not in (unset, ours):
            raise ValueError(_refusal(name, chosen, f"it needs its own; drop --{name.replace('_', '-')}"))
        setattr(engine_args, name, ours)
    if engine_args.block_size is None:
        engine_args.block_size = block
    elif engine_args.block_size % block:
        raise ValueError(_refusal("block_size", engine_args.block_size, f"choose a multiple of {block}"))
    vllm_compat.patch_stat_loggers(_make_stat_logger)
    vllm_compat.patch_requests(_check_request)
    vllm_compat.patch_generators(_check_request)
    vllm_compat.patch_bodies(_check_body)
    # Plain JSON: it is hashed into vLLM's compile cache key and printed with its config.
    additional[config.KEY] = settings.model_dump(exclude_none=True)
    status.configure(additional[config.KEY])
    return settings


def check(vllm_config: Any, settings: EvictionConfig) -> None:
    """Refuse combinations that are not supported. Raises ValueError with the option's name and the way out."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    on_cuda = parallel.worker_cls == PLATFORMS["cuda"][0]
    for unsupported, option, value, way_out in (
        (
            model.get_total_num_kv_heads() % parallel.tensor_parallel_size,
            "tensor_parallel_size",
            parallel.tensor_parallel_size,
            f"choose a divisor of the model's {model.get_total_num_kv_heads()} KV heads",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline_parallel_size", parallel.pipeline_parallel_size, "use 1"),
        (_get(parallel, "decode_context_parallel_size", 1) > 1, "decode_context_parallel_size", "> 1", "use 1"),
        (_get(parallel, "prefill_context_parallel_size", 1) > 1, "prefill_context_parallel_size", "> 1", "use 1"),
        (_get(parallel, "use_ubatching", False), "enable_dbo", True, "turn micro-batching off"),
        _refused_drafts(vllm_config.speculative_config, on_cuda),
        (vllm_config.kv_transfer_config is not None, "kv_transfer_config", "set", "drop it"),
        (_get(vllm_config, "ec_transfer_config", None) is not None, "ec_transfer_config", "set", "drop it"),
        (
            os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0",
            "VLLM_USE_RUST_FRONTEND",
            os.environ.get("VLLM_USE_RUST_FRONTEND"),
            "unset it: that server neither checks requests' fields nor has our metrics",
        ),
        (model.runner_type != "generate", "runner", model.runner_type, "use a model that generates text"),
        (model.is_encoder_decoder, "model", model.model, "use a decoder-only model"),
        (model.use_mla, "model", f"{model.model} (multi-head latent attention)", "use a model with KV heads"),
        (
            cache.cache_dtype not in ("auto", "bfloat16", "float16", "float32", *(_FP8 if on_cuda else ())),
            "kv_cache_dtype",
            cache.cache_dtype,
            "use auto",
        ),
        (
            _get(cache, "kv_cache_dtype_skip_layers", None),
            "kv_cache_dtype_skip_layers",
            _get(cache, "kv_cache_dtype_skip_layers", None),
            "drop it",
        ),
        (
            settings.window > vllm_config.scheduler_config.max_num_batched_tokens,
            config.option_name("window"),
            settings.window,
            f"choose at most max_num_batched_tokens={vllm_config.scheduler_config.max_num_batched_tokens}",
        ),
        *(_refused_on_cuda(vllm_config) if on_cuda else ()),
    ):
        if unsupported:
            raise ValueError(_refusal(option, value, way_out))
    if on_cuda and _only_on_cpus(settings.policy):
        raise ValueError(f"{config.option_name('policy')}={settings.policy}: {_CPU_ONLY}")
    if settings.audit is not None:
        _check_writable(settings.audit)
    if settings.window > settings.min_tokens:
        raise ValueError(
            f"{config.option_name('window')}={settings.window}: choose at most "
            f"{config.option_name('min_tokens')}={settings.min_tokens}, or raise that one"
        )


def _refused_drafts(speculative: Any, on_cuda: bool) -> tuple[Any, str, Any, str]:
    """Row for `check`. Drafts looked up in the text are verified like any other tokens of a row; draft models and heads
    have a KV cache of their own, or read the target's hidden states, and nobody has tried them with packed pages."""
    method = None if speculative is None else speculative.method
    # Model runner V2, which GPUs need, has another n-gram drafter, of which only the device knows what was accepted.
    allowed, way_out = ((), "drop it: drafts work on CPUs only") if on_cuda else (("ngram",), "use ngram")
    return method is not None and method not in allowed, "speculative_config.method", method, way_out


def _check_writable(folder: str) -> None:
    """Make the folder of the audits now: a worker that fails to write the first of them would end the engine."""
    try:
        os.makedirs(folder, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"{config.option_name('audit')}={folder}: name a folder that can be written to")


def _platform() -> tuple[str, int]:
    """Worker class and smallest block of this platform. Raises ValueError for one that we have no worker for."""
    from vllm.platforms import current_platform

    kind = "cuda" if current_platform.is_cuda() else "cpu" if current_platform.is_cpu() else None
    if kind is None:  # ROCm, too, calls its device type cuda
        raise ValueError(_refusal("device", current_platform.device_name, "use an NVIDIA GPU or the CPU build of vLLM"))
    return PLATFORMS[kind]


def _refused_on_cuda(vllm_config: Any) -> tuple[tuple[Any, str, Any, str], ...]:
    """Rows for `check` that only GPUs have."""
    attention, chosen = vllm_config.attention_config, _get(vllm_config.attention_config.backend, "name", None)
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
    )


_CPU_ONLY = "supported on CPUs only, as it sums the attention of all queries; choose another policy on a GPU"


def _only_on_cpus(policy: str) -> bool:
    return policy in PRESETS and PRESETS[policy].accumulates


def _check_request(vllm_config: Any, prompt: Any, params: Any) -> None:
    """Refuse a request with wrong `kv_eviction*` fields: HTTP 400, or VLLMValidationError from `LLM`.

    vllm_config: of the engine that is asked. It may be a stock one, though another of the process evicts.
    """
    extra_args = getattr(params, "extra_args", None)
    settings = config.from_vllm_config(vllm_config) if extra_args else None
    num_tokens = _length(prompt)
    if settings is None or num_tokens is None:
        return
    try:
        own = resolve(settings, extra_args, num_tokens)
        if _only_on_cpus(own.policy) and _platform()[0] == PLATFORMS["cuda"][0]:
            raise RequestFieldError(f"{config.KEY}={own.policy!r}: {_CPU_ONLY}", config.KEY, own.policy)
    except RequestFieldError as error:
        raise vllm_compat.request_error(str(error), error.field, error.value) from None


def _length(prompt: Any) -> int | None:
    """Tokens of a prompt, None if it is not yet tokenized: it comes again once it is."""
    if not isinstance(prompt, dict):
        return None
    for name in ("prompt_token_ids", "prompt_embeds"):
        if prompt.get(name) is not None:
            return len(prompt[name])
    return None


async def _check_body(vllm_config: Any, request: Any, raw_request: Any) -> None:
    """Refuse what `_check_request` does not see: fields of a beam search, and booleans, which it sees as 0 and 1.

    raw_request: None in `vllm run-batch`, where only what vLLM made of the body can be seen.
    """
    fields = getattr(request, "vllm_xargs", None) or {}
    if not names_fields(fields) or config.from_vllm_config(vllm_config) is None:
        return
    try:
        if getattr(request, "use_beam_search", False):
            refuse_beam_search(fields)
        body = {"vllm_xargs": fields} if raw_request is None else await raw_request.json()
        refuse_booleans(body.get("vllm_xargs") if isinstance(body, dict) else None)
    except RequestFieldError as error:
        raise vllm_compat.request_error(str(error), error.field, error.value) from None


def _make_stat_logger(vllm_config: Any, engine_indexes: list[int]) -> Any:
    from vllm_defensive.metrics import make_logger

    return make_logger(vllm_config, engine_indexes)


def _get(owner: Any, name: str, default: Any) -> Any:
    return getattr(owner, name, default)


def _refusal(option: str, value: Any, way_out: str) -> str:
    return f"{option}={value}: not supported together with --kv-eviction; {way_out}, or {config.TURN_OFF}"
