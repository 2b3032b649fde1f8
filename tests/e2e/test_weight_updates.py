"""New weights in a running engine: what is kept afterwards is what a fresh engine with these weights keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.e2e.engines import assert_all_returned, audit_of, engine, generate, metrics_of, random_prompts
from tests.learned_scores import score_of
from tests.reference_model import ReferenceLlama
from tests.tiny_model import write_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = random_prompts((700, 333, 417), seed=13)
# Values weighed by the projection itself, and by a factor of it.
POLICIES = ("halokv", "criticalkv")


@dataclass(frozen=True)
class Folder:
    """For vLLM's transfer of weights: where the trainer, here a folder, is to be found."""

    path: str = ""


def register_transfer_from_folders() -> None:
    """Make "folder" a way by which vLLM takes new weights in this process."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    class FolderTransfer(WeightTransferEngine):  # type: ignore[type-arg]
        init_info_cls = update_info_cls = Folder

        def init_transfer_engine(self, init_info: Folder) -> None: ...

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: Folder) -> None:
            self.model.load_weights(iter(load_file(Path(update_info.path) / "model.safetensors").items()))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None: ...

    if "folder" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("folder", FolderTransfer)


def reload(llm: Any, model: Path) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})


def transfer(llm: Any, model: Path) -> None:
    llm.collective_rpc("start_weight_update")
    llm.collective_rpc("update_weights", kwargs={"update_info": {"path": str(model)}})
    llm.collective_rpc("finish_weight_update")


def kept(llm: Any, audits: Path) -> list[Tensor]:
    """What each prompt keeps under each policy."""
    assert_all_returned(llm)  # and the prefix cache, which holds the old weights' keys, is empty
    masks = []
    for policy in POLICIES:
        answers = generate(llm, PROMPTS, 2, [{"kv_eviction": policy}] * len(PROMPTS))
        masks += [audit_of(audits, answer.request_id).mask() for answer in answers]
    return masks


def differing(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest share of entries in which two masks differ."""
    return max(float((a != b).float().mean()) for a, b in zip(ours, theirs, strict=True))


def test_new_weights_weigh_values_anew(tiny_model: Path, tmp_path: Path) -> None:
    register_transfer_from_folders()
    other = write_tiny_llama(tmp_path / "other", seed=1)
    settings = {"keep": 0.3, "dtype": "float32", "per_request": True}
    with engine(other, "none", audit=str(tmp_path / "fresh"), **settings) as llm:
        expected = {other: kept(llm, tmp_path / "fresh")}
    settings |= {"audit": str(tmp_path), "weight_transfer_config": {"backend": "folder"}}
    with engine(tiny_model, "none", **settings) as llm:
        expected[tiny_model] = kept(llm, tmp_path)
        assert differing(expected[tiny_model], expected[other]) > 0.1
        changes: tuple[Callable[[Any, Path], None], ...] = (reload, transfer)
        for change in changes:
            for model in (other, tiny_model):
                change(llm, model)
                assert differing(kept(llm, tmp_path), expected[model]) == 0, (change.__name__, model.name)


def test_a_learned_score_is_used_after_new_weights_and_said_to_be_stale(tiny_model: Path, tmp_path: Path) -> None:
    """Until it is loaded anew."""
    path, other = tmp_path / "score.safetensors", write_tiny_llama(tmp_path / "other", seed=1)
    score_of(ReferenceLlama(tiny_model), tiny_model, path)

    def fresh() -> float:
        generate(llm, PROMPTS[:1], 3)
        return metrics_of(llm)["vllm:kv_eviction_learned"]

    with engine(tiny_model, "learnedkv", learned=str(path), dtype="float32", audit=str(tmp_path)) as llm:
        assert fresh() == 1
        reload(llm, other)
        assert fresh() == 0
        before = generate(llm, PROMPTS[1:2], 2)[0]
        llm.collective_rpc("load_learned", args=(str(path),))
        assert fresh() == 1
        llm.reset_prefix_cache()
        after = generate(llm, PROMPTS[1:2], 2)[0]
    masks = [audit_of(tmp_path, answer.request_id) for answer in (before, after)]
    assert masks[0].policy == "learnedkv" and torch.equal(masks[0].mask(), masks[1].mask())
