"""The table of policies. A policy is a value: a new one is a row here and, if its mathematics is new, one function
in scoring.py."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch import Tensor

Aggregate = Literal["recency", "mean", "cake", "defensive", "accumulated", "echo", "custom", "uniform", "random"]
Reconstruction = Literal["none", "chunk", "all"]
ValueWeight = Literal["none", "l1", "l2-gram"]
Scope = Literal["head", "layer", "model"]
LayerBudget = Literal["even", "linear", "preference"]
Stages = Literal["none", "half-budget", "mass"]
WindowBias = Literal["reference", "true"]


@dataclass(frozen=True)
class Policy:
    """What to keep of a prompt's KV cache: how tokens are scored, and who shares one budget."""

    name: str
    summary: str
    source: str
    """URL of the paper, or the document of this repository that defines the policy."""
    aggregate: Aggregate
    """How the attention of window and group, or of the whole prompt ("accumulated"), becomes one number a token; "echo"
    reads no attention but that of `reconstruction`."""
    scope: Scope
    """Who shares a budget: each head has its own, the heads of a layer, or all heads of all layers."""
    value_weight: ValueWeight = "none"
    """Weight scores by || v Wo ||: exactly (l1), or its L2 norm through a factor of the Gram matrix (l2-gram)."""
    layer_budget: LayerBudget = "even"
    """Of scope "head": every layer keeps the same, or falling linearly from the first (PyramidKV), or in proportion to
    how spread and how changing its attention is (CAKE). All heads of a layer keep the same count."""
    stages: Stages = "none"
    """Tokens kept for certain: half a head's budget (CriticalKV), or those that carry its attention (DefensiveKV)."""
    pool_kernel: int = 5
    """Tokens that are averaged along the prompt; odd, 1 means none."""
    halo_tokens: int = 0
    """Tokens to either side of a token that inherit a share of its score, which it keeps; 0 means none."""
    halo_weight: float = 0.0
    """That share."""
    window_bias: WindowBias = "reference"
    """Mass that stage 1 takes off its threshold: that of the W keys before the window, or of the window itself."""
    guard: float = 0.0
    """Share of an even budget that no head may lose."""
    reconstruction: Reconstruction = "none"
    """A second look: the model repeats the prompt, and a token's score is the largest attention that any query of that
    pass pays it, if that is larger than its score from elsewhere. Normalised over the chunk that is being repeated
    (with the first tokens and the repetition so far, as in KVzip), or over all that a query sees."""
    fallback: str | None = None
    """Of policies with a second look: the one that serves a request which cannot be repeated."""
    keeps_window: bool = True
    """Whether the window is kept whatever its scores."""
    score: Callable[..., Tensor] | None = None
    """Of "custom": called for each layer with query_WQD, key_HSD, value_HSD, output_QDM and scale as keywords (see
    `score_layer`); returns fp32 [H, T], T the tokens before the window, larger is kept."""
    internal: bool = False
    """For tests and measurements; not offered to users."""
    keep_all: bool = False
    """Evict nothing, but pack the cache as any other policy does."""

    @property
    def needs_queries(self) -> bool:
        """Whether scores read the window's queries and the keys."""
        return self.aggregate in ("mean", "cake", "defensive", "custom")

    @property
    def reconstructs(self) -> bool:
        """Whether scores read the attention of a second pass over the prompt."""
        return self.reconstruction != "none"

    @property
    def accumulates(self) -> bool:
        """Whether scores read the attention of every query of the prompt: its prefill takes no prefix-cache hits, since
        nobody caches queries, and sums attention chunk by chunk."""
        return self.aggregate == "accumulated"

    @property
    def needs_values(self) -> bool:
        """Whether scores read the values and the output projection."""
        return self.value_weight != "none" or self.aggregate == "custom"

    @property
    def needs_all_values(self) -> bool:
        """Whether the values of tokens that are not up for eviction count too: stage 1 of "mass" lifts to a maximum
        over all, and of a foreign score we know nothing."""
        return self.stages == "mass" or self.aggregate == "custom"

    def first_value(self, start: int) -> int:
        """The first token or block whose values are read, where `start` is the first that may be evicted."""
        return 0 if self.needs_all_values else start

    @property
    def layers_apart(self) -> bool:
        """Whether a layer's choice does not depend on the other layers."""
        return self.scope != "model" and self.layer_budget == "even"


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
        name="h2o",
        summary="what all queries of the prompt attend to, summed, and the most recent tokens",
        source="https://arxiv.org/abs/2306.14048",
        aggregate="accumulated",
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
        name="pyramidkv",
        summary="snapkv's scores; the first layers keep most, the last ones least",
        source="https://arxiv.org/abs/2406.02069",
        aggregate="mean",
        scope="head",
        layer_budget="linear",
    ),
    Policy(
        name="cake",
        summary="attention and how it changes over the window; layers keep what their attention's spread asks for",
        source="https://arxiv.org/abs/2503.12491",
        aggregate="cake",
        scope="head",
        layer_budget="preference",
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
        name="halokv",
        summary="layer-defensivekv's worst case, each peak with the tokens around it, nothing certain beforehand",
        source="docs/quality.md",
        aggregate="defensive",
        scope="model",
        value_weight="l2-gram",
        halo_tokens=8,
        halo_weight=0.2,
    ),
    Policy(
        name="kvzip",
        summary="what the model attends to when it repeats the prompt: for later questions, at a second prefill",
        source="https://arxiv.org/abs/2505.23416",
        aggregate="echo",
        scope="model",
        pool_kernel=1,
        reconstruction="chunk",
        fallback="halokv",
        keeps_window=False,
    ),
    Policy(
        name="echokv",
        summary="halokv's scores, or those of a repeated prompt where they are larger: for questions now and later",
        source="docs/quality.md",
        aggregate="defensive",
        scope="model",
        value_weight="l2-gram",
        halo_tokens=8,
        halo_weight=0.2,
        reconstruction="all",
        fallback="halokv",
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

_TABLE: dict[str, Policy] = {policy.name: policy for policy in _ROWS}
assert len(_TABLE) == len(_ROWS), "two policies share a name"
PRESETS: MappingProxyType[str, Policy] = MappingProxyType(_TABLE)


def register(policy: Policy) -> None:
    """Add a row to the table. ValueError if its name is taken by another row or the row contradicts itself."""
    if _TABLE.get(policy.name, policy) != policy or policy.name == "none":
        raise ValueError(f"KV eviction policy {policy.name!r} exists already: choose another name")
    if (policy.score is not None) != (policy.aggregate == "custom"):
        raise ValueError(f"KV eviction policy {policy.name!r}: `score` goes with aggregate='custom' and with no other")
    if policy.accumulates and policy.value_weight != "none":
        raise ValueError(f"KV eviction policy {policy.name!r}: aggregate='accumulated' goes without value_weight")
    if policy.layer_budget != "even" and policy.scope != "head":
        raise ValueError(f"KV eviction policy {policy.name!r}: layer_budget={policy.layer_budget!r} needs scope='head'")
    if policy.aggregate == "echo" and not policy.reconstructs:
        raise ValueError(f"KV eviction policy {policy.name!r}: aggregate='echo' needs a reconstruction")
    _TABLE[policy.name] = policy


def public_names() -> tuple[str, ...]:
    """Names that are offered to users, in the table's order."""
    return tuple(policy.name for policy in _TABLE.values() if not policy.internal)


def get_policy(name: str) -> Policy:
    """The policy of that name, internal ones included. ValueError names the allowed values."""
    if name not in PRESETS:
        raise ValueError(f"KV eviction policy {name!r} is unknown: choose one of {', '.join(public_names())}")
    return PRESETS[name]
