"""How far answers over what a learned score keeps are from those over the full cache, on texts that its weights have
not seen. (One number, its balance with the window's scores, is chosen on the same texts, of four.)

Three tasks, each on every text that was held back: what comes next in it (`text`), and a number that was hidden in it,
asked for behind it when the rest is gone (`later`), or before that, in the observation window (`window`). The answer is
forced, token by token, and what the model says at each of them compared with what it says over the full cache, over the
whole vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vllm_defensive.platforms import PLATFORMS, current
from vllm_defensive.settings.engine import NONE
from vllm_defensive.tools.learn_texts import Encoder
from vllm_defensive.worker.forced import ARGUMENT

POLICIES = ("halokv", "learnedkv", "learned-halokv")
KEEPS = (0.1, 0.2)
TASKS = {"text": "text goes on", "later": "question comes later", "window": "question in the window"}
MOST_LOST = 0.02
"""Nats that the joined score may lose to halokv where the question is in the window: above
what a few dozen answers vary by (0.005 to 0.01), and far below what goes wrong where it does (0.7 on Gemma 3 270M)."""
_NEXT = 64
_DEPTHS = (0.1, 0.35, 0.6, 0.85)
_KEYS = "misty-anchor brave-lantern quiet-harbor golden-falcon rusty-button hidden-canyon icy-walnut noble-comet"


@dataclass(frozen=True)
class Question:
    """A prompt, evicted where it has `boundary` tokens, and the tokens to be forced behind it."""

    task: str
    prompt: list[int]
    boundary: int
    answer: list[int]


def processor() -> str:
    """The logits processor of this platform, as vLLM wants it named. Raises ValueError where there is none."""
    device = next(name for name, platform in PLATFORMS.items() if platform == current())
    return f"vllm_defensive.worker.{device}.forced:ForcedAnswers"


def questions(text: Sequence[int], encoder: Encoder, rng: random.Random, room: int) -> list[Question]:
    """Of one text. room: tokens that the engine takes of a request."""
    behind = min(_NEXT, len(text) // 4)
    boundary = len(text) - behind - 1
    goes_on = Question("text", [*text[: boundary + 1]], boundary, [*text[boundary + 1 :]])
    return [goes_on, *_later(text, encoder, rng, room)]


def _later(text: Sequence[int], encoder: Encoder, rng: random.Random, room: int) -> Iterator[Question]:
    keys = rng.sample(_KEYS.split(), len(_DEPTHS))
    numbers = [str(rng.randrange(1_000_000, 10_000_000)) for _ in keys]
    hidden = [encoder.encode(f" {_said(key)} {number}.") for key, number in zip(keys, numbers, strict=True)]
    head, tail = encoder.turn("") or (encoder.start, [])
    asked = [encoder.encode(f"\n\nWhat is the special magic number for {key}?") for key in keys]
    begun = [encoder.encode(_said(key)) for key in keys]
    gold = [encoder.encode(f" {number}.") for number in numbers]
    beside = len(head) + len(tail) + sum(map(len, hidden)) + max(map(len, asked)) + max(map(len, begun))
    body = text[: room - beside - max(map(len, gold))]
    document, last = [*head], 0
    for depth, needle in zip(_DEPTHS, hidden, strict=True):
        at = int(depth * len(body))
        document += [*body[last:at], *needle]
        last = at
    document += body[last:]
    for i in range(len(keys)):
        prompt = [*document, *asked[i], *tail, *begun[i]]
        yield Question("later", prompt, len(document), gold[i])
        yield Question("window", prompt, len(prompt), gold[i])


def _said(key: str) -> str:
    return f"The special magic number for {key} is:"


Setting = tuple[str, float]
"""Policy and ratio."""
SETTINGS: dict[str, Setting] = {f"{keep} {policy}": (policy, keep) for keep in KEEPS for policy in POLICIES}


def remember(llm: Any, asked: Sequence[Question]) -> None:
    """Have the engine answer from its full cache."""
    _force(llm, [(question, {"of": str(i)}, {"kv_eviction": NONE}) for i, question in enumerate(asked)])


def compare(llm: Any, asked: Sequence[Question], settings: Mapping[str, Setting]) -> None:
    """Have it answer from what these settings keep, by their names, and compare with what was remembered."""
    jobs = [
        (
            question,
            {"of": str(i), "against": f"{question.task} {name} {i}"},
            {"kv_eviction": policy, "kv_eviction_keep": keep, "kv_eviction_boundary": question.boundary},
        )
        for name, (policy, keep) in settings.items()
        for i, question in enumerate(asked)
    ]
    _force(llm, jobs)


def take(llm: Any) -> dict[str, list[float]]:
    """Each answer's mean KL, by "TASK NAME"; all is forgotten."""
    of_ranks = llm.collective_rpc("take_divergences")
    found: dict[str, list[float]] = {}
    for name, per_token in next((of_rank for of_rank in of_ranks if of_rank), {}).items():
        found.setdefault(name.rpartition(" ")[0], []).append(fmean(per_token))
    return found


def _force(llm: Any, jobs: Sequence[tuple[Question, dict[str, Any], dict[str, Any]]]) -> None:
    from vllm.sampling_params import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=len(question.answer),
            ignore_eos=True,
            detokenize=False,
            extra_args={**fields, ARGUMENT: {**names, "tokens": question.answer}},
        )
        for question, names, fields in jobs
    ]
    prompts = [{"prompt_token_ids": question.prompt} for question, *_ in jobs]
    llm.generate(prompts, params, use_tqdm=False)


def means(answers: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """By name, as the file has them: "kl TASK KEEP POLICY"."""
    names = dict.fromkeys(name for of_text in answers for name in of_text)
    return {f"kl {name}": fmean(kl for of_text in answers for kl in of_text.get(name, ())) for name in names}


def lost(checks: Mapping[str, float], name: str) -> float:
    """The sum over the tasks."""
    return sum(checks.get(f"kl {task} {name}", 0.0) for task in TASKS)


def window_keep(checks: Mapping[str, float]) -> float | None:
    """The least of the ratios, all larger ones included, at which the joined score loses at most `MOST_LOST` to the
    window alone where that knows the question. None: at none, as on models of few heads, which cannot hold both."""
    found = None
    for keep in reversed(KEEPS):
        joined, window = (checks.get(f"kl window {keep} {policy}") for policy in (POLICIES[-1], POLICIES[0]))
        if joined is None or window is None or joined - window > MOST_LOST:
            break
        found = keep
    return found


def table(checks: Mapping[str, float]) -> str:
    """For people."""
    lines = [f"{'KL to the full cache, keep':<34}" + "".join(f"{policy:>16}" for policy in POLICIES)]
    for task, described in TASKS.items():
        for keep in KEEPS:
            values = (checks.get(f"kl {task} {keep} {policy}") for policy in POLICIES)
            cells = "".join(f"{'-' if kl is None else format(kl, '.4f'):>16}" for kl in values)
            lines.append(f"{described + f', {keep}':<34}{cells}")
    return "\n".join(lines)
