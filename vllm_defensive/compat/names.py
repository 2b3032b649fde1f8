"""Everything of vLLM that we override, call, patch or read, by who does: the table that `contract.py` checks.

A name's parameters (without `self` or `cls`) are `"a, b"`: these and no others; `"a, b, ..."`: these first; `"..., a"`:
among others. Without parameters it is only there: a class, or something to read. Exact are those that we override with
parameters of our own, or call with all of them; of a method that hands on whatever it gets, the name will do.

Rows hold for all versions of `contract.SUPPORTED`. What only some of them have needs a place in the other files here
that asks for it, and says until when. It is one table, and long for that reason alone.
"""

from __future__ import annotations


def _has(owner: str, names: str) -> dict[str, str | None]:
    return {owner: None, **{f"{owner}.{name}": None for name in names.split()}}


def _calls(owner: str, names: str) -> dict[str, str | None]:
    return {f"{owner}.{name}": "..." for name in names.split()}


# The process in which the engine's arguments become its configuration: an API server, or that of `LLM`.
SERVING: dict[str, dict[str, str | None]] = {
    "vllm.engine.arg_utils": {
        "EngineArgs.add_cli_args": "parser",  # P1
        "EngineArgs.create_engine_config": "...",  # P2
        **_has(
            "EngineArgs",
            "additional_config scheduler_cls worker_cls block_size disable_log_stats download_dir enforce_eager "
            "logits_processors max_model_len model revision seed",
        ),
        "EngineArgs.create_model_config": "",  # this and what follows: the command that learns a score
        "EngineArgs.from_cli_args": "args",
        "AsyncEngineArgs": None,
    },
    "vllm.v1.engine.input_processor": {
        "InputProcessor.process_inputs": "...",  # P3
        "InputProcessor.vllm_config": None,
    },
    "vllm.v1.engine": _has("EngineCoreRequest", "mm_features prompt_token_ids prompt_embeds sampling_params"),
    "vllm.multimodal.inputs": {
        **_has("MultiModalFeatureSpec", "modality mm_position"),
        **_has("PlaceholderRange", "offset length"),
    },
    "vllm.utils.argparse_utils": {"FlexibleArgumentParser": None},
    "vllm.entrypoints.llm": {
        "LLM.__init__": "model, ...",
        "LLM.generate": "prompts, sampling_params, use_tqdm, ...",
        "LLM.collective_rpc": "method, timeout, args, ...",
        "LLM.get_tokenizer": "",
    },
    "vllm.sampling_params": _has("SamplingParams", "extra_args stop"),
    "vllm.v1.metrics.loggers": {
        "StatLoggerManager.__init__": "vllm_config, ...",  # P4
        **_has("StatLoggerManager", "engine_indexes stat_loggers"),
        "AggregateStatLoggerBase.record": "scheduler_stats, iteration_stats, ..., engine_idx",
        "AggregateStatLoggerBase.log_engine_initialized": "",
    },
    "vllm.v1.metrics.prometheus": {"get_prometheus_registry": ""},
    "vllm.v1.engine.async_llm": {
        "AsyncLLM.generate": "prompt, sampling_params, ...",  # P6
        "AsyncLLM.vllm_config": None,
    },
    "vllm.entrypoints.openai.responses.serving": {
        "OpenAIServingResponses._generate_with_builtin_tools": "..., engine_input, sampling_params",
        "OpenAIServingResponses.engine_client": None,
    },
    "vllm.entrypoints.generate.base.serving": {
        "GenerateBaseServing._with_kv_transfer_rejection_cleanup": "awaitable, request, raw_request",  # P7
        "GenerateBaseServing.engine_client": None,
    },
    "vllm.entrypoints.openai.chat_completion.batch_serving": {
        "OpenAIServingChatBatch.create_batch_chat_completion": "request, raw_request",
    },
    "vllm.entrypoints.serve.middleware.authenticate": {
        "AuthenticationMiddleware.__init__": "app, tokens",
        "AuthenticationMiddleware.verify_token": "headers",
    },
    "vllm.exceptions": {"VLLMValidationError.__init__": "message, parameter, value"},
    "vllm.logger": {"init_logger": "name"},
    "vllm.platforms": {"current_platform": None},
    "vllm.platforms.interface": {
        **_has("Platform", "device_name"),
        "Platform.is_cuda": "",
        "Platform.is_cpu": "",
        "Platform.get_device_capability": "device_id",
    },
    "vllm.config": {
        **_has(
            "VllmConfig",
            "model_config parallel_config cache_config scheduler_config speculative_config kv_transfer_config "
            "ec_transfer_config attention_config kernel_config compilation_config additional_config "
            "use_v2_model_runner",
        ),
        **_has(
            "ModelConfig",
            "runner_type is_encoder_decoder use_mla model dtype max_model_len served_model_name is_mm_prefix_lm "
            "is_diffusion is_hybrid attention_chunk_size hf_text_config",
        ),
        "ModelConfig.get_sliding_window": "",
        "ModelConfig.get_total_num_kv_heads": "",
        "ModelConfig.get_head_size": "",
        **_has(
            "ParallelConfig",
            "worker_cls tensor_parallel_size pipeline_parallel_size decode_context_parallel_size "
            "prefill_context_parallel_size use_ubatching",
        ),
        **_has(
            "CacheConfig",
            "cache_dtype block_size enable_prefix_caching kv_cache_dtype_skip_layers kv_cache_memory_bytes "
            "prefix_match_unit",
        ),
        **_has(
            "SchedulerConfig",
            "max_num_batched_tokens max_num_seqs max_num_active_seqs async_scheduling disable_hybrid_kv_cache_manager",
        ),
        **_has("SpeculativeConfig", "method"),
        **_has("AttentionConfig", "backend backend_per_kind"),
        **_has("KernelConfig", "enable_jit_warmup"),
        **_has("CompilationConfig", "static_forward_context"),
    },
}

