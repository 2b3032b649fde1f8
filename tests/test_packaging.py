"""What the set-up makes: an environment in which vision models can be imported, and one list of vLLM's releases."""

from __future__ import annotations

import pytest

from tests.processes import run_python


def test_images_can_be_resized() -> None:
    """PyPI's torchvision cannot be imported beside torch's CPU build unless packaging/torchvision_ops is there."""
    code = """import torch
from torchvision.transforms.v2 import functional
print(functional.resize(torch.ones(1, 4, 4), [2]).tolist())"""
    assert run_python(code).strip() == str([[[1.0] * 2] * 2])


@pytest.mark.slow
def test_a_vision_model_can_be_imported() -> None:
    run_python("import vllm.model_executor.models.qwen3_5")
