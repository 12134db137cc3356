"""The search core: a tree, one loop, and one selector per published method; no torch, no I/O, no clock."""

from ets_engine.search.aggregate import Trajectory, rank_answers, reduce_scores, trajectories
from ets_engine.search.build import build_selector, effective_width, needs_scores
from ets_engine.search.cluster import cluster_steps
from ets_engine.search.dora import Dora
from ets_engine.search.drivers import answer, run
from ets_engine.search.ets import Ets, EtsKv
from ets_engine.search.frontier import build_frontier
from ets_engine.search.loop import search
from ets_engine.search.problem import KeepProblem
from ets_engine.search.requests import Embed, Expand, Progress, Request, Retain, Score, Start, StopSearch
from ets_engine.search.selectors import Beam, BeamSqrt, BestOfN, Dvts, Rebase
from ets_engine.search.solver import solve
from ets_engine.search.tree import SearchTree

__all__ = [
    "Beam",
    "BeamSqrt",
    "BestOfN",
    "Dora",
    "Dvts",
    "Embed",
    "Ets",
    "EtsKv",
    "Expand",
    "KeepProblem",
    "Progress",
    "Rebase",
    "Request",
    "Retain",
    "Score",
    "SearchTree",
    "Start",
    "StopSearch",
    "Trajectory",
    "answer",
    "build_frontier",
    "build_selector",
    "cluster_steps",
    "effective_width",
    "needs_scores",
    "rank_answers",
    "reduce_scores",
    "run",
    "search",
    "solve",
    "trajectories",
]
