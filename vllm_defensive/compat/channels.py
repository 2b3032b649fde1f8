"""What rides on vLLM's own messages between its processes."""

from __future__ import annotations

from typing import Any

from vllm_defensive.counts import Increase, WorkerReport
from vllm_defensive.plan import StepMessage

_MESSAGE = "kv_eviction_message"
_REPORT = "kv_eviction_report"
_COUNTS = "kv_eviction:"


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


def attach_counts(stats: Any, increase: Increase) -> None:
    """Put counts on `SchedulerStats`, whose fields are fixed: as the name of an entry in one of its dictionaries."""
    stats.waiting_lora_adapters[_COUNTS + increase.dumps()] = 0


def take_counts(stats: Any) -> list[Increase]:
    """The counts that ride on these statistics, which others then do not see."""
    carried = stats.waiting_lora_adapters
    keys = [key for key in carried or () if key.startswith(_COUNTS)]
    for key in keys:
        del carried[key]
    return [Increase.loads(key.removeprefix(_COUNTS)) for key in keys]


def reset_requests(scheduler_output: Any) -> set[str]:
    """Requests of which a worker must forget everything before this step: ended, preempted, new, or resumed."""
    cached = scheduler_output.scheduled_cached_reqs
    gone = set(scheduler_output.finished_req_ids) | set(scheduler_output.preempted_req_ids or ())
    gone.update(new.req_id for new in scheduler_output.scheduled_new_reqs)
    gone.update(getattr(cached, "resumed_req_ids", ()))
    return gone
