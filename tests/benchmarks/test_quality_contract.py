"""The fixed contract: crosses of two policies, and the margins of their differences."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.quality import contract, plan
from benchmarks.quality.__main__ import parse
from vllm_defensive.policy import PRESETS, Policy, get_policy, presets

DIFFERENT_IN = {
    ("halokv", "layer-defensivekv"): ("score", "value", "neighbours"),
    ("layer-defensivekv", "defensivekv"): ("budget",),
    ("snapkv", "adakv"): ("budget",),
    ("snapkv", "halokv"): ("score", "value", "neighbours", "budget"),
    ("halokv@pool_kernel=1", "halokv@pool_kernel=3+value_weight=l1"): ("value", "neighbours"),
}


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """The table of policies, left as it was found."""
    before = dict(PRESETS)
    yield
    presets._TABLE.clear()
    presets._TABLE.update(before)


def test_every_option_of_a_policy_is_in_one_slot() -> None:
    options = [option for slot in contract.SLOTS.values() for option in slot]
    identity = {"name", "summary", "source", "internal"}
    assert sorted(options) == sorted({field.name for field in fields(Policy)} - identity)


@pytest.mark.parametrize(("names", "slots"), DIFFERENT_IN.items(), ids=str)
def test_all_crosses_of_the_slots_that_differ_are_registered(names: tuple[str, str], slots: tuple[str, ...]) -> None:
    terms = contract.draw_up(*names)
    first, second = map(get_policy, names)
    assert terms.slots == slots and not terms.left_out
    assert len(terms.crosses) == len(set(terms.crosses.values())) == 2 ** len(slots)
    for taken, name in terms.crosses.items():
        for slot, options in contract.SLOTS.items():
            owner = second if slot not in slots or taken[slots.index(slot)] else first
            assert all(getattr(get_policy(name), option) == getattr(owner, option) for option in options)
        assert get_policy(name).internal == (name not in names or "@" in name)
    assert contract.draw_up(*names) == terms, "they can be drawn up again in the same process"


def test_the_corners_are_the_policies_themselves() -> None:
    terms = contract.draw_up("halokv", "layer-defensivekv")
    assert terms.crosses[False, False, False] == "halokv"
    assert terms.crosses[True, True, True] == "layer-defensivekv"
    assert terms.crosses[False, True, True] == "halokv@value=layer-defensivekv+neighbours=layer-defensivekv"


def test_crosses_that_contradict_themselves_are_left_out_and_named() -> None:
    """Accumulated attention goes without values: h2o's score never meets defensivekv's value weight."""
    terms = contract.draw_up("h2o", "defensivekv")
    assert len(terms.left_out) == 4 and len(terms.crosses) == 12
    assert all("value=defensivekv" in name and "score=" not in name for name in terms.left_out)
    assert not set(terms.left_out) & set(PRESETS)
    assert len(terms.pairs("score")) == 4, "no partner for those that were left out"
    assert len(terms.pairs("value")) == 4 and len(terms.pairs("neighbours")) == 6
    text = contract.markdown([], terms)
    assert all(f"'{name}'" in text for name in terms.left_out)


def test_a_slot_without_a_pair_is_named() -> None:
    one = replace(contract.draw_up("halokv", "layer-defensivekv"), slots=("score", "value"))
    lame = replace(one, crosses={(False, False): "halokv", (True, True): "layer-defensivekv"})
    assert lame.pairs("value") == [] and lame.pairs(contract.WHOLE) == [("halokv", "layer-defensivekv")]
    text = contract.markdown([], lame)
    assert "- value: value_weight l1 for l2-gram; no two crosses differ in it alone." in text
    assert "- score: stages mass for none; " in text and "- budget: the same in both." in text


@pytest.mark.parametrize("names", [("snapkv", "snapkv"), ("snapkv", "snapkv@pool_kernel=5")], ids=str)
def test_two_that_are_the_same_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="differ"):
        contract.draw_up(*names)


def made_rows(terms: contract.Contract, count: str = "kl") -> list[dict]:
    """Numbers out of a hat: five documents of three answers in two cells, for every cross."""
    rng = random.Random(7)
    return [
        {"item": f"forced/copy/64/{seed}", "probe": probe, "policy": name, "keep": keep, "protocol": "after", count: kl}
        for seed, probe, keep in itertools.product(range(5), range(3), (0.2, 0.1))
        for name in terms.crosses.values()
        for kl in [rng.random()]
    ]


def by_loops(terms: contract.Contract, rows: list[dict], slot: int, keep: float) -> tuple[float, list[float]]:
    """The margin of a slot, and that of each cross of the others, in plain loops."""
    value = {(r["item"], r["probe"], r["policy"]): r["kl"] for r in rows if r["keep"] == keep}
    each_cross = []
    for taken, name in terms.crosses.items():
        partner = terms.crosses.get((*taken[:slot], True, *taken[slot + 1 :]))
        if not taken[slot] and partner:
            found = []
            for item, probe, policy in value:
                if policy == name:
                    found.append(value[item, probe, partner] - value[item, probe, name])
            each_cross.append(mean(found))
    return mean(each_cross), each_cross


@pytest.mark.parametrize("names", [("snapkv", "halokv"), ("h2o", "defensivekv")], ids=str)
def test_margins_equal_plain_loops(names: tuple[str, str]) -> None:
    terms = contract.draw_up(*names)
    rows = made_rows(terms)
    found = {(row["slot"], float(row["keep"])): row for row in contract.margins(rows, terms)}
    assert len(found) == 2 * (len(terms.slots) + 1)
    for (index, slot), keep in itertools.product(enumerate(terms.slots), (0.2, 0.1)):
        row, (margin, each_cross) = found[slot, keep], by_loops(terms, rows, index, keep)
        assert row["margin"] == pytest.approx(margin)
        assert (row["lowest"], row["highest"]) == pytest.approx((min(each_cross), max(each_cross)))
        assert (row["answers"], row["documents"], row["crosses"]) == (15, 5, len(each_cross))
        low, high = row["margin_interval"]
        assert low < margin < high
    kl = {name: mean(r["kl"] for r in rows if r["policy"] == name and r["keep"] == 0.2) for name in names}
    assert found[contract.WHOLE, 0.2]["margin"] == pytest.approx(kl[names[1]] - kl[names[0]])


def test_effects_that_add_up_are_found_again() -> None:
    terms = contract.draw_up("halokv", "layer-defensivekv")
    effects = (0.25, -0.5, 0.125)
    rows = made_rows(terms)
    for row in rows:
        (taken,) = [taken for taken, name in terms.crosses.items() if name == row["policy"]]
        seed = int(row["item"].rpartition("/")[2])
        row["kl"] = 3.0 + seed + sum(itertools.compress(effects, taken))
    for row in contract.margins(rows, terms):
        expected = {**dict(zip(terms.slots, effects, strict=True)), contract.WHOLE: sum(effects)}[row["slot"]]
        assert (row["margin"], row["lowest"], row["highest"]) == (expected,) * 3
        assert row["margin_interval"] == (expected, expected)
    text = contract.markdown(contract.margins(rows, terms), terms)
    assert "| value | -0.5000 [-0.5000, -0.5000] | layer-defensivekv |" in text
    assert "| score | +0.2500 [+0.2500, +0.2500] | halokv |" in text


def test_only_answers_that_all_crosses_have_count() -> None:
    terms = contract.draw_up("layer-defensivekv", "defensivekv")
    rows = made_rows(terms)
    lost = next(r for r in rows if r["policy"] == "defensivekv" and r["keep"] == 0.2)
    some = [r for r in rows if r is not lost]
    found = {(r["slot"], r["keep"]): r for r in contract.margins(some, terms)}
    assert found["budget", "0.2"]["answers"] == 14 and found["budget", "0.1"]["answers"] == 15
    assert not contract.margins([r for r in rows if r["policy"] != "defensivekv"], terms)


def test_one_document_speaks_for_nobody() -> None:
    terms = contract.draw_up("layer-defensivekv", "defensivekv")
    rows = [r for r in made_rows(terms) if r["item"].endswith("/0")]
    assert all(f"| {slot} |" in contract.markdown(contract.margins(rows, terms), terms) for slot in ("budget", "all"))
    assert contract.markdown(contract.margins(rows, terms), terms).count("| open |") == 4


def test_both_counts_are_written(tmp_path: Path) -> None:
    terms = contract.draw_up("halokv", "layer-defensivekv")
    old, new = made_rows(terms), made_rows(terms, "kl_with_first")
    text = contract.write([{**a, **b} for a, b in zip(old, new, strict=True)], terms, tmp_path)
    assert "## Without the first token" in text and "## With the first token" in text
    assert text == (tmp_path / "contract_halokv_layer-defensivekv.md").read_text()
    assert "## With the first token" not in contract.write(old, terms, tmp_path), "of the old count there is one"


def test_a_contract_stands_in_place_of_policies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--contract", "halokv", "snapkv", "--policies", "adakv"])
    assert "--policies: not allowed with argument --contract" in capsys.readouterr().err


def test_a_contract_has_its_own_suites_and_folder() -> None:
    chosen = parse(["--contract", "halokv", "snapkv"])
    assert chosen.contract == ["halokv", "snapkv"] and chosen.suites == list(plan.CONTRACT_SUITES)
    assert chosen.out != parse([]).out
    assert parse(["--contract", "halokv", "snapkv", "--out", "there"]).out == Path("there")
