"""Patches of the API servers and of the command line."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from vllm_defensive.compat.base import patch


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
            prompt = {name: getattr(request, name) for name in ("prompt_token_ids", "prompt_embeds", "resumable")}
            prompt["mm_placeholders"] = _placeholders(request.mm_features)
            check(self.vllm_config, prompt, request.sampling_params)
            return request

        return process_inputs

    patch(InputProcessor, "process_inputs", make)


def _placeholders(features: Any) -> dict[str, list[Any]]:
    """Where a prompt's images and the like are, by modality, as in the prompts of generators."""
    places: dict[str, list[Any]] = {}
    for feature in features or ():
        places.setdefault(feature.modality, []).append(feature.mm_position)
    return places


def patch_generators(check: Callable[[Any, Any, Any], None]) -> None:
    """P6, installed only when eviction is on. Why: vLLM checks a request when its generator is first asked for output,
    and a stream has answered 200 by then. How: P3's check also runs where a server makes the generator, which is before
    any answer begins and after the prompt was tokenized. Until: vLLM checks a stream's parameters before it starts."""
    from vllm.v1.engine.async_llm import AsyncLLM

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
            check(self.vllm_config, prompt, sampling_params)
            return original(self, prompt, sampling_params, *args, **kwargs)

        return generate

    patch(AsyncLLM, "generate", make)


def patch_responses(check: Callable[[Any, Any, Any], None]) -> None:
    """P6 for `/v1/responses`, whose generator is made late. It imports vLLM's servers: call it where one is to be."""
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def _generate_with_builtin_tools(self: Any, *, engine_input: Any, sampling_params: Any, **kwargs: Any) -> Any:
            check(self.engine_client.vllm_config, engine_input, sampling_params)
            return original(self, engine_input=engine_input, sampling_params=sampling_params, **kwargs)

        return _generate_with_builtin_tools

    patch(OpenAIServingResponses, "_generate_with_builtin_tools", make)


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
