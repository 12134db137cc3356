"""Every selector on frontiers that a reader can check by hand, and what each refuses."""

from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError, ContextLengthError
from ets_engine.protocols import Frontier, Selector
from ets_engine.search import Beam, BeamSqrt, BestOfN, Dora, Dvts, Ets, EtsKv, Rebase, build_selector, effective_width

ROOT = Frontier((-1,), (9,), (0,), (1.0,), (0,), depth=0, max_step_tokens=4)
EVERY = [BestOfN(), Beam(), Beam(2), BeamSqrt(), Dvts(), Dvts(2), Rebase(), Dora(), Ets(), EtsKv(), Ets(published=True)]


def flat(scores, tokens=None, *, embeddings=None, max_step_tokens=0, prompt_tokens=10) -> Frontier:
    """Leaves right below the root."""
    count = len(scores)
    return Frontier(
        parents=(-1, *(0,) * count),
        num_tokens=(prompt_tokens, *(tokens or (5,) * count)),
        leaves=tuple(range(1, count + 1)),
        scores=tuple(scores),
        subtrees=tuple(range(count)),
        depth=1,
        max_step_tokens=max_step_tokens,
        embeddings=np.eye(count) if embeddings is None else np.asarray(embeddings),
    )


@pytest.mark.parametrize("selector", EVERY, ids=repr)
def test_the_root_gets_the_whole_width(selector):
    assert isinstance(selector, Selector)
    assert selector.select(ROOT, 6).shares == (6,)


@pytest.mark.parametrize("selector", EVERY, ids=repr)
@pytest.mark.parametrize("open_width", [0, -1])
def test_no_width_no_children(selector, open_width):
    assert selector.select(flat([0.3, 0.9, 0.9]), open_width).shares == (0, 0, 0)
    assert selector.select(ROOT, open_width).shares == (0,)


@pytest.mark.parametrize("selector", EVERY, ids=repr)
def test_selectors_are_frozen_values(selector):
    assert replace(selector) == selector
    assert hash(replace(selector)) == hash(selector)
    for field in fields(selector):
        with pytest.raises(FrozenInstanceError):
            setattr(selector, field.name, 1)


@pytest.mark.parametrize("selector", EVERY, ids=repr)
def test_ties_go_to_the_earlier_leaf(selector):
    shares = selector.select(flat([0.5] * 4), 6).shares
    assert list(shares) == sorted(shares, reverse=True)


@pytest.mark.parametrize("selector", EVERY, ids=repr)
def test_verdicts_name_leaves_and_repeat_shares(selector):
    frontier = flat([0.3, 0.9, 0.5])
    selection = selector.select(frontier, 5)
    for verdict, node, share in zip(
        selection.verdicts, frontier.leaves, selection.shares, strict=bool(selection.verdicts)
    ):
        assert (verdict.node, verdict.share) == (node, share)


@pytest.mark.parametrize("selector", EVERY, ids=repr)
def test_a_lone_leaf_below_the_root_gets_all_without_embeddings(selector):
    alone = Frontier((-1, 0, 1), (9, 5, 5), (2,), (0.0,), (3,), depth=2, max_step_tokens=4)
    assert selector.select(alone, 6).shares == ((1,) if isinstance(selector, BestOfN) else (6,))


@pytest.mark.parametrize("selector", [Ets(), Ets(published=True), Dora()], ids=repr)
def test_zero_vectors_are_one_direction(selector):
    zeros, equal = (flat([0.5, 0.6, 0.7], embeddings=vectors) for vectors in (np.zeros((3, 2)), np.ones((3, 2))))
    assert selector.select(zeros, 6) == selector.select(equal, 6)
    assert sum(selector.select(flat([0.5, 0.6], embeddings=[[0.0, 0.0], [1.0, 0.0]]), 6).shares) == 6


