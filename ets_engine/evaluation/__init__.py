"""Measures methods side by side: accuracy, KV sharing, memory bandwidth, latency."""

from ets_engine.evaluation.bench import Bench
from ets_engine.evaluation.grading import Grade, grade
from ets_engine.evaluation.methods import STRATEGIES, Method, methods_of
from ets_engine.evaluation.problems import EvalProblem, load_problems
from ets_engine.evaluation.records import Outcome, Pass, Record, Results, Settings, read_results
from ets_engine.evaluation.rows import Comparison, Estimate, Row, Summary, read_summary
from ets_engine.evaluation.summary import summarise

__all__ = [
    "STRATEGIES",
    "Bench",
    "Comparison",
    "Estimate",
    "EvalProblem",
    "Grade",
    "Method",
    "Outcome",
    "Pass",
    "Record",
    "Results",
    "Row",
    "Settings",
    "Summary",
    "grade",
    "load_problems",
    "methods_of",
    "read_results",
    "read_summary",
    "summarise",
]
