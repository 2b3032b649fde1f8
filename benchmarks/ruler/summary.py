"""Tables of answers: means by task and policy, the full cache's share, and what two policies differ by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality import metrics
from benchmarks.ruler.answers import FULL, Row

ABLE = 50.0  # a task of which the full cache does less than this says more about the model than about an eviction

Sample = tuple[str, int]  # task and index


@dataclass(frozen=True)
class Table:
    """One model, length, protocol and ratio. scores: policy -> sample -> 0 to 100, the same samples for each policy."""

    model: str
    length: int
    protocol: str
    keep: float
    scores: Mapping[str, Mapping[Sample, float]]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in next(iter(self.scores.values()))))

    def of(self, policy: str, task: str) -> list[float]:
        return [score for (name, _), score in self.scores[policy].items() if name == task]

    def mean(self, policy: str, tasks: Sequence[str]) -> float:
        """Of the tasks' means: each task counts the same, however many samples it has."""
        return metrics.mean([metrics.mean(self.of(policy, task)) for task in tasks])

    def able(self) -> list[str]:
        """The tasks that the full cache does."""
        return [task for task in self.tasks if FULL in self.scores and metrics.mean(self.of(FULL, task)) >= ABLE]

    def difference(self, first: str, second: str, tasks: Sequence[str]) -> tuple[float, tuple[float, float]]:
        """Mean over `tasks` of first minus second on the same samples, and its bootstrap interval over samples."""
        pairs = [zip(self.of(first, task), self.of(second, task), strict=True) for task in tasks]
        strata = [[a - b for a, b in both] for both in pairs]
        return metrics.mean([metrics.mean(values) for values in strata]), metrics.stratified_interval(strata)


def collect(rows: Sequence[Row], policies: Sequence[str] = ()) -> list[Table]:
    """All tables that `rows` give, with `policies` as columns (default: all there are, the full cache first).

    A table holds the samples that every one of its policies has answered.
    """
    full: dict[tuple[str, int], dict[Sample, float]] = {}
    groups: dict[tuple[str, int, str, float], dict[str, dict[Sample, float]]] = {}
    for row in rows:
        sample, place = (row["task"], row["index"]), (row["model"], row["length"])
        if row["policy"] == FULL:
            full.setdefault(place, {})[sample] = row["score"]
        elif not policies or row["policy"] in policies:
            by_policy = groups.setdefault((*place, row["protocol"], row["keep"]), {})
            by_policy.setdefault(row["policy"], {})[sample] = row["score"]
    tables = []
    for key, found in sorted(groups.items(), key=lambda group: (*group[0][:3], -group[0][3])):
        columns = {FULL: full[key[:2]], **found} if key[:2] in full else found
        tables.append(Table(*key, _on_common_samples(columns)))
    return [table for table in tables if table.tasks]


def _on_common_samples(columns: Mapping[str, Mapping[Sample, float]]) -> dict[str, dict[Sample, float]]:
    first, *others = columns.values()
    common = [sample for sample in first if all(sample in other for other in others)]
    return {policy: {sample: scores[sample] for sample in common} for policy, scores in columns.items()}


def tables(rows: Sequence[Row], policies: Sequence[str] = (), compare: Sequence[str] = ()) -> str:
    """All tables as Markdown, and the seconds that the answers took."""
    return "\n\n".join([*(_markdown(table, compare) for table in collect(rows, policies)), _seconds(rows)])


def _markdown(table: Table, compare: Sequence[str]) -> str:
    both = compare if all(name in table.scores for name in compare) else ()
    policies, tasks, able = list(table.scores), table.tasks, table.able()
    title = f"{table.model}, {table.length} tokens, question {table.protocol}, keep {table.keep:g}"
    header = ["task", "samples", *policies, *([" - ".join(both)] if both else [])]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, some in [*((task, [task]) for task in tasks), ("mean", tasks), (f"full at {ABLE:g} or more", able)]:
        if some:
            lines.append([name, str(sum(len(table.of(policies[0], task)) for task in some))])
            lines[-1] += [f"{table.mean(policy, some):.1f}" for policy in policies]
            lines[-1] += [_difference(table, both, some)] if both else []
    if able:
        shares = [f"{table.mean(policy, able) / table.mean(FULL, able):.3f}" for policy in policies]
        lines.append(["the same, share of full", "", *shares, *[""] * bool(both)])
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _difference(table: Table, both: Sequence[str], tasks: Sequence[str]) -> str:
    mean, (low, high) = table.difference(*both, tasks)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _seconds(rows: Sequence[Row]) -> str:
    """For whoever plans a run: what a prompt and an answer took on average."""
    by_place: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        by_place.setdefault((row["model"], row["length"]), []).append(row)
    return "\n".join(_seconds_of(*place, some) for place, some in sorted(by_place.items()))


def _seconds_of(model: str, length: int, rows: Sequence[Row]) -> str:
    prompts: dict[Any, float] = {(row["task"], row["index"]): row["prefill_seconds"] for row in rows}
    prefill, answer = metrics.mean(list(prompts.values())), metrics.mean([row["seconds"] for row in rows])
    return f"{model}, {length} tokens: {prefill:.1f} s a prompt, {answer:.1f} s an answer ({len(rows)} answers)"
