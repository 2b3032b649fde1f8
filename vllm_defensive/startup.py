"""From settings to a vLLM config: choose our classes, refuse what does not work, before any process is started."""

from __future__ import annotations

from typing import Any

from vllm_defensive import learned, platforms
from vllm_defensive.compat import contract
from vllm_defensive.compat import serving as patches
from vllm_defensive.compat.base import get_logger
from vllm_defensive.platforms import refusal
from vllm_defensive.settings.engine import AUTO, KEY, NONE, EvictionConfig, option_name, parse
from vllm_defensive.tools import learn

logger = get_logger("kv_eviction")
SCHEDULER = "vllm_defensive.engine.scheduler.make_scheduler"


def prepare(engine_args: Any) -> EvictionConfig | None:
    """Set the engine arguments that eviction needs; None (and nothing touched) if it is off.

    Raises ValueError for wrong settings and for options that contradict it.
    """
    additional = engine_args.additional_config
    if not isinstance(additional, dict) or KEY not in additional:
        return None
    settings = parse(additional[KEY])
    # The caller's own dict, perhaps of several engines, stays as it is.
    engine_args.additional_config = additional = {k: v for k, v in additional.items() if k != KEY}
    if settings is None:
        return None
    contract.require(*contract.all_sides())
    from vllm.engine.arg_utils import AsyncEngineArgs

    from vllm_defensive.serving import checks

    platform = platforms.current()
    worker, block = platform
    settings = platforms.choose_policies(with_learned_score(settings, engine_args), platform)
    settings = platforms.choose_repeats(platforms.choose_widths(settings, platform), platform)
    if settings.classes == ("16",) and platform == platforms.PLATFORMS["cpu"]:
        logger.warning_once(
            "KV eviction packs 16 bits only: no C++ compiler with OpenMP was found (g++, clang++, or CXX)"
        )
    for name, ours, unset in (("scheduler_cls", SCHEDULER, None), ("worker_cls", worker, "auto")):
        chosen = getattr(engine_args, name)
        if chosen not in (unset, ours):
            raise ValueError(refusal(name, chosen, f"it needs its own; drop --{name.replace('_', '-')}"))
        setattr(engine_args, name, ours)
    if engine_args.block_size is None:
        engine_args.block_size = block
    elif engine_args.block_size % block:
        raise ValueError(refusal("block_size", engine_args.block_size, f"choose a multiple of {block}"))
    patches.patch_stat_loggers(_make_stat_logger)
    patches.patch_requests(checks.check_request)
    patches.patch_generators(checks.check_request)
    if isinstance(engine_args, AsyncEngineArgs):  # a server's: `LLM` does not wait for the import of vLLM's servers
        patches.patch_responses(checks.check_request)
        patches.patch_bodies(checks.check_body)
    additional[KEY] = settings.as_json()
    return settings


def settle(vllm_config: Any, settings: EvictionConfig) -> EvictionConfig:
    """What `prepare` returned, once vLLM has settled its own options: the default of what depends on them, for this
    engine's processes and for those who ask this one."""
    from vllm_defensive.serving import status  # it imports a web framework, which engines without eviction need not

    settings = settings.settled(bool(vllm_config.cache_config.enable_prefix_caching))
    # The arguments' own dict stays as it is: another engine may be made of it.
    vllm_config.additional_config = {**vllm_config.additional_config, KEY: settings.as_json()}
    status.configure(vllm_config.additional_config[KEY])
    return settings


def with_learned_score(settings: EvictionConfig, engine_args: Any) -> EvictionConfig:
    """The settings with the model's learned score, the one that was named or the one that is found.

    Where there is none and the settings say so it is made here, before anything of the engine is there: in the process
    that asked for the engine, or, of several API servers, in the one that starts them, whose file the others find.

    Raises ValueError for a file that was named and is none or another model's, for settings that go by one where there
    is none, and if it could not be made.
    """
    if settings.learning is not None:
        return settings
    model = engine_args.model
    of_model = learned.fingerprint(model, engine_args.revision, engine_args.download_dir)
    if settings.score_file is not None:
        try:
            score = learned.load(settings.score_file)
            learned.check(score, settings.score_file, of_model)
        except ValueError as error:
            raise ValueError(f"{option_name('learned')}={error}") from None
        return going_by(settings, settings.score_file, score)
    if settings.learned is None:
        if (found := learned.find(of_model)) is None and settings.learn:
            learn.in_own_process(engine_args)  # which may have fetched the model first
            found = learned.find(learned.fingerprint(model, engine_args.revision, engine_args.download_dir))
        if found is not None:
            return going_by(settings, *found)
    what = "weight files here yet, by which its learned score is found" if of_model is None else "learned score yet"
    why = f"has no {what}"
    way_out = f"{learned.COMMAND} {model}"
    wanted = [("score", str(settings.score)), ("policy", settings.policy)]
    wanted += [("policies", policy) for policy in settings.policies or ()]
    for field, value in wanted:
        if value == "learned" or not settings.is_there(value):
            if settings.learned == NONE:
                raise ValueError(
                    f"{option_name(field)}={value}: goes by a learned score; drop {option_name('learned')}=none"
                )
            raise ValueError(f"{option_name(field)}={value}: {model} {why}; make it with {way_out}")
    if AUTO in settings.choices and settings.learned is None:
        logger.info_once("KV eviction: %s %s; %s makes one", model, why, way_out)
    return settings


def going_by(settings: EvictionConfig, path: str, score: learned.LearnedScore) -> EvictionConfig:
    """The settings, with this learned score."""
    return settings.model_copy(update={"learned": path, "window_keep": score.facts.window_keep})


def add_echo_slot(vllm_config: Any, settings: EvictionConfig | None) -> None:
    """Give an echo a place in the workers' batches beside the requests', if a policy that may be chosen needs one: it
    must not wait for those that wait for it. As many requests run at once as before."""
    if settings is not None and settings.reconstructs:
        scheduler = vllm_config.scheduler_config
        scheduler.max_num_active_seqs = scheduler.max_num_active_seqs or scheduler.max_num_seqs
        scheduler.max_num_seqs += 1


def _make_stat_logger(vllm_config: Any, engine_indexes: list[int]) -> Any:
    from vllm_defensive.serving.prometheus import make_logger

    return make_logger(vllm_config, engine_indexes)
