"""What to keep: scores, budgets and the choice of pages. Pure torch, no vLLM; a policy sees tensors.

`score_layer` once a layer, then `select` once a request.
"""

from vllm_defensive.policy.budget import kept_fraction, reference_budget
from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.layer import Attention, LayerScores, ReduceHeads
from vllm_defensive.policy.presets import PRESETS, get_policy, public_names, register
from vllm_defensive.policy.scoring import score_layer, settle
from vllm_defensive.policy.selection import NOTHING, Selection, select, select_packed, select_within
from vllm_defensive.policy.third_party import load as _load_third_party

__all__ = [
    "NOTHING",
    "PRESETS",
    "Attention",
    "LayerScores",
    "Policy",
    "ReduceHeads",
    "Selection",
    "get_policy",
    "kept_fraction",
    "public_names",
    "reference_budget",
    "register",
    "score_layer",
    "select",
    "select_packed",
    "select_within",
    "settle",
]

_load_third_party()