# The scheduler's process.
ENGINE: dict[str, dict[str, str | None]] = {
    "vllm.sampling_params": _has("SamplingParams", "extra_args stop max_tokens temperature ignore_eos detokenize"),
    "vllm.v1.engine": {
        **_has("EngineCoreOutput", "request_id new_token_ids finish_reason events prefill_stats kv_transfer_params"),
        **_has("EngineCoreOutputs", "outputs"),
        **_has("EngineCoreEventType", "SCHEDULED"),
    },
    "vllm.v1.engine.core": {"EngineCore.collective_rpc": "method, ..."},  # P10
    "vllm.utils.math_utils": {"cdiv": "a, b"},
    "vllm.v1.request": {
        "Request.__init__": (
            "request_id, prompt_token_ids, sampling_params, pooling_params, client_index, arrival_time, ..."
        ),
        **_has(
            "Request",
            "request_id status sampling_params client_index arrival_time lora_request priority prompt_token_ids "
            "num_prompt_tokens num_tokens num_output_tokens num_computed_tokens num_in_flight_tokens max_tokens "
            "mm_features all_token_ids block_hashes resumable skip_reading_prefix_cache",
        ),
        "Request.record_event": "event_type, ...",
        "Request.take_events": "",
        "Request.get_finished_reason": "",
        **_has("RequestStatus", "FINISHED_STOPPED FINISHED_LENGTH_CAPPED FINISHED_REPETITION"),
        **_has("RequestStatus", "FINISHED_ABORTED WAITING WAITING_FOR_STREAMING_REQ"),
    },
    "vllm.v1.core.kv_cache_utils": {
        **_has("KVCacheBlock", "block_hash block_id is_null next_free_block ref_cnt"),
        **_has("FreeKVCacheBlockQueue", "fake_free_list_head num_free_blocks"),
        "FreeKVCacheBlockQueue.popleft_n": "n",
        "FreeKVCacheBlockQueue.prepend_n": "blocks",
        "FreeKVCacheBlockQueue.remove": "block",
    },
    "vllm.v1.core.block_pool": {
        **_has("BlockPool", "free_block_queue hash_block_size null_block num_gpu_blocks"),
        "BlockPool.unpin_blocks": "blocks, on_reuse",
        "BlockPool.get_cached_block": "block_hash, kv_cache_group_ids",
        "BlockPool.get_new_blocks": "num_blocks",
        "BlockPool.get_num_free_blocks": "",
        "BlockPool.free_blocks": "ordered_blocks",
        "BlockPool.touch": "blocks",
    },
    "vllm.v1.core.single_type_kv_cache_manager": {
        "FullAttentionManager.__init__": "kv_cache_spec, ...",
        "FullAttentionManager.get_num_blocks_to_allocate": (
            "request_id, num_tokens, new_computed_blocks, total_computed_tokens, num_local_computed_tokens, "
            "num_tokens_main_model, apply_admission_cap, ..."
        ),
        "FullAttentionManager.add_local_computed_blocks": "request_id, ...",
        "FullAttentionManager.allocate_new_blocks": "request_id, num_tokens, num_tokens_main_model",
        "FullAttentionManager.remove_skipped_blocks": "request_id, processed_computed_tokens, num_prompt_tokens",
        "FullAttentionManager.pop_blocks_for_free": "request_id",
        "FullAttentionManager._remove_blocks_in_range": "request_id, first_block, last_block",
        "SingleTypeKVCacheManager.get_num_skipped_tokens": "num_computed_tokens",
        **_has(
            "FullAttentionManager",
            "block_pool block_size enable_caching kv_cache_group_id kv_cache_spec num_cached_block req_to_blocks",
        ),
    },
    "vllm.v1.core.kv_cache_coordinator": {
        "KVCacheCoordinator.find_longest_cache_hit": "block_hashes, max_cache_hit_length",  # P8
        "KVCacheCoordinator.cache_blocks": "request, num_computed_tokens",
        "KVCacheCoordinator.single_type_managers": None,
    },
    "vllm.v1.core.kv_cache_manager": {
        "KVCacheManager.allocate_slots": "request, num_new_tokens, ..., num_lookahead_tokens",  # P9
        **_has("KVCacheManager", "coordinator block_pool empty_kv_cache_blocks"),
        "KVCacheManager.create_kv_cache_blocks": "blocks",
        **_has("KVCacheBlocks", "blocks"),
    },
    "vllm.v1.core.sched.scheduler": {
        "Scheduler.__init__": "...",
        "Scheduler.add_request": "request, ...",
        "Scheduler.schedule": "...",
        "Scheduler._get_local_prefix_cache_hit": "request, ...",
        "Scheduler._ec_transfer_pending": "request, num_computed_tokens",
        "Scheduler._reserve_prefill_lookahead": "request, num_computed_tokens, num_new_tokens",
        "Scheduler.update_from_output": "scheduler_output, model_runner_output",
        "Scheduler._free_request": "request, ...",
        "Scheduler._preempt_request": "request, timestamp, ...",
        "Scheduler.reset_prefix_cache": "reset_running_requests, ...",
        "Scheduler.get_request_counts": "",
        "Scheduler.finish_requests": "request_ids, finished_status",
        "Scheduler.make_stats": "...",
        **_has(
            "Scheduler",
            "block_size kv_cache_manager max_model_len max_num_active_reqs max_num_scheduled_tokens num_spec_tokens "
            "pause_state requests running structured_output_manager vllm_config waiting",
        ),
    },
    "vllm.v1.core.sched.async_scheduler": {"AsyncScheduler": None},
    "vllm.v1.core.sched.request_queue": {
        "RequestQueue.prepend_requests": "requests",
        "RequestQueue.remove_requests": "requests",
    },
    "vllm.v1.core.sched.interface": _has("PauseState", "PAUSED_ALL"),
    "vllm.v1.core.sched.output": _has("SchedulerOutput", "num_scheduled_tokens"),
    "vllm.v1.metrics.stats": {
        **_has("SchedulerStats", "waiting_lora_adapters num_running_reqs num_waiting_reqs"),
        "PrefillStats.finalize": "num_cached_tokens",
    },
    "vllm.v1.kv_cache_spec_registry": {
        "KVCacheSpecRegistry._ensure_registered": "...",
        "KVCacheSpecRegistry.register": "kvcache_spec_cls, manager_class, uniform_type_base_spec",
    },
    "vllm.v1.kv_cache_interface": {
        "FullAttentionSpec.merge": "specs",
        "FullAttentionSpec.max_memory_usage_bytes": "vllm_config",
        **_has(
            "FullAttentionSpec",
            "attention_chunk_size block_size head_size head_size_v non_causal num_kv_heads page_size_bytes "
            "sliding_window tokens_per_state",
        ),
        "KVCacheSpec": None,
        "AttentionSpec": None,
        **_has("SlidingWindowSpec", "sliding_window page_size_padded"),
        "MambaSpec.max_memory_usage_bytes": "vllm_config",
        **_has("MambaSpec", "page_size_bytes"),
    },
}

