"""A policy of another package: all that it takes.

Its metadata (`key_distance-1.0.dist-info` beside this file; from a `setup.py` it is one line of `entry_points`) says

    [vllm_defensive.policies]
    key-distance = key_distance:POLICY

and then `vllm serve MODEL --kv-eviction key-distance` works wherever this package is installed.
"""

from torch import Tensor
from torch.nn.functional import cosine_similarity

from vllm_defensive.policy import Policy


def score(*, query_WQD: Tensor, key_HSD: Tensor, **_: object) -> Tensor:
    """Tokens whose keys point away from the head's mean key stay. -> fp32 [H, T]."""
    before_window = key_HSD.shape[1] - query_WQD.shape[0]
    key_HTD = key_HSD[:, :before_window].float()
    return -cosine_similarity(key_HTD, key_HTD.mean(dim=1, keepdim=True), dim=-1)


POLICY = Policy(
    name="key-distance",
    summary="tokens whose keys are unlike the others; the heads of a layer compete",
    source="https://example.org/key-distance",
    aggregate="custom",
    scope="layer",
    score=score,
)
