"""Sweeps: which rows belong to them, the promise of a hard budget, and what is compared at equal memory."""

from __future__ import annotations

from typing import Any

import pytest

from ets_engine.evaluation import Record, Row, Settings, Summary, methods_of, summarise
from ets_engine.evaluation.records import Outcome
from ets_engine.evaluation.sweep import (
    BUDGET,
    Sweep,
    at_equal_memory,
    budget_lines,
    check_budgets,
    sweep_lines,
    sweep_panel,
    sweep_rows,
    variants,
)

SETTINGS = Settings(
    model="m",
    verifier="v",
    weights="w",
    data="d",
    search={"lambda_b": 1.0, "cluster_cut": 0.2, BUDGET: None},
    device="cpu",
    dtype="float32",
    machine={},
    copy_gb_s=1.0,
)


def summary(**methods: Any) -> Summary:
    """One problem per method: whether it is solved, and the peak of KV tokens."""
    return summarise([SETTINGS, *(record(name, *what) for name, what in methods.items())])


def record(method: str, solved: bool, peak: int) -> Record:
    outcome = Outcome(answer="1", strict=solved, lenient=solved, solved=solved)
    return Record(
        problem="p",
        digest="",
        level="",
        method=method,
        seed=0,
        concurrency=2,
        outcomes={"weighted": outcome},
        mean_kv_tokens=peak / 2,
        peak_kv_tokens=peak,
    )


def found(**more: tuple[bool, int]) -> Summary:
    return summary(
        **{
            "rebase@16": (True, 500),
            "ets@16": (True, 400),
            "ets@16 lambda_b=2": (False, 200),
            "ets@16 lambda_b=0.5": (True, 450),
            "ets@16 cluster_cut=0.4": (True, 300),
            "ets@16 lambda_b=3 node_cost=nodes": (False, 100),
            **more,
        }
    )


def budgets(*, largest: int = 290) -> list[Row]:
    """ETS under three budgets, one peer that fits and one that never does."""
    return list(
        summary(
            **{
                "ets@16 kv_budget_tokens=300": (True, largest),
                "ets@16 kv_budget_tokens=100": (False, 100),
                "rebase@4": (False, 120),
                "rebase@8": (True, 300),
                "rebase@16": (True, 301),
                "beam@4": (True, 9999),
            }
        ).rows
    )


def test_a_sweep_holds_the_runs_own_value_and_those_that_change_nothing_else() -> None:
    assert [(value, row.name) for value, row in sweep_rows(found(), "lambda_b")] == [
        (0.5, "ets@16 lambda_b=0.5"),
        (1.0, "ets@16"),
        (2.0, "ets@16 lambda_b=2"),
    ]
    assert [value for value, _ in sweep_rows(found(), "cluster_cut")] == [0.2, 0.4]


def test_its_variants_are_methods() -> None:
    names = [one.name for one in methods_of(variants("ets", "lambda_b", [0.5, 2.0]), [16])]
    assert names == ["ets@16 lambda_b=0.5", "ets@16 lambda_b=2"]


def test_its_panel_joins_the_values_in_order_and_shows_the_neighbours() -> None:
    panel = sweep_panel(found(), "lambda_b", lambda row: row.mean_kv_tokens, "KV", "lambda_b")
    neighbour, swept = panel.series
    assert neighbour.family == "rebase" and panel.title == "lambda_b, width 16"
    assert [(point.tag, point.cost) for point in swept.points] == [("0.5", 225.0), ("1", 200.0), ("2", 100.0)]


def test_its_table_fits_a_terminal() -> None:
    lines = sweep_lines(found(), "lambda_b")
    assert [line.split()[0] for line in lines] == ["lambda_b", "0.5", "1", "2", "rebase@16"]
    assert max(map(len, lines)) <= 80 and lines[3].split()[1:5] == ["0.0", "0-79", "100", "200"]
    assert max(map(len, budget_lines(at_equal_memory(budgets())))) <= 80


@pytest.mark.parametrize("largest", [301, 10_000])
def test_a_budget_that_was_exceeded_is_never_passed_over(largest: int) -> None:
    check_budgets(budgets(largest=300))
    with pytest.raises(AssertionError, match=f"held {largest} KV tokens, budget 300"):
        check_budgets(budgets(largest=largest))


def test_a_budget_whose_peak_is_unknown_does_not_pass_either() -> None:
    rows = [row.model_copy(update={"max_kv_tokens": None}) for row in budgets()]
    with pytest.raises(AssertionError, match="held None"):
        check_budgets(rows)


def test_equal_memory_is_the_widest_that_never_goes_over() -> None:
    small, large = at_equal_memory(budgets())
    assert (small.budget_tokens, large.budget_tokens) == (100, 300)
    assert small.peers == {"rebase": None, "beam": None}
    assert large.peers["rebase"] is not None and large.peers["rebase"].name == "rebase@8"
    assert large.peers["beam"] is None
    assert "none fits" in budget_lines([small, large])[1] and "(@8)" in budget_lines([small, large])[2]


def test_a_sweeps_file_is_read_back() -> None:
    kept = Sweep(command="python cookbook/bench_sweep.py", settings=found())
    assert Sweep.model_validate_json(kept.model_dump_json()) == kept
