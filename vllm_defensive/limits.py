"""What is refused at start, and why: options, folders, models. Every message names the option and the way out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vllm_defensive.audit import make_folder
from vllm_defensive.platforms import CPU_ONLY, PLATFORMS, Row, only_on_cpus, refusal, refused_drafts, refused_on_cuda
from vllm_defensive.settings.engine import AUTO, NONE, TURN_OFF, EvictionConfig, listed, option_name

_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")


def check(vllm_config: Any, settings: EvictionConfig) -> None:
    """Refuse combinations that are not supported. Raises ValueError with the option's name and the way out."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    scheduler = vllm_config.scheduler_config
    on_cuda = parallel.worker_cls == PLATFORMS["cuda"].worker
    for unsupported, option, value, way_out in (
        (
            model.get_total_num_kv_heads() % parallel.tensor_parallel_size,
            "tensor_parallel_size",
            parallel.tensor_parallel_size,
            f"choose a divisor of the model's {model.get_total_num_kv_heads()} KV heads",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline_parallel_size", parallel.pipeline_parallel_size, "use 1"),
        (getattr(parallel, "decode_context_parallel_size", 1) > 1, "decode_context_parallel_size", "> 1", "use 1"),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "prefill_context_parallel_size", "> 1", "use 1"),
        (getattr(parallel, "use_ubatching", False), "enable_dbo", True, "turn micro-batching off"),
        refused_drafts(vllm_config.speculative_config, on_cuda),
        (
            vllm_config.speculative_config is not None and model.is_hybrid,
            "speculative_config.method",
            getattr(vllm_config.speculative_config, "method", None),
            "drop it: a recurrent layer's state would have to go back with drafts that turn out wrong",
        ),
        (
            cache.prefix_match_unit is not None and model.is_hybrid,
            "prefix_match_unit",
            cache.prefix_match_unit,
            "drop it: of models with recurrent layers, prefixes are shared in whole blocks",
        ),
        (vllm_config.kv_transfer_config is not None, "kv_transfer_config", "set", "drop it"),
        (getattr(vllm_config, "ec_transfer_config", None) is not None, "ec_transfer_config", "set", "drop it"),
        _switch("VLLM_USE_RUST_FRONTEND", "that server neither checks requests' fields nor has our metrics"),
        _switch("VLLM_BATCH_INVARIANT", "what is kept, and how decode is split, may depend on the batch"),
        (
            settings.reuse != "off" and not cache.enable_prefix_caching,
            "enable_prefix_caching",
            False,
            "packings are found by its hashes; drop --kv-eviction-reuse, which is off by default then",
        ),
        (model.runner_type != "generate", "runner", model.runner_type, "use a model that generates text"),
        (model.is_encoder_decoder, "model", model.model, "use a decoder-only model"),
        (
            model.is_diffusion,
            "model",
            f"{model.model} (discrete diffusion)",
            "use a model that generates one token after the other",
        ),
        (model.use_mla, "model", f"{model.model} (multi-head latent attention)", "use a model with KV heads"),
        (
            cache.cache_dtype not in ("auto", "bfloat16", "float16", "float32", *(_FP8 if on_cuda else ())),
            "kv_cache_dtype",
            cache.cache_dtype,
            # auto is what the checkpoint declares, so it may be what brought this about.
            f"use {'float16' if str(model.dtype) == 'torch.float16' else 'bfloat16'}{' or fp8' if on_cuda else ''}, "
            "also where it is the checkpoint that asks for this one",
        ),
        (
            scheduler.disable_hybrid_kv_cache_manager and _has_other_caches(model),
            "disable_hybrid_kv_cache_manager",
            True,
            "drop --disable-hybrid-kv-cache-manager (and VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE=0, if that "
            "is set), as layers that do not see all of a prompt need blocks of their own",
        ),
        (getattr(cache, "kv_sharing_fast_prefill", False), "kv_sharing_fast_prefill", True, "drop it"),
        (
            getattr(cache, "kv_cache_dtype_skip_layers", None),
            "kv_cache_dtype_skip_layers",
            getattr(cache, "kv_cache_dtype_skip_layers", None),
            "drop it",
        ),
        (
            settings.window > scheduler.max_num_batched_tokens,
            option_name("window"),
            settings.window,
            f"choose at most max_num_batched_tokens={scheduler.max_num_batched_tokens}",
        ),
        *(refused_on_cuda(vllm_config) if on_cuda else ()),
    ):
        if unsupported:
            raise ValueError(refusal(option, value, way_out))
    for field, named in (("policy", [settings.policy]), ("policies", settings.policies or ())):
        for policy in named if on_cuda else ():
            if only_on_cpus(policy):
                raise ValueError(f"{option_name(field)}={policy}: {CPU_ONLY}")
    if cache.cache_dtype in _FP8 and (coded := [widths for widths in settings.own_widths if widths != "16"]):
        raise ValueError(
            f"{option_name('widths')}={coded[0]}: not supported with kv_cache_dtype={cache.cache_dtype}; choose 16, or "
            "a 16-bit KV cache"
        )
    for field, once in (("answers", "keep"), ("prompts", "whole")):
        if getattr(settings, field) != once:
            _check_repeats(field, settings)
    if settings.when == "full":
        _check_late(settings)
    if settings.audit is not None:
        _check_writable(settings.audit)
    if settings.window > settings.min_tokens:
        raise ValueError(
            f"{option_name('window')}={settings.window}: choose at most "
            f"{option_name('min_tokens')}={settings.min_tokens}, or raise that one"
        )


