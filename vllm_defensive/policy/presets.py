"""The table of policies. A policy is a value: a new one is a row here and, if its mathematics is new, one function
in scores/."""

from types import MappingProxyType

from vllm_defensive.policy.definition import Policy

_SINKS = 4  # StreamingLLM's; papers that keep first tokens keep as many
_ADAKV_GUARD = 0.2

_ROWS = (
    Policy(
        name="random",
        summary="tokens drawn at random between the first four and the window: what any policy must beat",
        source="docs/guide.md",
        aggregate="random",
        scope="head",
        pool_kernel=1,
        sinks=_SINKS,
    ),
    Policy(
        name="streamingllm",
        summary="the first four tokens and the most recent ones",
        source="https://arxiv.org/abs/2309.17453",
        aggregate="recency",
        scope="head",
        pool_kernel=1,
        sinks=_SINKS,
    ),
    Policy(
        name="h2o",
        summary="what all queries of the prompt attend to, summed, and the most recent tokens",
        source="https://arxiv.org/abs/2306.14048",
        aggregate="accumulated",
        scope="head",
        pool_kernel=1,
        later="snapkv",  # by recent queries: nobody adds up the attention of all while decoding
    ),
    Policy(
        name="tova",
        summary="what the last query attends to, on average over a layer's heads, which all keep the same tokens",
        source="https://arxiv.org/abs/2401.06104",
        aggregate="last",
        scope="head",
        pool_kernel=1,
    ),
    Policy(
        name="r-kv",
        summary="what the last queries attend to, less how much a key resembles others; made for long answers",
        source="https://arxiv.org/abs/2505.24133",
        aggregate="redundancy",
        scope="head",
        pool="max",
        pool_kernel=7,
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
        later="snapkv",
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
        name="lava",
        summary="average attention of a group's best query head, weighed by the head's largest value; layers keep what "
        "their scores' entropy asks for",
        source="https://arxiv.org/abs/2509.09754",
        aggregate="group-peak",
        scope="layer",
        value_weight="raw-l1-max",
        weight_across="none",
        layer_budget="entropy",
        pool="max",
        pool_kernel=7,
        guard=0.2,  # of the layer's own budget; its code leaves it at the even one's
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
        weight_across="none",
        stages="half-budget",
        guard=_ADAKV_GUARD,
        later="adakv",
    ),
    Policy(
        name="laprox",
        summary="attention's root of squares over the window, times projected value norm, as a share of the layer's",
        source="https://arxiv.org/abs/2605.07234",
        aggregate="l2",
        scope="model",
        value_weight="l2-gram",
        weight_across="none",
        normalise="layer",
        pool_kernel=7,  # and a window of 32, as here
    ),
    Policy(
        name="dropkv",
        summary="how far attention's output moves when a token goes, squared, before its projection",
        source="https://openreview.net/forum?id=MqfNzH3TVH",
        aggregate="dropkv",
        scope="head",
        weight_across="none",
        pool="max",
        pool_kernel=11,  # and a window of 8, which is the engine's to choose
    ),
    Policy(
        name="obcache",
        summary="how the output answers to a change of a token's key, squared",
        source="https://arxiv.org/abs/2510.07651",
        aggregate="obcache",
        scope="head",
        weight_across="none",
        pool="max",
        pool_kernel=7,  # and a window of 16
    ),
    Policy(
        name="deletion",
        summary="how far the projected output moves when a token goes (a reconstruction: the paper's formula is not "
        "known to us)",
        source="https://arxiv.org/abs/2605.08234",
        aggregate="deletion",
        scope="head",
        value_weight="l2-gram",
        weight_across="none",
        pool_kernel=1,
    ),
    Policy(
        name="keydiff",
        summary="keys that are unlike the others; reads no query",
        source="https://arxiv.org/abs/2504.15364",
        aggregate="key-difference",
        scope="head",
        pool_kernel=1,
    ),
    Policy(
        name="capkv-window",
        summary="values that others cannot stand in for, of keys that the window's mean query asks for, where CapKV "
        "takes the mean of all queries",
        source="https://arxiv.org/abs/2604.25975",
        aggregate="capacity-window",
        scope="head",
        pool_kernel=1,
        sinks=_SINKS,  # all that it keeps always; here the window stays as well
    ),
    Policy(
        name="expected-window",
        summary="attention expected of queries spread like the window's, where Expected Attention takes all queries, "
        "times value norm",
        source="https://arxiv.org/abs/2510.00636",
        aggregate="expected-window",
        scope="head",
        value_weight="raw-l2",
        weight_across="none",
        pool_kernel=1,
        sinks=_SINKS,
    ),
    Policy(
        name="headkv",
        summary="HeadKV for images, adapted by us to text: heads that look at the prompt's ends keep these, the others "
        "share the rest evenly, half of it from each half of the prompt",
        source="https://arxiv.org/abs/2605.20600",
        aggregate="stratified",
        scope="model",
        head_budget="typed",
        pool_kernel=1,
        sinks=_SINKS,
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
        later="halokv",
    ),
    Policy(
        name="learnedkv",
        summary="what a repeated prompt would attend to, foretold from each token's key and value by weights learned "
        "for the model: reads no query, at no second prefill",
        source="docs/quality.md",
        aggregate="echo",
        scope="model",
        value_weight="l2-gram",
        pool_kernel=1,
        learned=True,
        fallback="halokv",
    ),
    Policy(
        name="learned-halokv",
        summary="halokv's scores, or the foretold ones where they are larger: for questions now and later, at no "
        "second prefill",
        source="docs/quality.md",
        aggregate="defensive",
        scope="model",
        value_weight="l2-gram",
        halo_tokens=8,
        halo_weight=0.2,
        learned=True,
        later="learnedkv",
        fallback="halokv",
    ),
    Policy(
        name="rdkv",
        summary="mean attention of the queries that see a token; each head's tokens in 16, 8 or 4 bits, whichever "
        "split distorts it least (keys take their token's bits, where RDKV gives them bits by channel)",
        source="https://arxiv.org/abs/2605.08317",
        aggregate="exposure",
        scope="head",
        pool_kernel=1,  # of 5, in the function, which mirrors the prompt's ends
        keeps_window=False,
        widths="16,8,4",
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
        name="random-uneven",
        summary="scores hashed from (layer, head, position), with very uneven heads",
        source="tests",
        aggregate="random-uneven",
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
    policy.check()
    _TABLE[policy.name] = policy


def public_names() -> tuple[str, ...]:
    """Names that are offered to users, in the table's order."""
    return tuple(policy.name for policy in _TABLE.values() if not policy.internal)


def get_policy(name: str) -> Policy:
    """The policy of that name, internal ones included. ValueError names the allowed values."""
    if name not in PRESETS:
        raise ValueError(f"KV eviction policy {name!r} is unknown: choose one of {', '.join(public_names())}")
    return PRESETS[name]
