"""The files of `docker/` parse, are pinned and fit each other; the dashboard's queries are sound.

Whether a server has what the queries ask for is seen in `tests/e2e/test_totals.py`.
"""

from __future__ import annotations

import contextlib
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client.samples import Sample

from tests.dashboard import dashboard, missing, needs, targets
from vllm_defensive.serving import prometheus as metrics

DOCKER = Path(__file__).parents[1] / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")


def steps(name: str, step: str) -> list[str]:
    """What follows each `step` of a Dockerfile, on its first line."""
    return re.findall(rf"^{step} +(.*)", (DOCKER / name).read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_pinned_unprivileged_and_says_how_it_is(name: str) -> None:
    (base,) = steps(name, "FROM")
    for argument in steps(name, "ARG"):
        base = base.replace(f"${{{argument.partition('=')[0]}}}", argument.partition("=")[2])
    assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+\S*", base)
    assert steps(name, "USER") == ["10001"]
    assert len(steps(name, "HEALTHCHECK")) == 1


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_copies_is_there_and_not_ignored(name: str) -> None:
    copied = [p for line in steps(name, "COPY") for p in line.split()[:-1]]
    sent = {line[1:] for line in (DOCKER.parent / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied and set(copied) <= sent
    assert all((DOCKER.parent / path).exists() for path in sent)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_volume_is_mounted_where_the_images_user_may_write(name: str) -> None:
    """An empty volume takes its owner from the folder that the image has there; where it has none, it is root's."""
    (volume,) = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["server"]["volumes"]
    folder = volume.split(":")[1]
    text = (DOCKER / name).read_text()
    assert f"install --directory --owner server --group server {folder}" in text
    assert re.search(r"useradd .*--uid 10001 server", text) and f"HOME={folder.removesuffix('/.cache')}" in text


def test_the_cpu_image_pins_all_that_it_installs() -> None:
    lines = (DOCKER.parent / "packaging" / "constraints-cpu.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) for pin in pins)
    names = {canonicalize_name(pin.name) for pin in pins}
    assert len(names) == len(pins)
    left = required("vllm-defensive", "cpu") - {"torchaudio", "torchcodec"}  # taken out where they do not fit
    assert left <= names


def required(project: str, extra: str = "") -> set[str]:
    """Names of what an installed distribution requires here, and what that requires."""
    found: set[str] = set()
    todo = [Requirement(f"{project}[{extra}]")]
    while todo:
        wanted = todo.pop()
        with contextlib.suppress(PackageNotFoundError):
            for line in distribution(wanted.name).requires or ():
                one = Requirement(line)
                extras = ("", *wanted.extras)
                if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras):
                    todo += [one] if canonicalize_name(one.name) not in found or one.extras else []
                    found.add(canonicalize_name(one.name))
    return found


def test_every_service_is_pinned_or_built_from_a_file_that_is_there() -> None:
    for service in yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"].values():
        if "image" in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        else:
            assert service["build"]["dockerfile"].removeprefix("docker/").strip("${}").split(":-")[1] in DOCKERFILES
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DOCKER / source).exists()
        # Our images have their health check inside.
        assert "healthcheck" in service or "build" in service


def test_panels_have_their_own_ids_and_places() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, f"{panel['title']}: the grid has 24 columns"
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, f"{panel['title']} overlaps another panel"
        taken |= cells


def test_panels_ask_the_data_source_that_the_reader_chooses() -> None:
    (variable,) = dashboard()["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    for panel in dashboard()["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
    provisioned = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert variable["current"]["value"] in {source["uid"] for source in provisioned["datasources"]}


def test_every_metric_of_ours_is_in_the_dashboard() -> None:
    named = {name for target in targets() for name in needs(target)}
    counters = (*metrics.COUNTERS.values(), metrics.BY_POLICY, metrics.KEPT_PAGES)
    expected = {f"{name}_total" for name, _ in counters} - {"vllm:kv_eviction_requests_total"}  # it is shown by policy
    assert expected <= named
    assert {name for name, _ in metrics.GAUGES.values()} <= named


@pytest.mark.parametrize(
    "expression, legend, fault",
    [
        ("sum by (policy) (rate(vllm:x_total[1m])", "{{policy}}", "unclosed left parenthesis"),
        ("sum(vllm:x)", "{{policy}}", "'policy'"),
        ("histogram_quantile(0.9, sum by (policy) (rate(vllm:x_bucket[5m])))", "{{policy}}", "'le'"),
    ],
)
def test_a_wrong_query_is_noticed(expression: str, legend: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        needs({"expr": expression, "legendFormat": legend})


def test_what_a_server_lacks_is_noticed() -> None:
    target = {"expr": 'sum by (policy) (rate(vllm:x_total{engine="0"}[1m]))', "legendFormat": "{{policy}}"}
    assert missing(target, [Sample("vllm:x_total", {"policy": "snapkv", "engine": "0"}, 1)]) == []
    assert missing(target, [Sample("vllm:x_total", {"policy": "snapkv"}, 1)]) == ["vllm:x_total has no label engine"]
    assert missing(target, []) == ["no metric vllm:x_total"]
