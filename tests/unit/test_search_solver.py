"""The pruning problem on trees small enough to solve by hand; random trees are in tests/property."""

from dataclasses import replace

import numpy as np
import pytest

from ets_engine.search.knapsack import solve_knapsack
from ets_engine.search.presolve import presolve
from ets_engine.search.problem import KeepProblem
from ets_engine.search.solver import drop_idle, solve, solve_greedy, solve_milp, solve_reduced, solve_tree

# root -> n1 {c1, c2}, n3 {c3, c4}, n5 {c5}; clusters {c1..c4}, {c5}
PARENTS = (-1, 0, 0, 0, 1, 1, 2, 2, 3)
LEAVES = (4, 5, 6, 7, 8)
REWARDS = (0.4, 0.0, 0.2, 0.2, 0.2)


def five_leaves(lambda_b: float, lambda_d: float) -> KeepProblem:
    return KeepProblem(PARENTS, LEAVES, REWARDS, (lambda_b / 9,) * 9, (0, 0, 0, 0, 1), lambda_d / 2)


def names(kept) -> str:
    return " ".join(f"c{leaf + 1}" for leaf in kept)


@pytest.mark.parametrize(
    ("lambda_b", "lambda_d", "kept"),
    [
        (0.0, 0.0, "c1 c3 c4 c5"),  # c2 is a tie, and a tie is not kept
        (1.0, 0.0, "c1 c3 c4"),
        (1.5, 0.0, "c1"),
        (1.0, 1.0, "c1 c3 c4 c5"),
        (1.5, 1.0, "c1 c5"),
        (2.0, 1.0, "c1 c5"),
        (3.0, 1.5, "c1 c5"),
    ],
)
def test_hand_cases(lambda_b, lambda_d, kept):
    problem = five_leaves(lambda_b, lambda_d)
    assert names(solve(problem)) == kept
    assert names(solve_milp(problem)) == kept
    assert names(solve_reduced(problem)) == kept
    if lambda_d == 0:
        assert names(solve_tree(problem)) == kept


def test_objective_of_a_hand_case():
    # c1 and c5 at (1.5, 1): 0.4 + 0.2 - 1.5 * 5 / 9 + 1.0
    assert five_leaves(1.5, 1.0).objective([0, 4]) == pytest.approx(0.6 - 7.5 / 9 + 1.0, abs=1e-12)


def test_a_leaf_without_a_cluster_covers_nothing():
    problem = KeepProblem((-1, 0, 0), (1, 2), (0.25, 0.25), (0.0,) * 3, (-1, 0), 4.0)
    assert [problem.objective(kept) for kept in ([0], [1], [0, 1])] == [0.25, 4.25, 4.5]
    assert solve(problem) == solve_milp(problem) == solve_reduced(problem) == (0, 1)


def test_one_leaf_is_kept_even_when_every_leaf_loses():
    problem = five_leaves(50.0, 0.0)
    assert solve(problem) == solve_milp(problem) == solve_tree(problem) == (0,)
    problem = five_leaves(50.0, 0.1)
    assert solve(problem) == solve_milp(problem) == (0,)
    assert solve_greedy(problem) == (0,)


def test_the_least_evil_may_be_several_leaves():
    # The branch costs 10 and each leaf below it gains 3: both together lose 4, one alone 7, the other branch's leaf 6.
    problem = KeepProblem((-1, 0, 1, 1, 0, 4), (2, 3, 5), (3.0, 3.0, 0.0), (0.0, 10.0, 0.0, 0.0, 5.0, 1.0))
    assert solve_tree(problem) == solve_milp(problem) == (0, 1)
    sized = KeepProblem(problem.parents, problem.leaves, problem.rewards, problem.prices, sizes=(1,) * 6, capacity=4)
    assert solve_knapsack(sized) == solve(sized) == (0, 1)
    tight = KeepProblem(problem.parents, problem.leaves, problem.rewards, problem.prices, sizes=(1,) * 6, capacity=3)
    assert solve_knapsack(tight) == solve(tight) == (2,)


