"""The fixed contract: of two policies, which of their differences makes the difference?

`python -m benchmarks.quality --contract A B`. The idea is arXiv 2605.08234's: answers, memory and all else stay fixed,
and one slot is exchanged at a time. A policy has four:

    score       what the window's attention says of a token: aggregate, its window bias, and stages
    value       the weight of values
    neighbours  what a token has from those beside it: pooling and halo
    budget      who competes for pages: scope, guard, the layers' budgets

Stages stand with the scores: stage 1 reads attention alone, the window bias is its threshold, and each kind is read
with its own aggregates ("mass" with "defensive", "half-budget" with the means). They do not stand with the value
weight, for either can be had without the other, and in one slot they would not be told apart; nor with the budget, for
they share out none: they say which tokens take the first of it.

All crosses of the slots in which A and B differ are run on the same answers. The margin of a slot is KL with B's choice
minus KL with A's, averaged over the crosses of the other slots; below zero B's is better. A cross that contradicts
itself is left out, and its neighbour with it. A choice that a cross does not read, such as a value weight of "mean"
scores without stages, changes nothing there: its zero counts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.quality import metrics, paired, variants
from vllm_defensive.policy import Policy, get_policy, register

Row = dict[str, Any]
Taken = tuple[bool, ...]
"""Of each slot, whether the second policy's choice is taken."""

SLOTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "score": (
            *("aggregate", "score", "window_bias", "stages", "reconstruction", "learned", "keeps_window", "sinks"),
            "fallback",
            "later",
        ),
        "value": ("value_weight", "weight_across", "normalise"),
        "neighbours": ("pool", "pool_kernel", "halo_tokens", "halo_weight"),
        "budget": ("scope", "guard", "layer_budget", "head_budget", "keep_all"),
        "width": ("widths",),
    }
)
WHOLE = "all"
"""Beside the slots: the second policy itself against the first."""
COUNTS = ("kl", "kl_with_first")


@dataclass(frozen=True)
class Contract:
    """crosses: names of the policies, registered. left_out: of those that contradict themselves, name and reason."""

    first: str
    second: str
    slots: tuple[str, ...]
    crosses: Mapping[Taken, str]
    left_out: Mapping[str, str]

    def pairs(self, slot: str) -> list[tuple[str, str]]:
        """Of each cross of the other slots, its name with the first policy's choice and with the second's."""
        if slot == WHOLE:
            return [(self.first, self.second)]
        at = self.slots.index(slot)
        partners = {taken: (*taken[:at], True, *taken[at + 1 :]) for taken in self.crosses if not taken[at]}
        return [(self.crosses[a], self.crosses[b]) for a, b in partners.items() if b in self.crosses]


def draw_up(first_name: str, second_name: str) -> Contract:
    """Register all crosses of two policies, or variants, in this process. ValueError where they do not differ."""
    first, second = (get_policy(variants.resolve(name)) for name in (first_name, second_name))
    slots = tuple(slot for slot, options in SLOTS.items() if _values(first, options) != _values(second, options))
    if not slots:
        raise ValueError(f"--contract {first_name} {second_name}: choose two policies that differ")
    crosses, left_out = {}, {}
    for taken in itertools.product((False, True), repeat=len(slots)):
        policy = second if all(taken) else cross(first, second, list(itertools.compress(slots, taken)))
        try:
            register(policy)
        except ValueError as error:
            left_out[policy.name] = str(error)
        else:
            crosses[taken] = policy.name
    return Contract(first_name, second_name, slots, crosses, left_out)


def cross(first: Policy, second: Policy, slots: Sequence[str]) -> Policy:
    """`first` with the choices of `second` in some `slots`; without any, `first` itself."""
    if not slots:
        return first
    name = f"{first.name}@{'+'.join(f'{slot}={second.name}' for slot in slots)}"
    options = {option: getattr(second, option) for slot in slots for option in SLOTS[slot]}
    return replace(first, name=name, internal=True, **options)


def _values(policy: Policy, options: Sequence[str]) -> list[Any]:
    return [getattr(policy, option) for option in options]


