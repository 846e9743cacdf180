"""The goals of the kernels on a GPU, judged from the rows that the benchmarks saved: met, missed, or not measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """One sentence of the plan. `value` reads a case's rows by (pass, name) and may lack one: then it is not judged."""

    text: str
    benchmark: str
    cases: tuple[str, ...]  # a case counts when its name begins with one of these
    value: Callable[[dict[tuple[str, str], dict[str, Any]], dict[str, Any]], float]
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    case: str
    value: float | None  # None: not measured, `why` says why

    @property
    def why(self) -> str:
        if self.value is None:
            return "not measured"
        bound = self.goal.at_least if self.goal.at_least is not None else self.goal.at_most
        assert bound is not None
        is_met = self.value >= bound if self.goal.at_least is not None else self.value <= bound
        return "met" if is_met else "MISSED"


def _ratio(run: str, slower: str, faster: str):  # type: ignore[no-untyped-def]
    return lambda rows, _: rows[run, slower]["milliseconds"] / rows[run, faster]["milliseconds"]


def _of_memory(name: str, of: str):  # type: ignore[no-untyped-def]
    return lambda rows, _: rows["", name]["peak_mib"] / rows["", of]["peak_mib"]


def _of_copy(run: str):  # type: ignore[no-untyped-def]
    def share(rows: dict[tuple[str, str], dict[str, Any]], record: dict[str, Any]) -> float:
        row = rows[run, "capgap, CUDA graph"]
        return row["bytes"] / row["milliseconds"] * 1e3 / record["copy_bytes_per_second"]

    return share


def _of_matmul(rows: dict[tuple[str, str], dict[str, Any]], record: dict[str, Any]) -> float:
    row = rows["forward+backward", "capgap, experts alone"]
    return row["flop"] / row["milliseconds"] * 1e3 / record["matmul_flop_per_second"]["bfloat16"]


MANY_TOKENS = tuple(f"{hidden} E4 k1, {tokens} tokens" for hidden in (384, 768) for tokens in (65536, 131072))
ENCODERS = tuple(
    f"{hidden}/{4 * hidden} E4 k1, {tokens} tokens, bf" for hidden in (384, 768) for tokens in (65536, 131072)
)
DECODERS = ("2048/1024 E64 k8, 32768", "2048/768 E128 k8, 32768", "4096/14336 E8 k2, 32768")
VOCABULARIES = ("8192, 3072/4096, 32000", "8192, 3072/4096, 128256", "32768, 3072/4096, 32000")
BOTH = "forward+backward"

GOALS = (
    Goal("route + permute + combine forward, of copy bandwidth", "routing", MANY_TOKENS, _of_copy("forward"), 0.70),
    Goal("route + permute + combine with backward, of copy bandwidth", "routing", MANY_TOKENS, _of_copy(BOTH), 0.70),
    Goal(
        "times faster than DeepSpeed's eager path", "routing", MANY_TOKENS, _ratio(BOTH, "deepspeed eager", "capgap"), 3
    ),
    Goal(
        "launches forward, the router's own product not counted",
        "routing",
        MANY_TOKENS,
        lambda rows, _: rows["", "launches"]["launches"],
        at_most=5,
    ),
    Goal("experts with backward, of matmul rate", "expert_mlp", (*ENCODERS, *DECODERS), _of_matmul, 0.50),
    Goal(
        "times faster than transformers' grouped_mm",
        "expert_mlp",
        ENCODERS,
        _ratio(BOTH, "transformers grouped_mm", "capgap, experts alone"),
        1.3,
    ),
    Goal("times faster than Liger", "expert_mlp", DECODERS, _ratio(BOTH, "liger", "capgap, experts alone"), 1.0),
    Goal(
        "whole layer, speed of the dense feed-forward",
        "expert_mlp",
        (*ENCODERS, *DECODERS),
        _ratio(BOTH, "dense of equal compute", "capgap, router included"),
        0.9,
    ),
    Goal(
        "relation loss, times faster than the twin",
        "relation_kl",
        ("128 x 128, bf",),
        _ratio("", "plain twin", "capgap"),
        15,
    ),
    Goal(
        "relation loss, memory of the twin's",
        "relation_kl",
        ("128 x 128, bf",),
        _of_memory("capgap", "plain twin"),
        at_most=0.02,
    ),
    Goal(
        "vocabulary loss, times faster than full logits",
        "linear_kl",
        VOCABULARIES,
        _ratio("", "full logits", "capgap"),
        1.3,
    ),
    Goal(
        "vocabulary loss, memory of full logits",
        "linear_kl",
        VOCABULARIES,
        _of_memory("capgap", "full logits"),
        at_most=0.15,
    ),
    Goal(
        "vocabulary loss, speed of its matmuls alone",
        "linear_kl",
        VOCABULARIES,
        _ratio("", "matmuls alone", "capgap"),
        0.75,
    ),
    Goal(
        "vocabulary loss, times faster than Liger's",
        "linear_kl",
        VOCABULARIES,
        _ratio("", "liger fused linear jsd", "capgap"),
        1.0,
    ),
)


def verdicts(records: dict[str, dict[str, Any]]) -> list[Verdict]:
    """Every goal on every case that it names; `records` are results files by benchmark."""
    judged = []
    for goal in GOALS:
        record = records.get(goal.benchmark, {"rows": []})
        for beginning in goal.cases:
            case = next((row["case"] for row in record["rows"] if row["case"].startswith(beginning)), beginning)
            rows = {
                (row.get("pass", ""), row.get("name", "launches")): row
                for row in record["rows"]
                if row["case"] == case and "failed" not in row
            }
            try:
                value = float(goal.value(rows, record))
            except KeyError:
                value = None
            judged.append(Verdict(goal, case, value))
    return judged


def table(judged: list[Verdict]) -> str:
    lines = ["| goal | case | wanted | measured | |", "|---|---|---|---|---|"]
    for verdict in judged:
        goal, value = verdict.goal, verdict.value
        wanted = f">= {goal.at_least}" if goal.at_least is not None else f"<= {goal.at_most}"
        lines.append(
            f"| {goal.text} | {verdict.case} | {wanted} | {'' if value is None else f'{value:.3g}'} | {verdict.why} |"
        )
    return "\n".join(lines)
