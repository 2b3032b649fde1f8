"""The report of loads in small pools."""

from __future__ import annotations

from typing import Any

from benchmarks.pressure import report


def rows(late: bool, kls: dict[str, float], evictions: int) -> list[dict[str, Any]]:
    about = {"pool": 4, "policy": "halokv", "keep": 0.2, "late": late, "evictions": evictions}
    return [{**about, "text": text, "kl": kl} for text, kl in kls.items()]


def test_texts_are_compared_with_themselves_and_those_of_one_time_alone_left_out() -> None:
    told = report([*rows(False, {"a": 0.4, "b": 0.2, "c": 9.0}, 3), *rows(True, {"b": 0.1, "a": 0.1}, 2)])
    *_, row = told.strip().splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["4", "halokv", "0.2", "0.3000", "0.1000"]
    assert cells[5] == "-0.2000 [-0.3000, -0.1000]" and cells[6] == "3 / 2"
