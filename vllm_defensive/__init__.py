"""KV-cache eviction for vLLM: at the end of prefill, keep what each head needs and free the rest.

`vllm serve MODEL --kv-eviction layer-defensivekv`, or with the `LLM` class

    LLM(MODEL, **vllm_defensive.engine_kwargs("layer-defensivekv", keep=0.2))
"""

from __future__ import annotations

import os
from typing import Any

__version__ = "0.1.0"


def engine_kwargs(policy: str, **settings: Any) -> dict[str, Any]:
    """Keyword arguments for `vllm.LLM` or `EngineArgs` that switch eviction on.

    settings: score, learned, keep, widths, window, min_tokens, audit, shared, reuse, pinned, admission, per_request,
    policies (a list), as the flags of the same names. Raises ValueError for wrong ones, and where VLLM_PLUGINS keeps
    vLLM from loading this plugin.
    """
    from vllm_defensive.settings import engine as config

    parsed = config.parse({"policy": policy, **settings})
    if parsed is None:
        return {}
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and __name__ not in plugins.split(","):
        raise ValueError(f"VLLM_PLUGINS={plugins}: vLLM loads no other plugin; add {__name__} to it, or unset it")
    return {"additional_config": {config.KEY: parsed.as_json()}}
