"""The table of policies. A policy is a value: a new one is a row here and, if its mathematics is new, one function
in scoring.py."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Aggregate = Literal["recency", "mean", "defensive", "uniform", "random"]
ValueWeight = Literal["none", "l1", "l2-gram"]
Scope = Literal["head", "layer", "model"]
Stages = Literal["none", "half-budget", "mass"]
WindowBias = Literal["reference", "true"]


@dataclass(frozen=True)
class Policy:
    """What to keep of a prompt's KV cache: how tokens are scored, and who shares one budget."""

    name: str
    summary: str
    source: str
    """URL of the paper, or of what defines the policy."""
    aggregate: Aggregate
    """How the attention of window and group becomes one number a token."""
    scope: Scope
    """Who shares a budget: each head has its own, the heads of a layer, or all heads of all layers."""
    value_weight: ValueWeight = "none"
    """Weight scores by || v Wo ||: exactly (l1), or through the Gram matrix (l2-gram)."""
    stages: Stages = "none"
    """Tokens kept for certain: half a head's budget (CriticalKV), or those that carry its attention (DefensiveKV)."""
    pool_kernel: int = 5
    """Tokens that are averaged along the prompt; odd, 1 means none."""
    window_bias: WindowBias = "reference"
    """Mass that stage 1 takes off its threshold: that of the W keys before the window, or of the window itself."""
    guard: float = 0.0
    """Share of an even budget that no head may lose."""
    internal: bool = False
    """For tests and measurements; not offered to users."""
    keep_all: bool = False
    """Evict nothing, but pack the cache as any other policy does."""

    @property
    def needs_queries(self) -> bool:
        """Whether scores read the window's queries and the keys."""
        return self.aggregate in ("mean", "defensive")

    @property
    def needs_values(self) -> bool:
        """Whether scores read the values and the output projection."""
        return self.value_weight != "none"


_ADAKV_GUARD = 0.2

_ROWS = (
    Policy(
        name="streamingllm",
        summary="the first four tokens and the most recent ones",
        source="https://arxiv.org/abs/2309.17453",
        aggregate="recency",
        scope="head",
        pool_kernel=1,
    ),
    Policy(
        name="snapkv",
        summary="what the last queries attend to on average; the same count in every head",
        source="https://arxiv.org/abs/2404.14469",
        aggregate="mean",
        scope="head",
    ),
    Policy(
        name="adakv",
        summary="snapkv's scores; the heads of a layer compete for its budget",
        source="https://arxiv.org/abs/2407.11550",
        aggregate="mean",
        scope="layer",
        guard=_ADAKV_GUARD,
    ),
    Policy(
        name="criticalkv",
        summary="adakv's budgets; half of each by attention, half by attention and projected value norm",
        source="https://arxiv.org/abs/2502.03805",
        aggregate="mean",
        scope="layer",
        value_weight="l1",
        stages="half-budget",
        guard=_ADAKV_GUARD,
    ),
    Policy(
        name="defensivekv",
        summary="worst-case attention, never below the head's mean; the heads of a layer compete",
        source="https://arxiv.org/abs/2510.13334",
        aggregate="defensive",
        scope="layer",
        value_weight="l1",
        stages="mass",
    ),
    Policy(
        name="layer-defensivekv",
        summary="defensivekv's scores; all heads of all layers compete for one budget",
        source="https://arxiv.org/abs/2510.13334",
        aggregate="defensive",
        scope="model",
        value_weight="l1",
        stages="mass",
    ),
    Policy(
        name="keep-all",
        summary="keeps every token, packed as any policy packs: its output must equal stock vLLM's",
        source="tests",
        aggregate="uniform",
        scope="head",
        pool_kernel=1,
        internal=True,
        keep_all=True,
    ),
    Policy(
        name="random",
        summary="scores hashed from (layer, head, position), with very uneven heads",
        source="tests",
        aggregate="random",
        scope="model",
        pool_kernel=1,
        internal=True,
    ),
)

PRESETS: MappingProxyType[str, Policy] = MappingProxyType({policy.name: policy for policy in _ROWS})
assert len(PRESETS) == len(_ROWS), "two policies share a name"


def public_names() -> tuple[str, ...]:
    """Names that are offered to users, in the table's order."""
    return tuple(policy.name for policy in _ROWS if not policy.internal)


def get_policy(name: str) -> Policy:
    """The policy of that name, internal ones included. ValueError names the allowed values."""
    if name not in PRESETS:
        raise ValueError(f"KV eviction policy {name!r} is unknown: choose one of {', '.join(public_names())}")
    return PRESETS[name]
