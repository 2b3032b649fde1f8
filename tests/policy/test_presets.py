"""The table of policies, the reference's token budgets, and what importing them brings along."""

import subprocess
import sys

import pytest

from vllm_defensive.policy import PRESETS, get_policy, kept_fraction, public_names, reference_budget
from vllm_defensive.policy.budget import guarded, stage_one_cap


def test_public_names_are_frozen() -> None:
    """Users write these names; removing or renaming one breaks their command lines."""
    names = (
        "random",
        "streamingllm",
        "h2o",
        "tova",
        "r-kv",
        "snapkv",
        "pyramidkv",
        "cake",
        "lava",
        "adakv",
        "criticalkv",
        "laprox",
        "dropkv",
        "obcache",
        "deletion",
        "keydiff",
        "capkv-window",
        "expected-window",
        "headkv",
        "defensivekv",
        "layer-defensivekv",
        "halokv",
        "kvzip",
        "echokv",
        "learnedkv",
        "learned-halokv",
        "rdkv",
    )
    # A benchmark in this process may have added variants, which are called after the policy that they vary.
    assert tuple(name for name in public_names() if "@" not in name) == names
    assert {name for name in PRESETS if "@" not in name} - set(names) == {"keep-all", "random-uneven"}


@pytest.mark.parametrize("policy", PRESETS.values(), ids=PRESETS.keys())
def test_rows_are_complete(policy) -> None:
    assert get_policy(policy.name) is policy
    assert policy.summary and (policy.internal or policy.source.startswith(("https://", "docs/")))
    assert policy.pool_kernel % 2 == 1
    assert policy.stages != "half-budget" or policy.needs_values
    assert not policy.needs_projection or policy.needs_values
    policy.check()


def test_an_unknown_policy_names_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"'best'.*snapkv.*layer-defensivekv") as error:
        get_policy("best")
    assert "keep-all" not in str(error.value)


def test_budgets_follow_the_references_arithmetic() -> None:
    """0.2 arrives there as 1 - 0.8 and loses a token of every exact product."""
    assert kept_fraction(0.2) < 0.2
    sizes = {"prompt_tokens": 1000, "keep_ratio": 0.2, "kv_heads": 3, "layers": 30}
    assert reference_budget("head", **sizes) == 199
    assert reference_budget("layer", **sizes) == 599
    assert reference_budget("model", **sizes) == 17999
    assert reference_budget("model", **{**sizes, "keep_ratio": 0.5}) == 45000
    assert guarded(0.2, 199) == 39


def test_stage_one_cap_takes_the_window_off_and_is_never_negative() -> None:
    assert stage_one_cap(968, 0.5, 32) == 452
    assert stage_one_cap(100, 0.2, 32) == 0
    assert stage_one_cap(100, 0.2, 10) == 9, "the reference's 0.2 is a little less"


def test_policies_do_not_import_vllm() -> None:
    code = (
        "import sys, vllm_defensive.policy\n"
        "heavy = {'vllm', 'transformers', 'triton', 'pydantic'} & {name.partition('.')[0] for name in sys.modules}\n"
        "sys.exit(f'policy imports {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