def _check_repeats(field: str, settings: EvictionConfig) -> None:
    """Refuse what cannot be evicted more than once. field: the setting that asks for it."""
    way_out = None
    if field == "prompts" and settings.repeats != "any":
        way_out = "supported on CPUs only; leave it out on a GPU"
    elif settings.policy != NONE and not settings.evicts_again(settings.meant(settings.policy, boundary=True)):
        way_out = f"{settings.described} evicts a request once; choose one of {', '.join(settings.evict_again)}"
    elif settings.widths not in (AUTO, *settings.widths_again):
        way_out = f"goes with {option_name('widths')} {listed(settings.widths_again)}, not {settings.widths}"
    if way_out is not None:
        raise ValueError(f"{option_name(field)}={getattr(settings, field)}: {way_out}")
    for name in ("interval", "prompt_interval"):
        tokens = getattr(settings, name)
        if tokens is not None and tokens < settings.window:
            raise ValueError(f"{option_name(name)}={tokens}: choose at least {option_name('window')}={settings.window}")


def _check_late(settings: EvictionConfig) -> None:
    """Refuse what cannot be evicted when memory is short."""
    way_out, meant = None, settings.meant(settings.policy, boundary=settings.answers == "evict")
    if settings.prompts == "bounded":
        way_out = f"prompts that are bounded are evicted as they are read; leave {option_name('prompts')} out"
    elif settings.policy != NONE and settings.evicts_late(meant, settings.answers) is None:
        able = ", ".join(settings.evict_late(settings.answers))
        way_out = f"{settings.described} cannot evict so late; choose one of {able}"
    elif settings.widths not in (AUTO, *settings.widths_again):
        way_out = f"goes with {option_name('widths')} {listed(settings.widths_again)}, not {settings.widths}"
    if way_out is not None:
        raise ValueError(f"{option_name('when')}=full: {way_out}")


def _switch(variable: str, why: str) -> Row:
    """Row that refuses an environment variable which switches something on."""
    value = os.environ.get(variable, "0")
    return value != "0", variable, value, f"unset it: {why}"


def _has_other_caches(model: Any) -> bool:
    """Whether the model has a sliding window that a request can outgrow, chunks, or recurrent layers."""
    window = model.get_sliding_window()
    has_window = window is not None and window < model.max_model_len
    return has_window or model.attention_chunk_size is not None or model.is_hybrid


def _check_writable(folder: str) -> None:
    """Make the folder of the audits now: a worker that fails to write the first of them would end the engine."""
    try:
        make_folder(folder)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"{option_name('audit')}={folder}: name a folder that can be written to")


def evictable_group(groups: Sequence[Any]) -> int:
    """The index of the KV cache group to evict. Raises ValueError unless there is exactly one, and all others have a
    cache that does not grow with the request.

    Sliding windows and chunks have their blocks at their positions, whatever ours hold, and a state of a recurrent
    layer (Mamba, gated delta net, short convolution) is one block, in place of which the next one comes. Of other
    kinds (attention that we do not evict) nobody has tried what becomes of them beside packed blocks.
    """
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        MambaSpec,
        SlidingWindowSpec,
        UniformTypeKVCacheSpecs,
    )

    from vllm_defensive.engine.spec import EvictableSpec  # workers know it; servers need not

    mixed = [g.kv_cache_spec for g in groups if isinstance(g.kv_cache_spec, UniformTypeKVCacheSpecs)]
    for specs in (spec.kv_cache_specs.values() for spec in mixed):
        if shapes := sorted({f"{s.num_kv_heads}x{s.head_size}" for s in specs if isinstance(s, EvictableSpec)}):
            raise ValueError(
                f"kv_eviction: the layers of this model differ in their KV heads (number x size: {', '.join(shapes)}), "
                f"and one shape is supported; {TURN_OFF}"
            )
    evictable = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, EvictableSpec)]
    if len(evictable) != 1:
        raise ValueError(
            f"kv_eviction: this model has {len(evictable)} groups of full-attention layers whose KV cache could be "
            f"evicted, and exactly one is supported; {TURN_OFF}"
        )
    for i, group in enumerate(groups):
        spec, kind = group.kv_cache_spec, type(group.kv_cache_spec)
        beside = kind in (SlidingWindowSpec, ChunkedLocalAttentionSpec) or isinstance(spec, MambaSpec)
        if i not in evictable and not beside:
            raise ValueError(
                f"kv_eviction: layer {group.layer_names[0]} has a cache of the kind {kind.__name__}, which is not "
                f"supported beside evicted layers; {TURN_OFF}"
            )
    return evictable[0]


def has_states(groups: Sequence[Any]) -> bool:
    """Whether some of the model's layers are recurrent: what they know of a prompt is a state, at its end alone."""
    from vllm.v1.kv_cache_interface import MambaSpec

    return any(isinstance(group.kv_cache_spec, MambaSpec) for group in groups)


def of_one_size(groups: Sequence[Any]) -> bool:
    """Whether the blocks of all KV cache groups have as many tokens, so that packings can be found by their hashes."""
    return len({group.kv_cache_spec.block_size for group in groups}) == 1


def check_layers(names: list[str], layers: list[Any]) -> None:
    """Refuse attention that packed pages cannot reproduce, or that scores would misjudge. Raises ValueError.

    layers: all that read an evicted cache, those that share another's included.
    """
    for name, layer in zip(names, layers, strict=True):
        impl = layer.impl
        for wrong, what in (
            (impl.alibi_slopes is not None, "uses ALiBi"),
            (
                layer.sliding_window is not None and layer.kv_sharing_target_layer_name is not None,
                f"sees no more than a window of the KV cache of {layer.kv_sharing_target_layer_name}",
            ),
            (layer.num_heads != layers[0].num_heads, "has another number of query heads than the first"),
        ):
            if wrong:
                raise ValueError(f"kv_eviction: layer {name} {what}, which is not supported; {TURN_OFF}")