# Every worker.
WORKER: dict[str, dict[str, str | None]] = {
    "vllm.v1.worker.gpu_worker": {
        "Worker.__init__": "...",
        "Worker.get_kv_cache_spec": "",
        "Worker.initialize_from_config": "kv_cache_config",
        "Worker.execute_model": "scheduler_output",
        "Worker.sample_tokens": "...",
        "Worker.load_model": "...",
        "Worker.determine_available_memory": "",
        "Worker.compile_or_warm_up_model": "",
        # After these the weights may be others.
        **_calls(
            "Worker", "reload_weights update_weights finish_weight_update reset_weights sleep wake_up apply_model"
        ),
        **_has("Worker", "cache_config model_config model_runner parallel_config rank vllm_config"),
    },
    "vllm.distributed.communication_op": {"tensor_model_parallel_all_reduce": "input_"},
    "vllm.v1.kv_cache_interface": {
        "AttentionSpec": None,
        "ChunkedLocalAttentionSpec": None,
        "MambaSpec": None,
        "SlidingWindowSpec": None,
        "UniformTypeKVCacheSpecs": None,
        **_has("KVCacheConfig", "kv_cache_groups"),
        **_has("KVCacheGroupSpec", "kv_cache_spec layer_names"),
    },
    "vllm.v1.core.sched.output": {
        **_has(
            "SchedulerOutput",
            "finished_req_ids preempted_req_ids scheduled_cached_reqs scheduled_new_reqs",
        ),
        **_has("CachedRequestData", "resumed_req_ids"),
        **_has("NewRequestData", "req_id"),
    },
    "vllm.v1.outputs": {"EMPTY_MODEL_RUNNER_OUTPUT": None},
    "vllm.v1.attention.selector": {"_cached_get_attn_backend": "..."},
    "vllm.v1.attention.backends.registry": {
        "register_backend": "backend, class_path, ...",
        "AttentionBackendEnum.clear_override": "",
        **_has("AttentionBackendEnum", "CPU_ATTN CUSTOM"),
    },
    "vllm.v1.attention.backend": {
        "MultipleOf": None,
        "AttentionMetadataBuilder.build": "common_prefix_len, common_attn_metadata, fast_build",
        **_has(
            "CommonAttentionMetadata",
            "block_table_tensor num_actual_tokens num_reqs query_start_loc query_start_loc_cpu req_idx seq_lens",
        ),
    },
    "vllm.v1.worker.utils": _has("AttentionGroup", "metadata_builders"),
    "vllm.model_executor.layers.attention": _has(
        "Attention",
        "get_attn_backend head_size impl kv_cache kv_cache_dtype kv_sharing_target_layer_name num_heads num_kv_heads "
        "sliding_window",
    ),
    "vllm.model_executor.layers.attention_layer_base": {"AttentionLayerBase": None},
    "vllm.model_executor.custom_op": {"CustomOp.forward": "...", "CustomOp.forward_native": "..."},
    "vllm.model_executor.layers.rotary_embedding.base": _has(
        "RotaryEmbeddingBase", "cos_sin_cache head_size is_neox_style"
    ),
    "vllm.model_executor.layers.rotary_embedding.mrope": _has("MRotaryEmbedding", "mrope_section"),
    "vllm.model_executor.layers.rotary_embedding.phi3_long_rope_scaled_rope": _has(
        "Phi3LongRoPEScaledRotaryEmbedding", "original_max_position_embeddings use_long_rope"
    ),
    "vllm.model_executor.layers.linear": {
        "UnquantizedLinearMethod": None,
        **_has("LinearBase", "quant_method"),
        **_has("RowParallelLinear", "input_size_per_partition output_size_per_partition"),
    },
}

