"""The files of `docker/` parse, are pinned, and the metrics of ours that the dashboard asks for exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from vllm_defensive import metrics

DOCKER = Path(__file__).parents[1] / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
DASHBOARD = DOCKER / "grafana" / "dashboards" / "kv-eviction.json"
OURS = {
    *(f"{name}_total" for name, _ in (*metrics.COUNTERS.values(), metrics.BY_POLICY)),
    *(f"{name}_{part}" for name, _ in (metrics.SECONDS, metrics.KEEP_SHARE) for part in ("sum", "count", "bucket")),
    *(name for name, _ in metrics.GAUGES.values()),
}


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_pinned_unprivileged_and_says_how_it_is(name: str) -> None:
    steps = re.findall(r"^([A-Z]+) +(.*)", (DOCKER / name).read_text(), flags=re.MULTILINE)
    (base,) = (value for step, value in steps if step == "FROM")
    assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+\S*", base)
    assert [value for step, value in steps if step == "USER"] == ["10001"]
    assert [step for step, _ in steps].count("HEALTHCHECK") == 1


def test_every_service_is_pinned_or_built_from_a_file_that_is_there() -> None:
    for service in yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"].values():
        if "image" in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        else:
            assert service["build"]["dockerfile"].removeprefix("docker/").strip("${}").split(":-")[1] in DOCKERFILES
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DOCKER / source).exists()


def test_our_metrics_in_the_dashboard_exist() -> None:
    named = {name for query in queries() for name in re.findall(r"vllm:kv_eviction_\w+", query)}
    assert named and named <= OURS
