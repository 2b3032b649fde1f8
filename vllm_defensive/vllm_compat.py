"""Everything that leans on how vLLM 0.32 is made inside: side channels, registrations, and the patches.

Each patch says why it is there, how it is kept harmless, and until when it is needed. With the flag absent only the two
marked *inert* are installed, and they pass every call through unchanged.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from vllm_defensive.plan import StepMessage, WorkerReport

_MESSAGE = "kv_eviction_message"
_REPORT = "kv_eviction_report"
_PATCHED = "__kv_eviction_patched__"


def get_logger(name: str) -> Any:
    """A logger under vLLM's own root, so that its level and format settings hold for our lines as well."""
    from vllm.logger import init_logger

    return init_logger(f"vllm.{name}")


# -- patching ---------------------------------------------------------------------------------------------------------


def patch(owner: Any, attribute: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.attribute` by `make(original)`, once however often it is asked for."""
    original = getattr(owner, attribute)
    if hasattr(original, _PATCHED):
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _PATCHED, True)
    is_static = isinstance(owner.__dict__.get(attribute), staticmethod)
    setattr(owner, attribute, staticmethod(replacement) if is_static else replacement)


def patch_cli(add_flags: Callable[[Any], None]) -> None:
    """P1, inert. Why: vLLM has no hook by which a plugin adds flags. How: after vLLM's own flags are added to a parser,
    add ours. Until: vLLM offers such a hook."""
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
            parser = original(parser, *args, **kwargs)
            add_flags(parser)
            return parser

        return add_cli_args

    patch(EngineArgs, "add_cli_args", make)


def patch_engine_config(before: Callable[[Any], Any], after: Callable[[Any, Any], None]) -> None:
    """P2, inert. Why: scheduler, worker and block size must be chosen before vLLM's platform settles them, and
    combinations checked after. How: `before(engine_args)` returns settings or None; without settings nothing is
    touched. Until: vLLM lets a plugin take part in building its config."""
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            settings = before(self)
            vllm_config = original(self, *args, **kwargs)
            if settings is not None:
                after(vllm_config, settings)
            return vllm_config

        return create_engine_config

    patch(EngineArgs, "create_engine_config", make)


def patch_requests(check: Callable[[Any, Any, Any], None]) -> None:
    """P3, installed only when eviction is on. Why: unknown `extra_args` are not checked by vLLM, and the scheduler must
    never see a bad one. How: `check(vllm_config, prompt, params)` sees what vLLM made of each request, tokens
    included, before the engine does. Until: vLLM checks such fields."""
    from vllm.v1.engine.input_processor import InputProcessor

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            prompt = {"prompt_token_ids": request.prompt_token_ids, "prompt_embeds": request.prompt_embeds}
            check(self.vllm_config, prompt, request.sampling_params)
            return request

        return process_inputs

    patch(InputProcessor, "process_inputs", make)


def patch_generators(check: Callable[[Any, Any, Any], None]) -> None:
    """P6, installed only when eviction is on. Why: vLLM checks a request when its generator is first asked for output,
    and a stream has answered 200 by then. How: P3's check also runs where a server makes the generator, which is before
    any answer begins and after the prompt was tokenized. Until: vLLM checks a stream's parameters before it starts."""
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
            check(self.vllm_config, prompt, sampling_params)
            return original(self, prompt, sampling_params, *args, **kwargs)

        return generate

    def make_for_responses(original: Callable[..., Any]) -> Callable[..., Any]:
        def _generate_with_builtin_tools(self: Any, *, engine_input: Any, sampling_params: Any, **kwargs: Any) -> Any:
            check(self.engine_client.vllm_config, engine_input, sampling_params)
            return original(self, engine_input=engine_input, sampling_params=sampling_params, **kwargs)

        return _generate_with_builtin_tools

    patch(AsyncLLM, "generate", make)
    patch(OpenAIServingResponses, "_generate_with_builtin_tools", make_for_responses)


def patch_bodies(check: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
    """P7, installed only when eviction is on. Why: vLLM's protocol turns `true` in `vllm_xargs` into 1, and drops them
    for beam search, before anyone can look. How: `check(vllm_config, request, raw_request)` runs before a request is
    served, and may read the body again, which is kept. Until: the protocol takes booleans for what they are, and gives
    beam search the fields."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def _with_kv_transfer_rejection_cleanup(self: Any, served: Any, request: Any, raw_request: Any) -> Any:
            try:
                await check(self.engine_client.vllm_config, request, raw_request)
            except BaseException:
                served.close()  # a coroutine that nobody will await
                raise
            return await original(self, served, request, raw_request)

        return _with_kv_transfer_rejection_cleanup

    def make_for_batches(original: Callable[..., Any]) -> Callable[..., Any]:
        async def create_batch_chat_completion(self: Any, request: Any, raw_request: Any = None) -> Any:
            await check(self.engine_client.vllm_config, request, raw_request)
            return await original(self, request, raw_request)

        return create_batch_chat_completion

    patch(GenerateBaseServing, "_with_kv_transfer_rejection_cleanup", make)
    patch(OpenAIServingChatBatch, "create_batch_chat_completion", make_for_batches)


def request_error(message: str, parameter: str, value: Any) -> Exception:
    """An error that vLLM's servers answer with HTTP 400."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(message, parameter=parameter, value=value)


def patch_stat_loggers(make_logger: Callable[[Any, list[int]], Any]) -> None:
    """P4, installed only when eviction is on. Why: the stat-logger plugin group is not read for `LLM` and not for
    servers with several API processes. How: our logger is put first, so that it takes our counts off the stats before
    others see them; engines without eviction get none. Until: that plugin group covers all of them."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            ours = make_logger(vllm_config, self.engine_indexes)
            if ours is not None:
                self.stat_loggers.insert(0, ours)

        return __init__

    patch(StatLoggerManager, "__init__", make)


# -- registrations ----------------------------------------------------------------------------------------------------


def register_spec(spec_cls: type, manager_cls: type, base: type) -> None:
    """Make `manager_cls` the block manager of groups whose spec is `spec_cls`.

    The registry fills itself only while it is empty, so it must have been filled before anything of ours goes in.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec_cls, manager_cls, uniform_type_base_spec=base)


@contextlib.contextmanager
def cpu_attention_backend(class_path: str) -> Iterator[None]:
    """Let the CPU platform hand out `class_path` as its attention backend while a model is loaded.

    The CPU platform ignores the CUSTOM backend and always returns CPU_ATTN, which can be overridden by registration.
    The override ends with the load, so that another engine in the same process gets the stock backend.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.attention.selector import _cached_get_attn_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, class_path)
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        _cached_get_attn_backend.cache_clear()


@contextlib.contextmanager
def custom_attention_backend(vllm_config: Any, class_path: str) -> Iterator[None]:
    """Let the CUDA platform hand out `class_path` as its attention backend while a model is loaded.

    It does so for CUSTOM, which is a backend by registration in this very process. Afterwards the config says again
    what the user said, and another engine in the process gets the stock backend.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.attention.selector import _cached_get_attn_backend

    attention = vllm_config.attention_config
    chosen = attention.backend
    register_backend(AttentionBackendEnum.CUSTOM, class_path)
    _cached_get_attn_backend.cache_clear()
    attention.backend = AttentionBackendEnum.CUSTOM
    try:
        yield
    finally:
        attention.backend = chosen
        AttentionBackendEnum.CUSTOM.clear_override()
        _cached_get_attn_backend.cache_clear()


def prefers_flash_attention(vllm_config: Any) -> bool:
    """Whether prompts go through vLLM's FlashAttention: as the user chose, else where it runs this model. It takes fp8
    caches with fp8 queries only, which eviction does not want, so these are Triton attention's."""
    from vllm.platforms import current_platform

    chosen = vllm_config.attention_config.backend
    if chosen is not None:
        return bool(chosen.name == "FLASH_ATTN")
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if cache.cache_dtype.startswith("fp8"):
        return False
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    except (ImportError, OSError):
        return False
    return get_flash_attn_version() is not None and not FlashAttentionBackend.validate_configuration(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype=cache.cache_dtype,
        block_size=cache.block_size,
        use_mla=False,
        has_sink=False,
        use_sparse=False,
        use_mm_prefix=model.is_mm_prefix_lm,
        use_per_head_quant_scales=False,
        device_capability=current_platform.get_device_capability(),
        attn_type="decoder",
    )


def keep_out_of_decode_graphs(model_runner: Any, when: Callable[[], bool]) -> None:
    """P5, installed only when eviction is on, on the runner of this worker. Why: a prompt whose last chunk is a single
    token counts as decode, and in a graph of the whole model nobody can keep its query. How: while `when()` holds, the
    runner is told that the batch has no uniform length, and takes a graph in pieces, or none. Until: a backend can tell
    the runner so for a step."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def gather_batch_req_state(*args: Any, **kwargs: Any) -> Any:
            batch, uniform_length = original(*args, **kwargs)
            return batch, None if when() else uniform_length

        return gather_batch_req_state

    patch(model_runner, "gather_batch_req_state", make)


# -- copies to the device ---------------------------------------------------------------------------------------------


def to_device(values: Sequence[int], device: Any) -> Any:
    """int32 tensor of these numbers on the device; nobody waits for the copy."""
    import torch
    from vllm.utils.torch_utils import async_tensor_h2d

    return async_tensor_h2d(list(values), device=device, dtype=torch.int32)


def copy_to_device(array: Any, out: Any) -> None:
    """Copy a NumPy array into a device tensor; nobody waits for the copy, and the array may be used again at once."""
    from vllm.utils.torch_utils import async_tensor_h2d

    async_tensor_h2d(array, out=out)


# -- side channels ----------------------------------------------------------------------------------------------------


def attach_message(scheduler_output: Any, message: StepMessage) -> None:
    """Send a message to the workers. An extra attribute of `SchedulerOutput` survives pickling (not
    `dataclasses.replace`)."""
    if message:
        setattr(scheduler_output, _MESSAGE, message)


def read_message(scheduler_output: Any) -> StepMessage:
    """The message that rides on a scheduler output; an empty one if none does."""
    return getattr(scheduler_output, _MESSAGE, None) or StepMessage()


def attach_report(model_runner_output: Any, report: WorkerReport) -> None:
    """Send what a worker did with a step's output, which is the only thing that goes back to the scheduler."""
    if report:
        # Model runner V2 answers with a promise, around the output that it will fill in.
        output = getattr(model_runner_output, "model_runner_output", model_runner_output)
        setattr(output, _REPORT, report)


def is_shared_output(model_runner_output: Any) -> bool:
    """Whether this is the output object that vLLM hands out for every step without tokens."""
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    return model_runner_output is EMPTY_MODEL_RUNNER_OUTPUT


def read_report(model_runner_output: Any) -> WorkerReport | None:
    """What the worker did before this output, None if it does not say."""
    return getattr(model_runner_output, _REPORT, None)


def reset_requests(scheduler_output: Any) -> set[str]:
    """Requests of which a worker must forget everything before this step: ended, preempted, new, or resumed."""
    cached = scheduler_output.scheduled_cached_reqs
    gone = set(scheduler_output.finished_req_ids) | set(scheduler_output.preempted_req_ids or ())
    gone.update(new.req_id for new in scheduler_output.scheduled_new_reqs)
    gone.update(getattr(cached, "resumed_req_ids", ()))
    return gone


def request_ids_of(model_runner: Any) -> Callable[[Any], Sequence[str]]:
    """From a batch's `CommonAttentionMetadata` to the request id of each of its rows, for either model runner."""
    if hasattr(model_runner, "req_states"):
        states = model_runner.req_states

        def v2(common: Any) -> Sequence[str]:
            return [states.index_to_req_id[int(i)] for i in common.req_idx[: common.num_reqs]]

        return v2

    def v1(common: Any) -> Sequence[str]:
        return model_runner.input_batch.req_ids[: common.num_reqs]

    return v1