CPU: dict[str, dict[str, str | None]] = {
    "vllm.v1.worker.cpu_worker": {"CPUWorker": None, "CPUWorker.load_model": "..."},
    "vllm.v1.worker.gpu_model_runner": {
        "GPUModelRunner.get_model": "",
        "GPUModelRunner._zero_block_ids": "block_ids",  # P11
        **_has("GPUModelRunner", "attn_groups discard_request_mask input_batch kv_cache_config"),
    },
    "vllm.v1.worker.gpu_input_batch": _has("InputBatch", "generators num_reqs req_ids"),
    "vllm.v1.attention.backends.cpu_attn": {
        "CPUAttentionBackend.get_impl_cls": "",
        "CPUAttentionBackend.get_supported_kernel_block_sizes": "kv_cache_spec",
        "CPUAttentionBackend.get_builder_cls": "",
        "CPUAttentionMetadataBuilder.build": "common_prefix_len, common_attn_metadata, fast_build",
        "CPUAttentionBackendImpl.forward": (
            "layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale"
        ),
        **_has(
            "CPUAttentionBackendImpl",
            "alibi_slopes head_size kv_cache_dtype logits_soft_cap num_heads num_kv_heads scale sinks",
        ),
        **_has("CPUAttentionMetadata", "num_actual_tokens"),
    },
    "vllm._custom_ops": {
        "cpu_attention_with_kv_cache": (
            "query, key_cache, value_cache, output, query_start_loc, seq_lens, scale, causal, alibi_slopes, "
            "sliding_window, block_table, softcap, scheduler_metadata, s_aux, dynamic_causal, k_scale, v_scale, "
            "kv_cache_dtype"
        ),
        "cpu_attn_get_scheduler_metadata": (
            "num_reqs, num_heads, num_kv_heads, head_dim, seq_lens, dtype, query_start_loc, causal, "
            "sliding_window_size, isa, enable_kv_split, dynamic_causal, kv_cache_dtype"
        ),
        "cpu_attn_reshape_and_cache": (
            "key, value, key_cache, value_cache, slot_mapping, isa, k_scale, v_scale, kv_cache_dtype"
        ),
    },
    "vllm.envs": {"VLLM_CPU_ATTN_SPLIT_KV": None},
    "vllm.v1.sample.logits_processor.interface": {
        "LogitsProcessor.__init__": "vllm_config, device, is_pin_memory",
        "LogitsProcessor.is_argmax_invariant": "",
        "LogitsProcessor.update_state": "batch_update",
        "LogitsProcessor.apply": "logits",
    },
    "vllm.v1.sample.logits_processor.builtin": {"process_dict_updates": "req_entries, batch_update, new_state"},
}

