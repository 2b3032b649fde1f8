"""What the README says of flags and policies is what the code does; the metadata of our distributions agree."""

from __future__ import annotations

import re
from importlib.metadata import distribution
from pathlib import Path

import vllm_defensive
from vllm_defensive.policy.presets import PRESETS, public_names
from vllm_defensive.serving.cli import flag_of
from vllm_defensive.settings.engine import FLAGS, KEY, NONE, EvictionConfig, allowed_policies
from vllm_defensive.settings.request import RequestSettings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def table_rows(first_cell: str, text: str = README) -> list[list[str]]:
    """Cells of the README's table whose header starts with `first_cell`, without the header. Or of another text's."""
    _, _, table = text.partition(f"| {first_cell} |")
    rows = table.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_readme_lists_every_flag_with_its_default() -> None:
    defaults = {name: EvictionConfig.model_fields[name].default for name in FLAGS}
    expected = {flag_of(name): "off" if default is None else str(default) for name, default in defaults.items()}
    expected[flag_of("policy")] = NONE
    assert {row[0].strip("`"): row[2].strip("`") for row in table_rows("flag")} == expected


def test_readme_lists_every_field_of_a_request() -> None:
    expected = [KEY if name == "policy" else f"{KEY}_{name}" for name in RequestSettings.model_fields]
    assert [name for row in table_rows("field") for name in re.findall("`([^`]+)`", row[0])] == expected


def test_the_guide_lists_every_policy_with_its_source() -> None:
    assert set(re.findall(r"`([^`]+)`", table_rows("flag")[0][1])) == set(allowed_policies()) - set(public_names())
    link = re.compile(r"\[`([^`]+)`\]\(([^)]+)\)")
    rows = [link.fullmatch(row[0]) for row in table_rows("policy", GUIDE)]
    expected = [(name, PRESETS[name].source.removeprefix("docs/")) for name in public_names()]
    assert [row.groups() for row in rows if row] == expected


def test_readme_lists_every_metric() -> None:
    from vllm_defensive.serving.prometheus import (  # imports vLLM, which the other tests here do without
        BY_POLICY,
        COUNTERS,
        GAUGES,
        KEEP_SHARE,
        KEPT_PAGES,
        LEARNED,
        SECONDS,
    )

    expected = [*(name for name, _ in COUNTERS.values()), SECONDS[0], KEPT_PAGES[0], BY_POLICY[0], KEEP_SHARE[0]]
    expected += [*(name for name, _ in GAUGES.values()), LEARNED[0]]
    assert [row[0].strip("`") for row in table_rows("metric")] == expected


def test_readme_names_only_targets_that_make_has() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    documents = README + "".join(
        (ROOT / name).read_text() for name in ("CONTRIBUTING.md", ".ci/run", ".github/workflows/ci.yml")
    )
    named = set(re.findall(r"(?:`|^|\d )make ([a-z-]+)", documents, flags=re.MULTILINE))
    assert {"demo", "test", "lint"} <= named <= targets


def test_installed_distribution_registers_the_plugin() -> None:
    installed = distribution("vllm-defensive")
    assert installed.version == vllm_defensive.__version__
    (entry,) = installed.entry_points.select(group="vllm.general_plugins")
    assert callable(entry.load())
