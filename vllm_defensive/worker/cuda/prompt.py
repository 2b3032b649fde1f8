"""What the CUDA evictor holds of a request between its scores and its packing, and which policies the kernels score."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vllm_defensive.plan import Score
from vllm_defensive.policy import LayerScores, Policy
from vllm_defensive.worker.cuda.again import Candidates
from vllm_defensive.worker.softmax import Softmax
from vllm_defensive_kernels import RaggedTokens

KERNEL_AGGREGATES = ("mean", "defensive")
KERNEL_POOLS = (1, 3, 5)
KERNEL_WEIGHTS = ("none", "l1", "l2-gram")


def kernels_know(policy: Policy) -> bool:
    """Whether the kernels have what the policy asks of attention, keys and values; the rest is arithmetic on scores."""
    foretold = policy.aggregate == "echo" and policy.learned
    pools = policy.pool == "mean" and policy.pool_kernel in KERNEL_POOLS
    return (policy.aggregate in KERNEL_AGGREGATES or foretold) and pools and policy.value_weight in KERNEL_WEIGHTS


@dataclass(frozen=True)
class LayerScales:
    """Of one reader. key, value: what its fp8 keys and values are multiplied with when they are read; 1 for other
    dtypes."""

    softmax: Softmax
    key: float = 1.0
    value: float = 1.0

    @property
    def of_a_launch(self) -> tuple[float, float, bool, float]:
        """What layers have in common whose windows are scored in one launch."""
        return self.softmax.scale, self.softmax.cap, self.softmax.void_Q is None, self.key


@dataclass(frozen=True)
class Prompt:
    """One request's tensors: window queries `[A, W, Q, D]` and what a second look saw, fp32 `[L, H, S]`, None if they
    are not read; block table int32 `[1, blocks]` and its scored tokens; the part of both whose values weigh.

    window: tokens behind those, which are not scored. evictable: `[start, stop)` of these tokens, by their number here.
    first_token: position of the first of them; 0 but of lasting policies."""

    score: Score
    policy: Policy
    window_AWQD: Tensor | None
    peak_LHS: Tensor | None
    table_1B: Tensor
    tokens: RaggedTokens
    value_table_1B: Tensor
    value_tokens: RaggedTokens
    window: int
    evictable: tuple[int, int]
    first_token: int = 0

    @property
    def total(self) -> int:
        return self.tokens.total + self.window


@dataclass(frozen=True)
class Scored:
    """A request between `score` and `pack`."""

    prompt: Prompt
    layers: list[LayerScores]


@dataclass(frozen=True)
class ScoredAgain:
    """A request whose packed tokens will be, or are, chosen from again, between `score` and `pack`. table_B: int32, the
    blocks behind what is packed."""

    policy: Policy
    table_B: Tensor
    candidates: Candidates
