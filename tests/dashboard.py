"""The Grafana dashboard as Prometheus reads it: each query's syntax tree, and what its metrics must have."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import promql_parser as promql

DASHBOARD = Path(__file__).parents[1] / "docker" / "grafana" / "dashboards" / "kv-eviction.json"


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def targets() -> list[dict[str, Any]]:
    """The queries of all panels: `expr` and `legendFormat`."""
    return [target for panel in dashboard()["panels"] for target in panel["targets"]]


def needs(target: dict[str, Any]) -> dict[str, set[str]]:
    """Metrics that a query reads -> the labels that they must have for it to show what its legend says.

    Raises ValueError if the expression is not PromQL, or if one of its aggregations drops a label that is wanted of the
    result: by the legend, by an aggregation around it, or by `histogram_quantile`, which wants `le`.
    """
    found: dict[str, set[str]] = defaultdict(set)
    wanted = [set(re.findall(r"\{\{ *(\w+) *\}\}", target["legendFormat"]))]  # the innermost last

    def enter(node: promql.Expr) -> None:
        match node:
            case promql.AggregateExpr():
                kept = set(node.modifier.labels) if node.modifier else set()
                if node.modifier and node.modifier.type != promql.AggModifierType.By:
                    raise ValueError(f"{target['expr']}: aggregate by the labels that stay")
                if lost := wanted[-1] - kept:
                    raise ValueError(f"{target['expr']}: {sorted(lost)} are wanted, and aggregated away")
                wanted.append(kept)
            case promql.Call() if node.func.name == "histogram_quantile":
                wanted.append(wanted[-1] | {"le"})
            case promql.VectorSelector():
                found[node.name] |= wanted[-1] | {matcher.name for matcher in node.matchers.matchers}

    def leave(node: promql.Expr) -> None:
        if isinstance(node, promql.AggregateExpr) or (
            isinstance(node, promql.Call) and node.func.name == "histogram_quantile"
        ):
            wanted.pop()

    promql.walk(promql.parse(target["expr"]), enter, leave)
    return dict(found)


def missing(target: dict[str, Any], samples: Iterable[Any]) -> list[str]:
    """What a query needs and a server's samples (`prometheus_client`'s) have not."""
    labels: dict[str, set[str]] = {}
    for sample in samples:
        labels[sample.name] = labels.get(sample.name, set(sample.labels)) & set(sample.labels)
    absent = [f"no metric {name}" for name in needs(target) if name not in labels]
    return absent + [
        f"{name} has no label {label}"
        for name, wanted in needs(target).items()
        if name in labels
        for label in sorted(wanted - labels[name])
    ]
