"""Answers forced token by token, and how far from what the full cache says the model is at each of them.

Logits processors, vLLM's public hook: the rows of logits stay where they are, on every worker that samples, and what
comes back is a number a token. Each runner of vLLM's has a kind of its own (`cpu/forced.py`, `cuda/forced.py`); this is
what they share.

A request is forced if its `extra_args` hold, under `ARGUMENT`:

    {"of": a name, "tokens": the answer's ids}                         its rows are kept under the name
    {"of": a name, "tokens": ..., "against": a name of its own}        they are compared with those that were kept
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

ARGUMENT = "vllm_defensive_forced"


@dataclass(frozen=True)
class Answer:
    """One request's: `tokens` are forced, `of` names the full cache's, `against` what it is compared as, None: it is
    the full cache's."""

    of: str
    tokens: list[int]
    against: str | None = None


def answer_of(params: Any) -> Answer | None:
    """Of a request's sampling parameters. None: it is not forced."""
    given = (params.extra_args or {}).get(ARGUMENT)
    return None if given is None else Answer(**given)


@dataclass
class Forced:
    """What this process has kept and compared since `take`. A row that comes again, as those of a prompt's chunks do,
    takes the place of the one before."""

    rows: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    divergence: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def force(self, answer: Answer, position: int, logits_V: Tensor) -> None:
        """Look at the logits of the answer's token at `position`, and leave them no choice but that token."""
        if not 0 <= position < len(answer.tokens):
            return
        logprobs_V = logits_V.float().log_softmax(dim=-1)
        if answer.against is None:
            self.rows[answer.of, position] = logprobs_V
        elif (full_V := self.rows.get((answer.of, position))) is not None:
            found = (full_V.exp() * (full_V - logprobs_V)).nan_to_num_().sum()
            self.divergence.setdefault(answer.against, {})[position] = found
        logits_V.fill_(float("-inf"))
        logits_V[answer.tokens[position]] = 0.0

    def take(self) -> dict[str, list[float]]:
        """KL(full || compared) at each token, in nats, by `against`; all is forgotten."""
        found = {name: [float(of[i]) for i in sorted(of)] for name, of in self.divergence.items()}
        self.rows.clear()
        self.divergence.clear()
        return found


FORCED = Forced()
"""This process's: vLLM makes the processor, and the worker has no other way to it."""
