"""Kept sets of kvpress and of ours on the same keys, values and queries: run by an interpreter that has kvpress.

    python -m tests.peer.compare_kvpress MODEL TOKENS KEEP        prints JSON

Nothing is recomputed between the two: a hook hands kvpress's inputs, layer by layer, to our formulas.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

WINDOW = 32


def main() -> None:
    from transformers import AutoModelForCausalLM

    model_folder, tokens, keep = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    prompt = text_tokens(model_folder, tokens)
    print(json.dumps({name: compare(model, prompt, name, keep) for name in ("snapkv", "adakv", "criticalkv")}))


def text_tokens(model_folder: str, count: int) -> list[int]:
    import random

    from transformers import AutoTokenizer

    from benchmarks.quality.texts import running_text

    text = running_text(random.Random(0), 8 * count)
    return AutoTokenizer.from_pretrained(model_folder).encode(text, add_special_tokens=False)[:count]


def make_press(name: str, keep: float) -> Any:
    import kvpress

    snapkv = kvpress.SnapKVPress(compression_ratio=1 - keep, window_size=WINDOW, kernel_size=5)
    return {
        "snapkv": lambda: snapkv,
        "adakv": lambda: kvpress.AdaKVPress(snapkv),
        "criticalkv": lambda: kvpress.CriticalAdaKVPress(snapkv),
    }[name]()


@torch.inference_mode()
def compare(model: Any, prompt: list[int], name: str, keep: float) -> dict[str, Any]:
    """-> kept entries of both, how many of them are shared, and the largest relative difference of the scores."""
    press, theirs, ours, errors = make_press(name, keep), [], [], []
    compress = press.compress

    def watch(module: Any, hidden: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Any:
        before = keys.clone()
        query_WQD = window_queries(module, hidden, kwargs)
        if name == "snapkv":
            scores_HT = press.score(module, hidden, keys, values, attentions, kwargs)[0, :, :-WINDOW]
            errors.append(score_error(name, query_WQD, keys[0], values[0], module, keep, scores_HT))
        output = compress(module, hidden, keys, values, attentions, kwargs)
        theirs.append(kept_by_press(module, before, output[0]))
        ours.append(kept_by_us(name, query_WQD, before[0], values[0], module, keep))
        module.masked_key_indices = None  # the next layers see the whole cache, as our eviction at the end does
        return before, values

    press.compress = watch
    with press(model):
        model(torch.tensor([prompt]), use_cache=True)
    kept_theirs, kept_ours = torch.stack(theirs), torch.stack(ours)
    return {
        "theirs": int(kept_theirs.sum()),
        "ours": int(kept_ours.sum()),
        "shared": int((kept_theirs & kept_ours).sum()),
        "heads_that_differ": int((kept_theirs != kept_ours).any(dim=-1).sum()),
        "heads": kept_ours.shape[0] * kept_ours.shape[1],
        "score_error": max(errors) if errors else None,
    }


def window_queries(module: Any, hidden: Tensor, kwargs: Any) -> Tensor:
    """Queries of the window after RoPE, `[W, Q, D]`, by transformers' own function."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query = module.q_proj(hidden[:, -WINDOW:]).view(1, WINDOW, -1, module.head_dim).transpose(1, 2)
    cos, sin = (x[:, -WINDOW:] for x in kwargs["position_embeddings"])
    return apply_rotary_pos_emb(query, query, cos, sin)[0][0].transpose(0, 1)


def our_scores(name: str, query_WQD: Tensor, key_HSD: Tensor, value_HSD: Tensor, module: Any, keep: float) -> Any:
    from vllm_defensive.policy import PRESETS, score_layer

    return score_layer(
        PRESETS[name],
        layer=module.layer_idx,
        query_WQD=query_WQD,
        key_HSD=key_HSD,
        value_HSD=value_HSD,
        output_QDM=module.o_proj.weight.T.reshape(query_WQD.shape[1], module.head_dim, -1),
        factor_QDC=None,
        scale=module.head_dim**-0.5,
        keep_ratio=keep,
        evictable=(0, key_HSD.shape[1]),
    )


def score_error(
    name: str, query: Tensor, key: Tensor, value: Tensor, module: Any, keep: float, theirs: Tensor
) -> float:
    ours = our_scores(name, query, key, value, module, keep).scores_HE[:, :-WINDOW]
    return float(((ours - theirs).abs() / theirs.abs().clamp_min(1e-12)).max())


def kept_by_us(name: str, query: Tensor, key: Tensor, value: Tensor, module: Any, keep: float) -> Tensor:
    """bool `[H, S]`, single tokens."""
    from vllm_defensive.policy import PRESETS, kept_fraction, select_within
    from vllm_defensive.policy.budget import guarded

    heads, tokens = key.shape[:2]
    policy, each = PRESETS[name], int(tokens * kept_fraction(keep))
    chosen = select_within(
        policy,
        [our_scores(name, query, key, value, module, keep)],
        page_size=1,
        # kvpress rounds down a head's budget and then multiplies; the reference (`reference_budget`) rounds a layer's.
        budget_pages=each * (heads if policy.scope == "layer" else 1),
        guard_pages=guarded(policy.guard, each),
        evictable=(0, tokens),
    )
    kept = torch.zeros(heads, tokens, dtype=torch.bool)
    kept[torch.arange(heads).repeat_interleave(chosen.pages_LH[0].long()), chosen.tokens_PN.flatten().long()] = True
    return kept


def kept_by_press(module: Any, before: Tensor, after: Tensor) -> Tensor:
    """bool `[H, S]`: from what kvpress masks, or else by finding the rows that are left of the keys."""
    heads, tokens = before.shape[1:3]
    masked = getattr(module, "masked_key_indices", None)
    if masked is not None:
        kept = torch.ones(heads, tokens, dtype=torch.bool)
        kept[masked[1], masked[2]] = False
        return kept
    same = torch.cdist(before[0], after[0], compute_mode="donot_use_mm_for_euclid_dist") == 0
    return same.any(dim=-1)


if __name__ == "__main__":
    main()