_BUILD = "common_prefix_len, common_attn_metadata, fast_build"
_FORWARD = "layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale"


def _stock(prefix: str) -> dict[str, str | None]:
    """Of each of the attention backends of vLLM that ours may stand on."""
    return {
        f"{prefix}Backend.get_impl_cls": "",
        f"{prefix}Backend.get_builder_cls": "",
        f"{prefix}MetadataBuilder.__init__": "...",
        f"{prefix}MetadataBuilder.get_cudagraph_support": "vllm_config, kv_cache_spec",
        f"{prefix}MetadataBuilder.build": _BUILD,
        f"{prefix}MetadataBuilder.build_for_cudagraph_capture": "common_attn_metadata",
        f"{prefix}Impl.__init__": "...",
        f"{prefix}Impl.forward": _FORWARD,
        f"{prefix}Impl.fused_output_quant_supported": "quant_key",
        **_has(f"{prefix}Impl", "alibi_slopes logits_soft_cap scale sinks supports_quant_query_input"),
    }


CUDA: dict[str, dict[str, str | None]] = {
    "vllm.v1.worker.gpu.model_runner": {
        "GPUModelRunner.gather_batch_req_state": "...",  # P5
        "GPUModelRunner.get_model": "",
        **_has("GPUModelRunner", "attn_groups kv_cache_config req_states"),
    },
    "vllm.v1.worker.gpu.states": _has("RequestState", "index_to_req_id max_num_reqs req_id_to_index"),
    "vllm.v1.outputs": {"ModelRunnerOutput": None},
    "vllm.v1.attention.backend": {
        **_has("AttentionCGSupport", "UNIFORM_SINGLE_TOKEN_DECODE"),
        **_has(
            "CommonAttentionMetadata",
            "_num_computed_tokens_cache _token_to_req_indices_cache causal is_prefilling max_query_len "
            "mm_req_doc_ranges positions rswa_prefix_lens seq_lens_cpu_upper_bound slot_mapping",
        ),
        "AttentionImpl": None,
        "AttentionBackend.validate_configuration": (
            "head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, use_mm_prefix, "
            "use_per_head_quant_scales, device_capability, attn_type, ..."
        ),
    },
    "vllm.v1.attention.backends.flash_attn": _stock("FlashAttention"),
    "vllm.v1.attention.backends.triton_attn": _stock("TritonAttention"),
    "vllm.v1.attention.backends.fa_utils": {"get_flash_attn_version": "..."},
    "vllm.v1.worker.gpu.sample.logits_processor.interface": {
        "LogitsProcessor.__init__": "vllm_config, req_states",
        "LogitsProcessor.add_request": "req_idx, sampling_params",
        "LogitsProcessor.apply": "logits, ctx",
        **_has("LogitsContext", "idx_mapping_np seq_lens_upper_bound_np"),
        **_has("LogitsProcRequestState", "prompt_len"),
    },
    "vllm.utils.torch_utils": {"async_tensor_h2d": "data, device, dtype, out"},
}

BY_SIDE = {"serving": SERVING, "engine": ENGINE, "worker": WORKER, "cpu": CPU, "cuda": CUDA}
