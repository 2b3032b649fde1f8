"""What must work where the wheel was installed with vLLM's CPU build, and nothing else of the project is at hand.

`python -I scripts/smoke.py`, with the Python of that environment; `make smoke` makes one. Seconds, no download.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2}
PROMPT = list(range(3, 900))


def main() -> None:
    os.environ.update(ENVIRONMENT)
    assert_installed()
    with tempfile.TemporaryDirectory() as folder:
        assert "--kv-eviction-keep" in run(Path(sys.executable).with_name("vllm"), "serve", "--help=all")
        model = write_model(Path(folder))
        planner = ("-m", "vllm_defensive.planner", "--model", model, "--memory", "1GiB", "--context", "1024")
        print(run(sys.executable, "-I", *planner, "--output", "64", "--keep", "0.2"))
        assert_evicts(model)
    print("smoke: ok")


def assert_installed() -> None:
    """Both packages come from the environment, not from a clone, and say that they are typed."""
    import vllm_defensive
    import vllm_defensive_kernels

    for package in (vllm_defensive, vllm_defensive_kernels):
        folder = Path(package.__path__[0])
        assert folder.is_relative_to(sys.prefix), f"{folder} is not in {sys.prefix}"
        assert (folder / "py.typed").exists(), f"{folder} has no py.typed"


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done.stdout


def write_model(folder: Path) -> Path:
    """A random Llama without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=1024, intermediate_size=256, max_position_embeddings=2048, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    return folder


def assert_evicts(model: Path) -> None:
    """A prompt is evicted, and its audit says that about a fifth was kept."""
    from vllm import LLM, SamplingParams

    import vllm_defensive
    from vllm_defensive import audit

    kwargs = vllm_defensive.engine_kwargs("halokv", keep=0.2, audit=str(model / "audit"))
    llm = LLM(str(model), skip_tokenizer_init=True, enforce_eager=True, max_model_len=1024, **kwargs)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (answer,) = llm.generate({"prompt_token_ids": PROMPT}, params)
    assert len(answer.outputs[0].token_ids) == 8
    (file,) = (model / "audit").iterdir()
    kept = audit.load(file).kept_counts.float().mean() / len(PROMPT)
    assert 0.15 < kept < 0.35, f"{kept:.2f} of the cache was kept"


if __name__ == "__main__":
    main()
