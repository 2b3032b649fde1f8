"""What a policy is: a value, whose fields say how tokens are scored and who shares a budget. See `presets.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vllm_defensive.packing import LADDER
from vllm_defensive.policy.aggregates import AGGREGATES, Aggregate

ValueWeight = Literal["none", "l1", "l2-gram", "raw-l2", "raw-l1-max"]
WeightAcross = Literal["heads", "none"]
Pool = Literal["mean", "max"]
Normalise = Literal["none", "layer"]
Reconstruction = Literal["none", "chunk", "all"]
Scope = Literal["head", "layer", "model"]
LayerBudget = Literal["even", "linear", "preference", "entropy"]
HeadBudget = Literal["scope", "typed"]
Stages = Literal["none", "half-budget", "mass"]
WindowBias = Literal["reference", "true"]
Widths = Literal["16", "k8v4", "8", "4", "8,4", "16,8,4"]


@dataclass(frozen=True)
class Policy:
    """What to keep of a prompt's KV cache: how tokens are scored, and who shares one budget."""

    name: str
    summary: str
    source: str
    """URL of the paper, or the document of this repository that defines the policy."""
    aggregate: str
    """How the attention of window and group, of the whole prompt ("accumulated"), or the cache alone becomes one number
    a token: the name of a function in `scores/`."""
    scope: Scope
    """Who shares a budget: each head has its own, the heads of a layer, or all heads of all layers."""
    value_weight: ValueWeight = "none"
    """Weight scores by || v Wo ||: exactly (l1), or its L2 norm through a factor of the Gram matrix (l2-gram). Or by
    values as they are cached: || v ||_2 (raw-l2), or one number a head, its largest || v ||_1 (raw-l1-max)."""
    weight_across: WeightAcross = "heads"
    """The weight is divided by its sum over the layer's heads, token by token (DefensiveKV), or taken as it is."""
    normalise: Normalise = "none"
    """Scores of a layer, all heads together, sum to 1 ("layer"), so that layers compete by shares."""
    layer_budget: LayerBudget = "even"
    """Of scopes "head" and "layer": every layer keeps the same, or falling linearly from the first (PyramidKV), or in
    proportion to how spread and how changing its attention is (CAKE), or to its scores' entropy (LAVa)."""
    head_budget: HeadBudget = "scope"
    """What heads share is handed out by score, or by their type: local ones keep the prompt's ends, the others share
    what is left evenly (HeadKV)."""
    stages: Stages = "none"
    """Tokens kept for certain: half a head's budget (CriticalKV), or those that carry its attention (DefensiveKV)."""
    pool: Pool = "mean"
    """What becomes of neighbouring tokens along the prompt: their average, or their largest."""
    pool_kernel: int = 5
    """How many tokens; odd, 1 means none."""
    halo_tokens: int = 0
    """Tokens to either side of a token that inherit a share of its score, which it keeps; 0 means none."""
    halo_weight: float = 0.0
    """That share."""
    sinks: int = 0
    """First tokens of the prompt, which are above all others whatever their scores."""
    window_bias: WindowBias = "reference"
    """Mass that stage 1 takes off its threshold: that of the W keys before the window, or of the window itself."""
    guard: float = 0.0
    """Share of an even budget that no head may lose; where layers have budgets of their own, of its layer's."""
    reconstruction: Reconstruction = "none"
    """A second look: the model repeats the prompt, and a token's score is the largest attention that any query of that
    pass pays it, if that is larger than its score from elsewhere. Normalised over the chunk that is being repeated
    (with the first tokens and the repetition so far, as in KVzip), or over all that a query sees."""
    learned: bool = False
    """What a second look would see is foretold instead, from each token's own key and value, by weights that were
    learned for the model (`vllm_defensive_kernels.learned`)."""
    later: str | None = None
    """The policy that evicts what is generated, and what is left of the prompt, in the place of this one."""
    fallback: str | None = None
    """The policy that serves a request which cannot be repeated, or whose keys stand at positions of their own."""
    keeps_window: bool = True
    """Whether the window is kept whatever its scores."""
    widths: Widths = "16"
    """Bits in which what is kept is packed (`packing.WIDTHS`), unless a request or the server says otherwise."""
    score: Callable[..., Tensor] | None = None
    """Of "custom": called for each layer with query_WQD, key_HSD, value_HSD, output_QDM and scale as keywords (see
    `score_layer`; cap and void it is not told); returns fp32 [H, T], T the tokens before the window, larger is kept."""
    internal: bool = False
    """For tests and measurements; not offered to users."""
    keep_all: bool = False
    """Evict nothing, but pack the cache as any other policy does."""

    @property
    def needs_queries(self) -> bool:
        """Whether scores read the window's queries and the keys."""
        return self._function.reads == "queries"

    @property
    def needs_keys(self) -> bool:
        """Whether scores read the keys."""
        return self.learned or self._function.reads in ("queries", "keys")

    @property
    def accumulates(self) -> bool:
        """Whether scores read the attention of every query of the prompt: its prefill takes no prefix-cache hits, since
        nobody caches queries, and sums attention chunk by chunk."""
        return self._function.reads == "mass"

    @property
    def reconstructs(self) -> bool:
        """Whether scores read the attention of a second pass over the prompt."""
        return self.reconstruction != "none"

    @property
    def needs_window(self) -> bool:
        """Whether the window must have been seen: by all but those that go by the second pass alone, seen or
        foretold."""
        return self._function.reads != "echo"

    @property
    def lasting(self) -> bool:
        """Whether a token's score is its own, the same at any time: kept tokens need not be scored again."""
        return self._function.reads == "nothing" or (self.learned and not self.needs_window)

    @property
    def evicts_answers_by(self) -> str | None:
        """The policy by which a request is evicted again while it generates; None: it cannot be."""
        return self.later or (self.name if self.lasting or self._scores_again else None)

    @property
    def _scores_again(self) -> bool:
        """Whether what is left of a request can be scored anew by a later window, and chosen from by that alone."""
        plain = self.stages != "half-budget" and self.layer_budget == "even" and self.head_budget == "scope"
        return self._function.gaps and plain and not self.reconstructs

    @property
    def needs_values(self) -> bool:
        """Whether scores read the values."""
        return self.learned or self.value_weight != "none" or self._function.values != "none"

    @property
    def needs_projection(self) -> bool:
        """Whether scores read the output projection itself, of which "l2-gram" reads no more than a factor."""
        return self.value_weight == "l1" or self.aggregate == "custom"

    @property
    def needs_all_values(self) -> bool:
        """Whether the values of tokens that are not up for eviction count too: in what is said of a layer as a whole,
        such as the maximum to which stage 1 of "mass" lifts, or in the function; of a foreign one we know nothing."""
        whole = self.stages == "mass" or self.normalise == "layer" or self.layer_budget == "entropy"
        return self._function.values == "all" or self.value_weight == "raw-l1-max" or (self.needs_values and whole)

    def first_value(self, start: int) -> int:
        """The first token or block whose values are read, where `start` is the first that may be evicted."""
        return 0 if self.needs_all_values else start

    @property
    def layers_apart(self) -> bool:
        """Whether a layer's choice, and where its pages lie, does not depend on the other layers."""
        return self.scope != "model" and self.layer_budget == "even" and self.widths != LADDER

    @property
    def _function(self) -> Aggregate:
        return AGGREGATES[self.aggregate]

    def check(self) -> None:
        """ValueError if the fields contradict each other."""
        wrong = f"KV eviction policy {self.name!r}: "
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"{wrong}aggregate={self.aggregate!r}: choose one of {', '.join(AGGREGATES)}")
        if (self.score is not None) != (self.aggregate == "custom"):
            raise ValueError(f"{wrong}`score` goes with aggregate='custom' and with no other")
        if self.accumulates and self.value_weight != "none":
            raise ValueError(f"{wrong}aggregate='accumulated' goes without value_weight")
        if self._function.reads == "echo" and not (self.reconstructs or self.learned):
            raise ValueError(f"{wrong}aggregate={self.aggregate!r} needs a reconstruction, or learned=True")
        if self.learned and self.reconstructs:
            raise ValueError(f"{wrong}learned=True stands for a second look: choose reconstruction='none'")
        if self._function.weighs and self.weight_across != "none":
            raise ValueError(f"{wrong}aggregate={self.aggregate!r} weighs values itself: choose weight_across='none'")
        if self.stages == "mass" and self.aggregate not in ("mean", "cake", "defensive"):
            raise ValueError(f"{wrong}stages='mass' needs aggregate='mean', 'cake' or 'defensive'")
        if self.aggregate == "defensive" and self.pool != "mean":
            raise ValueError(f"{wrong}pool={self.pool!r} goes with other aggregates than 'defensive'")
        if self.layer_budget == "preference" and self.aggregate != "cake":
            raise ValueError(f"{wrong}layer_budget='preference' needs aggregate='cake'")
        if self.head_budget == "typed" and self.aggregate != "stratified":
            raise ValueError(f"{wrong}head_budget='typed' needs aggregate='stratified'")
        if self.layer_budget != "even" and self.scope == "model":
            raise ValueError(f"{wrong}layer_budget={self.layer_budget!r} needs scope='head' or 'layer'")
        if self.widths == LADDER and self.scope != "head":
            raise ValueError(f"{wrong}widths={LADDER!r} needs scope='head'")
        if self.head_budget == "typed" and (self.scope == "head" or self.layer_budget != "even"):
            raise ValueError(f"{wrong}head_budget='typed' needs scope='layer' or 'model', and layer_budget='even'")