@pytest.mark.parametrize("selector", [Ets(), Ets(published=True), Dora()], ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_not_finite_are_refused(selector, bad):
    with pytest.raises(ValueError, match="embedding of leaf 1 has NaN or inf"):
        selector.select(flat([0.5, 0.6], embeddings=[[1.0, 0.0], [bad, 0.0]]), 4)


def test_best_of_n_gives_each_leaf_one_child():
    assert BestOfN().select(flat([0.1, 0.9, 0.5]), 3).shares == (1, 1, 1)
    assert BestOfN().select(flat([0.1, 0.9, 0.5]), 2).shares == (1, 1, 0)


def test_beam():
    assert Beam(2).select(flat([0.1, 0.9, 0.5, 0.7]), 8).shares == (0, 4, 0, 4)
    assert Beam(9).select(flat([0.1, 0.9]), 3).shares == (1, 2)
    assert Beam().select(flat([0.1, 0.9, 0.5, 0.7]), 8).shares == (0, 4, 0, 4)  # a quarter of 8
    assert BeamSqrt().select(flat([0.1, 0.9, 0.5, 0.7]), 5).shares == (0, 2, 1, 2)  # ceil(sqrt 5) = 3


def test_dvts_keeps_the_best_of_each_subtree():
    # Two subtrees: root children 0 and 2 are dealt to the first, 1 and 3 to the second.
    assert Dvts(2).select(flat([0.1, 0.9, 0.5, 0.7]), 4).shares == (0, 2, 2, 0)
    # One round later: the leaves descend from root children 1 and 2 only, two each.
    deeper = Frontier(
        (-1, 0, 0, 1, 1, 2, 2), (9, 5, 5, 5, 5, 5, 5), (3, 4, 5, 6), (0.8, 0.9, 0.2, 0.1), (1, 1, 2, 2), depth=2
    )
    assert Dvts(2).select(deeper, 4).shares == (0, 2, 2, 0)


def test_dvts_subtrees_stay_the_same_when_the_open_width_shrinks():
    frontier = flat([0.1, 0.9, 0.5, 0.7])
    assert Dvts().select(frontier, 16).shares == (4, 4, 4, 4)
    assert Dvts().select(frontier, 4).shares == (1, 1, 1, 1)


def test_rebase_verdicts_are_softmax_weights():
    selection = Rebase(0.5).select(flat([0.5, 0.5]), 3)
    assert selection.shares == (2, 1)
    assert [verdict.reward for verdict in selection.verdicts] == [0.5, 0.5]


def test_dora_divides_by_direction():
    same = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    assert Dora().select(flat([0.5] * 4, embeddings=same), 12).shares == (2, 2, 2, 6)
    # Two of three alike share 3 of 6 children: the better one gets the odd one, though noise alone tells them apart.
    alike = flat([0.5, 0.5000000000000001, 0.5], embeddings=[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [3.0, -1.5, 0.0]])
    assert Dora().select(alike, 6).shares == (1, 2, 3)
    assert [verdict.reward for verdict in Dora().select(alike, 6).verdicts] == pytest.approx([0.25, 0.25, 0.5])
    with pytest.raises(ValueError, match="need embeddings"):
        Dora().select(Frontier((-1, 0, 0), (9, 5, 5), (1, 2), (0.5, 0.5), (0, 1), depth=1), 2)


def test_ets_prices_tokens_and_not_the_prompt():
    # Rewards 3/4 and 1/4. Prices: 20/100 and 80/100 by tokens whatever the prompt, 1/3 each by nodes.
    for prompt_tokens in (1, 10_000):
        frontier = flat([0.9, 0.8], [20, 80], prompt_tokens=prompt_tokens)
        verdicts = EtsKv().select(frontier, 4).verdicts
        assert [verdict.reward for verdict in verdicts] == [0.75, 0.25]
        assert [verdict.node_cost for verdict in verdicts] == pytest.approx([0.2, 0.8])
        assert [verdict.share for verdict in verdicts] == [4, 0]
    assert [v.node_cost for v in EtsKv(node_cost="nodes").select(frontier, 4).verdicts] == pytest.approx([1 / 3] * 2)


def test_ets_without_tokens_has_no_prices():
    assert EtsKv().select(flat([0.9, 0.8], [0, 0]), 4).shares == (2, 2)


def test_ets_gives_every_kept_leaf_a_child_and_the_published_rule_may_not():
    frontier = flat([0.95, 0.9, 0.9, 0.05], embeddings=np.eye(4))
    assert Ets(lambda_b=0.1, lambda_d=4.0).select(frontier, 4).shares == (1, 1, 1, 1)
    published = Ets(lambda_b=0.1, lambda_d=4.0, published=True).select(frontier, 4)
    assert published.shares == (2, 1, 1, 0)
    assert [verdict.cluster for verdict in published.verdicts] == [0, 1, 2, 3]


def test_identical_siblings_share_a_cluster():
    # Duplicates are two nodes in one cluster: coverage pays for the first of them only.
    twins = flat([0.5, 0.5, 0.1], embeddings=[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    selection = Ets(lambda_b=2.0, lambda_d=2.0).select(twins, 3)
    assert [verdict.cluster for verdict in selection.verdicts] == [0, 0, 1]
    assert selection.shares == (2, 0, 1)


def test_published_guard_keeps_everything_at_lambda_b_zero():
    frontier = flat([0.9, 0.1, 0.5])
    selector = Ets(lambda_b=0.0, lambda_d=0.0, published=True)
    assert selector.select(frontier, 6).shares == Rebase().select(frontier, 6).shares
    assert all(verdict.node_cost == -1e-4 for verdict in selector.select(frontier, 6).verdicts)


def test_ets_with_more_leaves_than_width_keeps_at_most_the_width():
    assert sum(Ets(lambda_b=0.01, lambda_d=5.0).select(flat([0.5, 0.6, 0.7, 0.8]), 2).shares) == 2


def test_ets_needs_embeddings_only_for_coverage():
    bare = Frontier((-1, 0, 0), (9, 5, 5), (1, 2), (0.5, 0.6), (0, 1), depth=1)
    assert not EtsKv().needs_embeddings
    assert EtsKv().select(bare, 2).verdicts[0].cluster == -1
    assert Ets().needs_embeddings
    with pytest.raises(ValueError, match="2 leaves need embeddings"):
        Ets().select(bare, 2)


@pytest.mark.parametrize("lambda_d", [0.0, 1.0])
@pytest.mark.parametrize(
    ("budget_tokens", "shares"),
    [
        (130, (2, 2, 2)),  # 10 + 60 for the tree and 6 * 10 for children: everything fits
        (120, (3, 3, 0)),  # 50 tokens for leaves beside six children: 1/2 + 1/3
        (110, (3, 0, 3)),  # 40 tokens: 1/2 + 1/6
        (99, (2, 1, 0)),  # six children do not fit beside it: one is set aside for each leaf, 10 + 40 + 30
        (79, (1, 0, 1)),  # 10 + 40 + 20
        (50, (1, 0, 0)),  # 10 + 40
        (30, (0, 0, 1)),  # 10 + 20, and not a token less
    ],
)
def test_hard_budget_by_hand(lambda_d, budget_tokens, shares):
    # At this temperature the rewards of six children are 3/6, 2/6, 1/6.
    frontier = flat([0.7, 0.6, 0.5], [30, 20, 10], max_step_tokens=10)
    selector = Ets(lambda_b=0.0, lambda_d=lambda_d, kv_budget_tokens=budget_tokens, softmax_temperature=10.0)
    assert selector.select(frontier, 6).shares == shares


def test_a_budget_for_nothing_says_what_it_needs():
    frontier = flat([0.7, 0.6], [30, 20], max_step_tokens=10)
    with pytest.raises(ContextLengthError, match=r"need 40 KV tokens, kv_budget_tokens=39"):
        EtsKv(kv_budget_tokens=39).select(frontier, 4)
    with pytest.raises(ContextLengthError, match=r"need 13 KV tokens"):
        EtsKv(kv_budget_tokens=12).select(ROOT, 4)
    assert EtsKv(kv_budget_tokens=22).select(ROOT, 4).shares == (3,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Beam(0), "keep=0"),
        (lambda: Dvts(-1), "keep=-1"),
        (lambda: Rebase(0.0), "softmax_temperature=0.0"),
        (lambda: Rebase(float("nan")), "softmax_temperature=nan"),
        (lambda: Dora(similarity_temperature=-1.0), "similarity_temperature=-1.0"),
        (lambda: Ets(lambda_b=-1.0), "lambda_b=-1.0"),
        (lambda: Ets(lambda_d=float("inf")), "lambda_d=inf"),
        (lambda: Ets(lambda_b=float("nan")), "lambda_b=nan"),
        (lambda: Ets(lambda_b=2e6), "lambda_b=2000000.0: must be a number from 0 to 1e"),
        (lambda: SearchConfig(lambda_d=2e6), "lambda_d"),
        (lambda: Ets(cluster_cut=2.5), "cluster_cut=2.5"),
        (lambda: Ets(node_cost="pages"), "node_cost='pages'"),
        (lambda: Ets(kv_budget_tokens=0), "kv_budget_tokens=0"),
        (lambda: Ets(published=True, node_cost="tokens"), "node_cost='tokens'"),
        (lambda: Ets(published=True, kv_budget_tokens=100), "kv_budget_tokens=100"),
        (lambda: build_selector(SearchConfig(strategy="rebase", kv_budget_tokens=100)), "kv_budget_tokens=100"),
    ],
)
def test_bad_settings_are_refused_by_name(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("settings", "selector"),
    [
        ({"strategy": "greedy"}, BestOfN()),
        ({"strategy": "best_of_n"}, BestOfN()),
        ({"strategy": "beam", "width": 3}, Beam(1)),
        ({"strategy": "beam", "keep": 5}, Beam(5)),
        ({"strategy": "beam_sqrt"}, BeamSqrt()),
        ({"strategy": "dvts"}, Dvts(4)),
        ({"strategy": "rebase", "softmax_temperature": 0.5}, Rebase(0.5)),
        ({"strategy": "dora", "softmax_temperature": 0.1}, Dora(0.1)),
        ({"strategy": "ets", "kv_budget_tokens": 99}, Ets(node_cost="tokens", kv_budget_tokens=99)),
        ({"strategy": "ets_kv", "lambda_b": 2.0}, EtsKv(lambda_b=2.0, node_cost="tokens")),
        ({"strategy": "ets_published", "cluster_cut": 0.05}, Ets(published=True, cluster_cut=0.05)),
    ],
)
def test_strategies_by_name(settings, selector):
    assert build_selector(SearchConfig(**settings)) == selector


def test_greedy_is_one_wide():
    assert effective_width(SearchConfig(strategy="greedy")) == 1
    assert effective_width(SearchConfig(strategy="ets", width=7)) == 7