def margins(rows: Sequence[Row], contract: Contract, count: str = "kl") -> list[Row]:
    """One row for each cell (suite, task, context, protocol, keep) and slot, from the answers that all crosses have.

    lowest, highest: the smallest and largest mean margin of a single cross of the other slots.
    """
    cells = {
        cell: {
            item_probe: found for item_probe, found in answers.items() if set(contract.crosses.values()) <= set(found)
        }
        for cell, answers in paired.by_cell(rows, count).items()
    }
    return [
        {"slot": slot, "count": count, **dict(zip(paired.CELL, cell, strict=True)), **_margin(answers, pairs)}
        for cell, answers in cells.items()
        for slot in (*contract.slots, WHOLE)
        if answers and (pairs := contract.pairs(slot))
    ]


def _margin(answers: Mapping[tuple[str, int], Mapping[str, float]], pairs: Sequence[tuple[str, str]]) -> Row:
    differences = [[found[b] - found[a] for a, b in pairs] for found in answers.values()]
    items = [item for item, _probe in answers]
    each_answer = [metrics.mean(some) for some in differences]
    each_cross = [metrics.mean(some) for some in zip(*differences, strict=True)]
    return {
        "answers": len(answers),
        "documents": len(set(items)),
        "margin": metrics.mean(each_answer),
        "margin_interval": metrics.interval(each_answer, items),
        "lowest": min(each_cross),
        "highest": max(each_cross),
        "crosses": len(pairs),
    }


# -- what is written --------------------------------------------------------------------------------------------------


def write(rows: Sequence[Row], contract: Contract, folder: Path) -> str:
    """Write the margins as a table and as data into `folder`; returns the table."""
    found = [row for count in COUNTS for row in margins(rows, contract, count)]
    text = markdown(found, contract)
    stem = f"contract_{contract.first}_{contract.second}"
    (folder / f"{stem}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
    return text


def markdown(found: Sequence[Row], contract: Contract) -> str:
    """What each slot exchanges, which crosses are left out, and a table a count."""
    lines = [f"# {contract.second}'s choices against {contract.first}'s, on the same answers\n"]
    lines += [f"- {slot}: {_choices(contract, slot)}." for slot in SLOTS]
    lines += [f"- Left out: {reason}." for reason in contract.left_out.values()]  # which name the cross
    for count in COUNTS:
        if some := [row for row in found if row["count"] == count]:
            lines += ["", f"## {paired.COUNT_NAMES[count]}\n", *_table(some, contract)]
    return "\n".join(lines) + "\n"


def _choices(contract: Contract, slot: str) -> str:
    if slot not in contract.slots:
        return "the same in both"
    first, second = get_policy(contract.first), get_policy(contract.second)
    options = [(option, getattr(first, option), getattr(second, option)) for option in SLOTS[slot]]
    text = ", ".join(f"{option} {theirs} for {ours}" for option, ours, theirs in options if ours != theirs)
    return text if contract.pairs(slot) else f"{text}; no two crosses differ in it alone"


def _table(found: Sequence[Row], contract: Contract) -> list[str]:
    lines = [
        "| task | tokens | question | keep | answers (documents) | slot | margin | better | single crosses |",
        "| --- | ---: | --- | ---: | ---: | --- | ---: | --- | ---: |",
    ]
    for row in sorted(found, key=paired.in_order):
        low, high = row["margin_interval"]
        cells = [
            *(row[name] for name in paired.CELL[1:]),
            f"{row['answers']} ({row['documents']})",
            row["slot"],
            f"{row['margin']:+.4f} [{low:+.4f}, {high:+.4f}]",
            _better(row, contract),
            f"{row['lowest']:+.4f} to {row['highest']:+.4f} of {row['crosses']}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _better(row: Row, contract: Contract) -> str:
    """Whose choice the interval speaks for, if it lies on one side of zero. One document has no interval."""
    low, high = row["margin_interval"]
    if low <= 0 <= high or row["documents"] < 2:
        return "open"
    return contract.second if high < 0 else contract.first
