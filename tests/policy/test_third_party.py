"""Policies of other packages: an entry point adds a row, and a broken one breaks nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.policy.cases import SHAPES, kept_by_head, make_layers, score, select_tokens
from tests.policy.example_package.key_distance import POLICY
from vllm_defensive.policy import PRESETS, register

EXAMPLE = Path(__file__).parent / "example_package"


def run(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)


def test_an_installed_package_adds_its_policy() -> None:
    code = (
        "from vllm_defensive.settings.engine import parse\n"
        "from vllm_defensive.policy import public_names\n"
        "print(public_names()[-1], parse({'policy': 'key-distance'}).policy)"
    )
    done = run(code, EXAMPLE)
    assert done.stdout.split() == ["key-distance", "key-distance"], done.stderr
    assert not done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("1 / 0", "division by zero"),
        ("policy = 7", "not callable"),
        ("policy = lambda: 7", "expected a Policy, got int"),
        (
            "from dataclasses import replace; from vllm_defensive.policy import PRESETS\n"
            "policy = replace(PRESETS['snapkv'], pool_kernel=7)",
            "'snapkv' exists already",
        ),
    ],
    ids=["import-fails", "not-a-policy", "returns-no-policy", "name-taken"],
)
def test_a_broken_package_is_named_and_left_out(tmp_path: Path, body: str, reason: str) -> None:
    (tmp_path / "broken.py").write_text(body)
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm_defensive.policies]\nbad = broken:policy\n")
    done = run("from vllm_defensive.policy import PRESETS; print(PRESETS['snapkv'].pool_kernel)", tmp_path)
    assert done.stdout.strip() == "5"
    assert "bad = broken:policy is left out" in done.stderr and reason in done.stderr


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_its_scores_choose_the_tokens(shape) -> None:
    layers = make_layers(shape)
    scores = [score(POLICY, shape, inputs, layer=i) for i, inputs in enumerate(layers)]
    window = shape.tokens - shape.window
    assert all(layer.scores_HE[:, window:].isinf().all() for layer in scores)
    kept = kept_by_head(select_tokens(POLICY, shape, scores, 0.5))
    for (layer, head), tokens in kept.items():
        values = scores[layer].scores_HE[head]
        lost = torch.ones_like(values, dtype=torch.bool)
        lost[tokens] = False
        assert not lost.any() or values[tokens].min() >= values[lost].max()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "none"}, "exists already"),
        ({"aggregate": "mean"}, "aggregate='custom'"),
        ({"score": None}, "aggregate='custom'"),
        ({"layer_budget": "linear", "scope": "model"}, "needs scope='head' or 'layer'"),
        ({"layer_budget": "preference"}, "needs aggregate='cake'"),
        ({"head_budget": "typed"}, "needs aggregate='stratified'"),
        ({"stages": "mass"}, "stages='mass' needs"),
        ({"aggregate": "smallest", "score": None}, "aggregate='smallest': choose one of .*mean"),
        ({"aggregate": "deletion", "score": None}, "choose weight_across='none'"),
        ({"aggregate": "defensive", "score": None, "pool": "max"}, "pool='max' goes with other"),
    ],
    ids=str,
)
def test_rows_that_contradict_themselves_are_refused(changes: dict, reason: str) -> None:
    policy = replace(POLICY, **{"name": "refused", **changes})
    with pytest.raises(ValueError, match=reason):
        register(policy)
    assert "refused" not in PRESETS
