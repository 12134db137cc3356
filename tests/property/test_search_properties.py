"""What holds for every frontier: sums, monotony, order, budgets, and exact solvers that agree with brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ets_engine.config import SearchConfig
from ets_engine.errors import ContextLengthError
from ets_engine.protocols import Frontier
from ets_engine.search import Beam, BeamSqrt, BestOfN, Dora, Dvts, Ets, EtsKv, KeepProblem, Rebase, run, search, solve
from ets_engine.search.allocate import ceil_shares, floor_one_shares, largest_remainder_shares
from ets_engine.search.cluster import cluster_steps
from ets_engine.search.coverage import solve_coverage
from ets_engine.search.knapsack import solve_knapsack
from ets_engine.search.solver import solve_greedy, solve_milp, solve_reduced, solve_tree
from ets_engine.testing import FakePolicy, HashEmbedder, TableVerifier

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
few = settings(quick, max_examples=60)
scores = st.floats(0.0, 1.0, allow_subnormal=False)
temperatures = st.sampled_from([0.01, 0.2, 1.0])


@st.composite
def frontiers(draw, max_leaves: int = 8, distinct: bool = False) -> Frontier:
    """A frontier one to three levels deep."""
    parents, level = [-1], [0]
    depth = draw(st.integers(1, 3))
    for below in range(depth, 0, -1):
        counts = [draw(st.integers(1, 3)) for _ in level]
        next_level = []
        for node, count in zip(level, counts, strict=True):
            for _ in range(count):
                if len(next_level) < max_leaves - (below > 1):
                    parents.append(node)
                    next_level.append(len(parents) - 1)
        level = next_level
    held = set()
    for leaf in level:
        while leaf >= 0:
            held.add(leaf)
            leaf = parents[leaf]
    places = {node: place for place, node in enumerate(sorted(held))}
    leaf_scores = draw(st.lists(scores, min_size=len(level), max_size=len(level), unique=distinct))
    tokens = draw(st.lists(st.integers(0, 40), min_size=len(places), max_size=len(places)))
    vectors = draw(st.lists(st.integers(0, 5), min_size=len(level), max_size=len(level)))
    return Frontier(
        parents=tuple(-1 if parents[node] < 0 else places[parents[node]] for node in sorted(held)),
        num_tokens=tuple(tokens),
        leaves=tuple(places[leaf] for leaf in level),
        scores=tuple(leaf_scores),
        subtrees=tuple(range(len(level))),
        depth=depth,
        max_step_tokens=draw(st.integers(0, 20)),
        embeddings=np.eye(6)[vectors],
    )


@st.composite
def problems(draw, coverage: bool = True, capacity: bool = False) -> KeepProblem:
    """A pruning problem, with many ties when its numbers are drawn from few."""
    frontier = draw(frontiers())
    number = draw(st.sampled_from([st.floats(0.0, 1.0), st.sampled_from([0.0, 0.125, 0.25, 0.5])]))
    count, num_nodes = len(frontier.leaves), len(frontier.parents)
    labels = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    names = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    problem = KeepProblem(
        frontier.parents,
        frontier.leaves,
        tuple(draw(st.lists(number, min_size=count, max_size=count))),
        tuple(draw(st.lists(number, min_size=num_nodes, max_size=num_nodes))),
        tuple(names[label] for label in labels) if coverage else (),
        draw(st.sampled_from([0.0625, 0.25, 0.5])) if coverage else 0.0,
    )
    if not capacity:
        return problem
    sizes = frontier.num_tokens
    least = min(sum(sizes[node] for node in problem.path(leaf)) for leaf in range(count))
    return replace(problem, sizes=sizes, capacity=draw(st.integers(least, max(least, sum(sizes)))))


def optimum(problem: KeepProblem) -> float:
    """The best objective, by trying every set of leaves."""
    leaves = range(len(problem.leaves))
    subsets = itertools.chain.from_iterable(itertools.combinations(leaves, size) for size in range(1, len(leaves) + 1))
    return max(problem.objective(kept) for kept in subsets if problem.feasible(kept))


def assert_optimal(problem: KeepProblem, kept) -> None:
    assert problem.feasible(kept)
    assert problem.objective(kept) == pytest.approx(optimum(problem), abs=1e-9)


@quick
@given(problems(coverage=False))
def test_tree_program_and_highs_are_exact_without_coverage(problem):
    for solver in (solve, solve_tree, solve_milp):
        assert_optimal(problem, solver(problem))


@quick
@given(problems())
def test_presolve_and_highs_are_exact_with_coverage(problem):
    for solver in (solve, solve_reduced, solve_milp):
        assert_optimal(problem, solver(problem))


@quick
@given(problems())
def test_the_program_over_clusters_is_exact(problem):
    kept = solve_coverage(problem)
    root_alone = -problem.prices[0]
    assert (problem.objective(kept) if kept else root_alone) == pytest.approx(
        max(optimum(problem), root_alone), abs=1e-9
    )


@quick
@given(problems(coverage=False, capacity=True))
def test_knapsack_and_highs_are_exact_under_a_capacity(problem):
    for solver in (solve, solve_knapsack, solve_milp):
        assert_optimal(problem, solver(problem))


@few
@given(problems(capacity=True))
def test_highs_is_exact_with_coverage_under_a_capacity(problem):
    assert_optimal(problem, solve(problem))


@few
@given(problems(capacity=True) | problems(coverage=False, capacity=True) | problems(), st.integers(1, 4))
def test_every_combination_of_coverage_capacity_and_count_is_exact(problem, max_kept):
    assert_optimal(replace(problem, max_kept=max_kept), solve(replace(problem, max_kept=max_kept)))


@few
@given(frontiers(), st.integers(1, 40), st.sampled_from([0.0, 1.45]))
def test_the_published_bonus_keeps_everything_and_that_is_optimal(frontier, open_width, lambda_d):
    problem = Ets(lambda_b=0.0, lambda_d=lambda_d, published=True).problem(frontier, open_width)
    assert_optimal(problem, solve(problem))
    assert solve(problem) == tuple(range(len(frontier.leaves)))


@quick
@given(problems(capacity=True))
def test_greedy_is_feasible_and_never_beats_the_optimum(problem):
    kept = solve_greedy(problem)
    assert problem.feasible(kept)
    assert problem.objective(kept) <= optimum(problem) + 1e-9


@few
@given(problems(coverage=False, capacity=True), st.integers(4, 400))
def test_coarse_knapsack_is_feasible(problem, max_cells):
    kept = solve_knapsack(problem, max_cells=max_cells)
    assert kept is None or problem.feasible(kept)
    assert problem.feasible(solve(problem))


@quick
@given(st.lists(scores, min_size=1, max_size=30), st.integers(0, 300), temperatures)
def test_ceil_rule_sums_and_is_monotone(leaf_scores, width, temperature):
    shares = ceil_shares(leaf_scores, width, temperature=temperature)
    assert sum(shares) == width
    assert_monotone(leaf_scores, shares)


@quick
@given(st.lists(scores, min_size=1, max_size=30), st.integers(0, 300), temperatures)
def test_floor_one_rule_sums_is_monotone_and_kills_nobody(leaf_scores, extra, temperature):
    width = len(leaf_scores) + extra
    shares = floor_one_shares(leaf_scores, width, temperature=temperature)
    assert sum(shares) == width
    assert min(shares) >= 1
    assert_monotone(leaf_scores, shares)


@quick
@given(st.lists(st.sampled_from([0, 1, 100, 500, 501, 502]), min_size=3, max_size=6), st.integers(1, 4))
def test_both_rules_are_monotone_where_quotas_are_almost_whole(steps, children):
    leaf_scores = [0.5 + 1e-12 * step for step in steps]
    for split in (ceil_shares, floor_one_shares):
        shares = split(leaf_scores, children * len(steps), temperature=0.2)
        assert sum(shares) == children * len(steps)
        assert_monotone(leaf_scores, shares)


@quick
@given(st.lists(scores, min_size=1, max_size=30), st.integers(0, 300))
def test_largest_remainder_stays_within_one_of_its_quota(weights, width):
    assume(sum(weights) > 1e-9)
    shares = largest_remainder_shares(weights, width)
    assert sum(shares) == width
    assert all(abs(share - width * w / sum(weights)) < 1 + 1e-6 for share, w in zip(shares, weights, strict=True))
    assert_monotone(weights, shares)


def assert_monotone(leaf_scores, shares) -> None:
    """A better leaf never gets fewer children."""
    ranked = sorted(zip(leaf_scores, shares, strict=True))
    for (low, few_children), (high, more_children) in itertools.pairwise(ranked):
        assert few_children <= more_children or low == high


SUMMING = [Beam(2), BeamSqrt(), Dvts(2), Rebase(), Dora(), Ets(), EtsKv(), Ets(node_cost="nodes"), Ets(published=True)]


@few
@pytest.mark.parametrize("selector", SUMMING, ids=repr)
@given(frontier=frontiers(), open_width=st.integers(1, 40))
def test_shares_sum_to_the_open_width(selector, frontier, open_width):
    shares = selector.select(frontier, open_width).shares
    assert sum(shares) == open_width
    assert min(shares) >= 0


@quick
@given(frontiers(), st.integers(1, 40))
def test_best_of_n_never_exceeds_the_open_width(frontier, open_width):
    assert sum(BestOfN().select(frontier, open_width).shares) == min(len(frontier.leaves), open_width)


MONOTONE = [Beam(2), BeamSqrt(), Rebase()]


@few
@pytest.mark.parametrize("selector", MONOTONE, ids=repr)
@given(frontier=frontiers(distinct=True), open_width=st.integers(1, 40))
def test_a_better_leaf_never_gets_fewer_children(selector, frontier, open_width):
    assert_monotone(frontier.scores, selector.select(frontier, open_width).shares)


ORDER_FREE = [Beam(2), BeamSqrt(), Rebase(), Dora(), EtsKv()]


@few
@pytest.mark.parametrize("selector", ORDER_FREE, ids=repr)
@given(frontier=frontiers(distinct=True), open_width=st.integers(1, 40), shuffle=st.randoms(use_true_random=False))
def test_leaf_order_does_not_matter(selector, frontier, open_width, shuffle):
    order = list(range(len(frontier.leaves)))
    shuffle.shuffle(order)
    shuffled = reordered(frontier, order)
    shares = selector.select(frontier, open_width).shares
    again = selector.select(shuffled, open_width).shares
    if isinstance(selector, Dora):  # equal weights are ties
        assert sorted(shares) == sorted(again)
    else:
        assert again == tuple(shares[leaf] for leaf in order)


@few
@given(frontiers(distinct=True), st.integers(1, 40), st.randoms(use_true_random=False))
def test_leaf_order_does_not_change_the_value_of_what_ets_keeps(frontier, open_width, shuffle):
    order = list(range(len(frontier.leaves)))
    shuffle.shuffle(order)
    problem, shuffled = (Ets().problem(seen, open_width) for seen in (frontier, reordered(frontier, order)))
    assert problem.objective(solve(problem)) == pytest.approx(shuffled.objective(solve(shuffled)), abs=1e-9)


def reordered(frontier: Frontier, order) -> Frontier:
    """The same frontier with its leaves listed in another order."""
    return replace(
        frontier,
        leaves=tuple(frontier.leaves[leaf] for leaf in order),
        scores=tuple(frontier.scores[leaf] for leaf in order),
        subtrees=tuple(frontier.subtrees[leaf] for leaf in order),
        embeddings=frontier.embeddings[list(order)],
    )


@quick
@given(frontiers(), st.integers(1, 40), st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([0.0, 1.0]))
def test_our_rule_never_kills_a_kept_leaf(frontier, open_width, lambda_b, lambda_d):
    selector = Ets(lambda_b=lambda_b, lambda_d=lambda_d)
    shares = selector.select(frontier, open_width).shares
    assert {leaf for leaf, share in enumerate(shares) if share} == set(solve(selector.problem(frontier, open_width)))


@quick
@given(frontiers(), st.integers(1, 12), st.integers(1, 400), st.sampled_from([0.0, 1.0]))
def test_the_budget_is_never_exceeded(frontier, open_width, budget_tokens, lambda_d):
    selector = Ets(lambda_d=lambda_d, lambda_b=0.5, kv_budget_tokens=budget_tokens)
    problem = selector.problem(frontier, open_width)
    paths = [sum(frontier.num_tokens[node] for node in problem.path(leaf)) for leaf in range(len(frontier.leaves))]
    try:
        shares = selector.select(frontier, open_width).shares
    except ContextLengthError:
        assert min(paths) + frontier.max_step_tokens > budget_tokens
        return
    kept = [leaf for leaf, share in enumerate(shares) if share]
    held_tokens = sum(frontier.num_tokens[node] for node in problem.held(kept))
    assert kept
    assert held_tokens + sum(shares) * frontier.max_step_tokens <= budget_tokens
    assert sum(shares) <= open_width


@quick
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.sampled_from([0.0, 0.05, 0.2, 1.0]))
def test_equal_steps_share_a_cluster_and_names_count_up(kinds, cut):
    vectors = np.array([[0.0, 0.0], [1.0, 0.0], [0.3, 0.7], [-1.0, 0.1]])[kinds]
    clusters = cluster_steps(vectors, cut)
    assert sorted(set(clusters)) == list(range(len(set(clusters))))
    assert list(dict.fromkeys(clusters)) == sorted(set(clusters))
    for (kind, cluster), (other, its_cluster) in itertools.combinations(zip(kinds, clusters, strict=True), 2):
        assert cluster == its_cluster or kind != other


@few
@given(
    st.sampled_from(["best_of_n", "beam", "beam_sqrt", "dvts", "rebase", "ets_kv", "ets", "ets_published", "dora"]),
    st.integers(1, 12),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.2, 0.8]),
)
def test_every_search_is_sound(strategy, width, seed, finish_chance):
    policy = FakePolicy(seed=seed, finish_chance=finish_chance)
    verifier = TableVerifier()
    config = SearchConfig(strategy=strategy, width=width, max_steps=5, max_tokens=40, max_step_tokens=12)
    tree = run(search(config), policy, verifier, HashEmbedder())
    tree.check_integrity()
    assert tree.sharing_ratio >= 1
    assert len(tree.closed) <= width
    assert set(tree.finished) <= {node for batch in verifier.scored for node in batch}
    assert all(node.depth <= 5 and tree.tokens_to(node.parent) - 8 < 40 for node in tree.nodes[1:])
    assert policy.peak_tokens <= tree.unique_tokens


@few
@given(st.integers(0, 10_000), st.integers(44, 200), st.sampled_from([0.0, 1.0]))
def test_a_search_under_a_budget_never_holds_more(seed, budget_tokens, lambda_d):
    policy = FakePolicy(seed=seed, prompt_tokens=32, max_step_tokens=12)
    config = SearchConfig(
        strategy="ets", width=8, lambda_d=lambda_d, max_steps=8, max_step_tokens=12, kv_budget_tokens=budget_tokens
    )
    run(search(config), policy, TableVerifier(), HashEmbedder())
    assert policy.peak_tokens <= budget_tokens
