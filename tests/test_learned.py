"""A learned score's file: written whole, read with one line of error, found by the model that it is for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.learned_scores import random_score
from vllm_defensive import learned, startup
from vllm_defensive.settings import engine as config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.randn(300, 300)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache"


def arguments(model: Path | str) -> SimpleNamespace:
    return SimpleNamespace(model=str(model), revision=None, download_dir=None)


def test_what_is_written_is_read(tmp_path: Path, model: Path) -> None:
    score = random_score(model, tmp_path / "a" / "b.safetensors", 2, 3, 16)
    again = learned.load(tmp_path / "a" / "b.safetensors")
    assert again.facts == score.facts and torch.equal(again.weight_LHX, score.weight_LHX)
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b.safetensors"], "nothing is left of writing"


def test_a_fingerprint_is_that_of_the_weights(model: Path, tmp_path: Path) -> None:
    first = learned.fingerprint(str(model))
    assert first is not None and len(first) == 32
    (model / "config.json").write_text("{}")
    assert learned.fingerprint(str(model)) == first
    weight = torch.randn(300, 300)
    save_file({"w": weight}, model / "model.safetensors")
    second = learned.fingerprint(str(model))
    weight += 1e-3
    save_file({"w": weight}, model / "model.safetensors")
    assert len({first, second, learned.fingerprint(str(model))}) == 3
    assert learned.fingerprint(str(tmp_path / "nothing")) is None
    assert learned.fingerprint("nobody/has-this-model") is None
    assert learned.fingerprint(str(tmp_path)) is None, "a folder without weights"


def test_a_model_of_the_hub_is_looked_for_in_its_cache(tmp_path: Path, model: Path) -> None:
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert learned.fingerprint("some/model", None, str(tmp_path / "hub")) == learned.fingerprint(str(model))


def replace_weights(path: Path, value: float) -> None:
    score = learned.load(path)
    score.weight_LHX[0, 0, 0] = value
    score.save(path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: p.unlink(), "no learned score .there is no such file"),
        (lambda p: (p.unlink(), p.mkdir()), "no learned score .a folder"),
        (lambda p: p.write_bytes(b"x" * 100), "no learned score .a file of another kind"),
        (lambda p: save_file({"weight_LHX": torch.zeros(2, 3, 33)}, p), "no learned score .a file of another kind"),
        (lambda p: replace_weights(p, float("nan")), "no learned score"),
        (lambda p: save_file({"other": torch.zeros(1)}, p), "no learned score"),
    ],
)
def test_what_is_no_file_of_ours_is_said_in_a_line(tmp_path: Path, model: Path, spoil: object, message: str) -> None:
    path = tmp_path / "s.safetensors"
    random_score(model, path, 2, 3, 16)
    spoil(path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as error:
        learned.load(path)
    assert "\n" not in str(error.value) and learned.COMMAND in str(error.value) and str(path) in str(error.value)


def test_another_version_and_other_shapes_are_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.safetensors"
    score = random_score(model, path, 2, 3, 16)
    learned.check_shape(score, "s", 2, 3, 16)
    for shape in ((3, 3, 16), (2, 6, 16), (2, 3, 32)):
        with pytest.raises(ValueError, match="layers, KV heads or head size are others"):
            learned.check_shape(score, "s", *shape)
    monkeypatch.setattr(learned, "VERSION", learned.VERSION + 1)
    with pytest.raises(ValueError, match="of version 1, and this is 2"):
        learned.load(path)


def test_a_models_own_file_is_found_the_users_before_the_packages(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert learned.find(learned.fingerprint(str(model))) is None
    monkeypatch.setattr(learned, "PACKAGED", tmp_path / "packaged")
    name = learned.fingerprint(str(model))
    random_score(model, tmp_path / "packaged" / f"{name}.safetensors", 2, 3, 16)
    packaged = str(tmp_path / "packaged" / f"{name}.safetensors")
    assert path_found(model) == packaged
    own = random_score(model, learned.path_for(str(name)), 2, 3, 16, seed=1)
    found = learned.find(learned.fingerprint(str(model)))
    assert found is not None and found[0] == str(cache / "kv_eviction" / f"{name}.safetensors")
    assert torch.equal(found[1].weight_LHX, own.weight_LHX)
    learned.path_for(str(name)).write_bytes(b"spoilt")
    assert path_found(model) == packaged, "one that is spoilt is passed over"


def path_found(model: Path) -> str | None:
    found = learned.find(learned.fingerprint(str(model)))
    return None if found is None else found[0]


def test_settings_are_given_the_file_or_refused(model: Path, cache: Path, tmp_path: Path) -> None:
    auto = config.EvictionConfig(policy="auto")
    assert startup.with_learned_score(auto, arguments(model)) == auto, "auto goes without"
    with pytest.raises(ValueError, match=r"kv_eviction=learnedkv: .* has no weight files here yet"):
        startup.with_learned_score(config.EvictionConfig(policy="learnedkv"), arguments(tmp_path / "nowhere"))
    for settings, field in (
        (config.EvictionConfig(policy="learnedkv"), "kv_eviction=learnedkv"),
        (config.EvictionConfig(policy="snapkv", policies=["learned-halokv"]), "kv_eviction_policies=learned-halokv"),
        (config.EvictionConfig(policy="auto", score="learned"), "kv_eviction_score=learned"),
    ):
        with pytest.raises(ValueError, match=f"{field}: .*{learned.COMMAND}"):
            startup.with_learned_score(settings, arguments(model))
    path = learned.path_for(str(learned.fingerprint(str(model))))
    random_score(model, path, 2, 3, 16)
    found = startup.with_learned_score(auto, arguments(model))
    assert found.learned == str(path) and found.meant("auto", boundary=True) == "learned-halokv"
    assert found.meant("auto") == "halokv", "it was not tried with the question in the window"
    score = learned.load(path)
    tried = score.facts.model_copy(update={"window_keep": 0.2})
    learned.LearnedScore(facts=tried, weight_LHX=score.weight_LHX).save(path)
    tried_settings = startup.with_learned_score(auto, arguments(model))
    assert [tried_settings.meant("auto", keep=keep) for keep in (0.1, 0.2, None)] == ["halokv", *["learned-halokv"] * 2]
    assert tried_settings.meant("auto", keep=0.1, boundary=True) == "learned-halokv"
    assert tried_settings.meant("auto", keep=0.1, score="learned") == "learned-halokv"
    without = config.EvictionConfig(policy="auto", learned="none")
    assert startup.with_learned_score(without, arguments(model)) == without
    assert without.meant("auto") == "halokv" and not without.allows("learnedkv")
    other = tmp_path / "other"
    other.mkdir()
    save_file({"w": torch.randn(300, 300)}, other / "model.safetensors")
    named = config.EvictionConfig(policy="auto", learned=str(path))
    assert startup.with_learned_score(named, arguments(model)).learned == str(path)
    with pytest.raises(ValueError, match="learned for model, of other weights"):
        startup.with_learned_score(named, arguments(other))