def test_the_least_evil_is_found_without_the_program_over_all_leaves(monkeypatch):
    """On random trees with prices that nothing pays for, against every set of leaves."""
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(60):
        parents = [-1, *(int(rng.integers(max(0, node - 4), node)) for node in range(1, 14))]
        leaves = [node for node in range(14) if node not in parents]
        rewards = rng.dirichlet(np.ones(len(leaves)))
        prices = rng.uniform(0.0, 1.5, 14)
        clusters = rng.integers(0, 3, len(leaves))
        cases.append(
            KeepProblem(*map(tuple, (parents, leaves, rewards.tolist(), prices.tolist(), clusters.tolist())), 0.1)
        )
    monkeypatch.setattr("ets_engine.search.solver.milp", None)
    losing = 0
    for problem in cases:
        best = max(problem.objective(kept) for kept in sets_of(len(problem.leaves)))
        losing += best + problem.prices[0] < 0
        kept = solve(problem)
        assert kept and problem.objective(kept) == pytest.approx(best, abs=1e-12)
    assert losing > 20


def sets_of(count: int) -> list[list[int]]:
    """All sets of leaves but the empty one."""
    return [[leaf for leaf in range(count) if bits >> leaf & 1] for bits in range(1, 1 << count)]


def test_root_only():
    problem = KeepProblem((-1,), (0,), (1.0,), (5.0,), (0,), 1.0)
    assert solve(problem) == solve_milp(problem) == solve_tree(problem) == solve_greedy(problem) == (0,)


def test_greedy_can_be_wrong_and_is_only_the_fallback(monkeypatch):
    # Either branch costs more than the one cluster that a first leaf covers; c5 beside them earns exactly its price.
    # Greedy takes c5 first and then finds no single leaf that pays for a branch.
    problem = KeepProblem(
        (-1, 0, 0, 1, 1, 2, 2, 0),
        (3, 4, 5, 6, 7),
        (0.0,) * 4 + (0.1,),
        (0.0, 0.3, 0.28) + (0.0,) * 4 + (0.1,),
        (0, 1, 0, 1, -1),
        0.25,
    )
    assert (names(solve(problem)), names(solve_greedy(problem))) == ("c3 c4", "c5")
    monkeypatch.setattr("ets_engine.search.solver._MAX_CELLS", 0)
    assert names(solve(problem)) == "c3 c4"  # by HiGHS
    monkeypatch.setattr("ets_engine.search.solver.solve_milp", lambda problem: None)
    assert names(solve(problem)) == "c5"


def test_greedy_respects_count_and_capacity():
    problem = KeepProblem((-1, 0, 0, 0), (1, 2, 3), (0.5, 0.4, 0.3), (0.0,) * 4, max_kept=2)
    assert solve_greedy(problem) == (0, 1)
    sized = KeepProblem((-1, 0, 0, 0), (1, 2, 3), (0.5, 0.4, 0.3), (0.0,) * 4, sizes=(1, 9, 2, 2), capacity=5)
    assert solve_greedy(sized) == (1, 2)


def test_a_count_without_coverage_is_exact_too():
    # Two leaves share a branch that one alone does not pay for; greedy takes the two that pay for themselves.
    problem = KeepProblem(
        (-1, 0, 0, 0, 1, 1), (2, 3, 4, 5), (0.2, 0.05, 0.4, 0.4), (0.0, 0.5, 0.0, 0.0, 0.0, 0.0), max_kept=2
    )
    assert solve_greedy(problem) == (0, 1)
    assert solve(problem) == (2, 3)


def test_a_capacity_that_does_not_bind_changes_nothing():
    # All five leaves would take 9 units, the three worth keeping 6: no table, no integer program is needed.
    roomy = replace(five_leaves(1.0, 0.0), clusters=(), sizes=(1,) * 9, capacity=6)
    assert names(solve(roomy)) == "c1 c3 c4"
    assert names(solve(replace(roomy, capacity=5))) == "c1"  # 0.4 - 3/9, more than c1 and c3 or c3 and c4


def test_own_prices_count_every_node_that_one_leaf_alone_holds():
    # root -> a -> {b, c -> d}, e -> f: d alone holds c, f alone holds e; a and the root are shared.
    problem = KeepProblem((-1, 0, 1, 1, 3, 0, 5), (2, 4, 6), (0.0,) * 3, (64.0, 32.0, 1.0, 2.0, 4.0, 8.0, 16.0))
    assert problem.own_prices() == [1.0, 6.0, 24.0]
    assert replace(problem, leaves=(6,)).own_prices() == [88.0]  # one leaf holds its whole path


def test_a_count_and_a_capacity_bind_together():
    # All take 10 units; in 8, c1 with two small ones beats c1 with c2, unless only two may stay.
    problem = KeepProblem((-1, 0, 0, 0, 0), (1, 2, 3, 4), (0.6, 0.4, 0.3, 0.2), (0.0,) * 5, sizes=(0, 5, 3, 1, 1))
    assert names(solve(replace(problem, capacity=9))) == "c1 c2 c3"
    assert names(solve(replace(problem, capacity=8))) == "c1 c3 c4"
    assert names(solve(replace(problem, capacity=8, max_kept=2))) == "c1 c2"


def test_highs_respects_the_count():
    problem = KeepProblem(
        (-1, 0, 0, 0), (1, 2, 3), (0.5, 0.4, 0.3), (0.0,) * 4, clusters=(0, 1, 2), cluster_worth=0.1, max_kept=2
    )
    assert solve(problem) == solve_milp(problem) == (0, 1)


def test_highs_tells_small_differences():
    # HiGHS stops at an absolute gap of 1e-6; without the scaling of the objective most of these come out wrong.
    rng = np.random.default_rng(0)
    for _ in range(10):
        branches = np.sort(np.append(np.arange(1, 9), rng.integers(1, 9, 32)))  # [L] parent of each of 40 leaves
        clusters = np.unique(rng.integers(0, 10, 40), return_inverse=True)[1]  # [L]
        problem = KeepProblem(
            parents=(-1, *(0,) * 8, *branches.tolist()),
            leaves=tuple(range(9, 49)),
            rewards=tuple((rng.integers(0, 3, 40) / 64 + 1e-7 * rng.random(40)).tolist()),
            prices=tuple((rng.integers(0, 4, 49) / 64).tolist()),
            clusters=tuple(clusters.tolist()),
            cluster_worth=2 / 64,
        )
        best = problem.objective(solve_reduced(problem))
        assert problem.objective(solve_milp(problem)) == pytest.approx(best, abs=1e-9)


def test_capacity_by_hand():
    problem = KeepProblem((-1, 0, 0, 0), (1, 2, 3), (0.6, 0.4, 0.3), (0.0,) * 4, sizes=(2, 9, 5, 4), capacity=11)
    assert solve(problem) == solve_knapsack(problem) == solve_milp(problem) == (1, 2)  # 0.7 beats 0.6
    with pytest.raises(ValueError, match="no leaf fits the capacity of 5"):
        solve(KeepProblem((-1, 0, 0), (1, 2), (0.6, 0.4), (0.0,) * 3, sizes=(2, 9, 5), capacity=5))


def test_what_cannot_be_asked_of_a_solver():
    problem = KeepProblem((-1, 0, 0), (1, 2), (0.6, 0.4), (0.0,) * 3, sizes=(2, 9, 5), capacity=5)
    assert solve_milp(problem) is None  # no leaf fits
    with pytest.raises(ValueError, match="needs a capacity"):
        solve_knapsack(replace(problem, capacity=None))


def test_coarse_units_never_exceed_the_capacity():
    parents = (-1, *(0,) * 40)
    sizes = (100, *range(100, 140))
    problem = KeepProblem(parents, tuple(range(1, 41)), (0.1,) * 40, (0.0,) * 41, sizes=sizes, capacity=1500)
    exact, coarse = solve_knapsack(problem), solve_knapsack(problem, max_cells=2000)
    assert len(exact) == 13  # 100 + (100 + ... + 112) = 1478
    assert problem.feasible(coarse)
    assert len(coarse) >= 10


def test_a_path_that_fits_only_in_exact_units_is_still_found():
    problem = KeepProblem((-1, 0, 0), (1, 2), (0.5, 0.5), (0.0,) * 3, sizes=(7, 7, 99), capacity=14)
    assert solve_knapsack(problem, max_cells=6) is None
    assert solve(problem) == (0,)


def test_presolve_leaves_a_rest_and_drops_the_hopeless():
    # c5's cluster has one leaf left, so its worth joins the reward; c2 stands in a covered cluster and gains nothing.
    reduced = presolve(five_leaves(1.5, 1.0))
    assert (names(reduced.kept), reduced.rest) == ("c1 c5", None)


def test_drop_idle_keeps_the_value():
    problem = five_leaves(0.0, 0.0)
    assert problem.objective(range(5)) == problem.objective(drop_idle(problem, range(5)))
    assert names(drop_idle(problem, range(5))) == "c1 c3 c4 c5"
    twins = KeepProblem((-1, 0, 0), (1, 2), (0.0, 0.0), (0.0,) * 3, (0, 0), 1.0)
    assert drop_idle(twins, (0, 1)) == (0,)  # of equals the earlier stays
