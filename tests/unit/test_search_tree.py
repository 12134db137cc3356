"""The tree as a reader would draw it: what is open, what is shared, and what it refuses."""

import pytest

from ets_engine.search import SearchTree, build_frontier
from ets_engine.types import LeafVerdict, Step, StopReason


@pytest.fixture
def tree() -> SearchTree:
    """Prompt(10) -> a(4) -> {c(2) open, d(3) finished}, b(6) out of tokens, e(1) failed."""
    tree = SearchTree(prompt_tokens=10)
    steps = [Step("a ", 4), Step("b", 6, StopReason.LENGTH), Step("e", 1, StopReason.ERROR, "boom")]
    tree.grow([1, 2, 3], [0, 0, 0], steps, [0.5, 0.0, 0.0])
    tree.grow([4, 5], [1, 1], [Step("c", 2), Step("d", 3, StopReason.FINISHED)], [0.6, 0.7])
    tree.check_integrity()
    return tree


def test_what_is_open_and_what_votes(tree):
    assert tree.frontier == (4,)
    assert tree.finished == (5,)
    assert tree.closed == (2, 3, 5)
    assert tree.leaves == (2, 3, 4, 5)
    assert tree.depth == 2
    assert [node.id for node in tree.path(4)] == [0, 1, 4]
    assert tree.text(5) == "a d"
    assert len(tree) == len(tree.nodes) == 6


def test_subtrees_are_numbered_by_the_roots_children():
    tree = SearchTree(prompt_tokens=1)
    tree.grow([1, 2, 3], [0, 0, 0], [Step("a", 1)] * 3, [0.5] * 3)
    tree.grow([4, 5], [3, 2], [Step("b", 1)] * 2, [0.5] * 2)
    assert [tree.subtree(node) for node in range(6)] == [0, 0, 1, 2, 2, 1]


def test_tokens(tree):
    assert tree.prompt_tokens == 10
    assert tree.unique_tokens == 26
    assert tree.generated_tokens == 16
    assert tree.path_tokens == 16 + 11 + 16 + 17  # b, e, c, d
    assert tree.sharing_ratio == 60 / 26
    assert tree.union_tokens([4, 5]) == 19
    assert tree.union_tokens([]) == 0


def test_a_new_tree():
    tree = SearchTree(prompt_tokens=0)
    assert (tree.frontier, tree.finished, tree.depth, tree.sharing_ratio) == ((0,), (), 0, 1.0)
    assert tree.common_text([]) == tree.text(0) == ""
    tree.check_integrity()


def test_common_text(tree):
    assert tree.common_text([4, 5]) == "a "
    assert tree.common_text([5]) == "a d"
    assert tree.common_text([2, 5]) == ""


def test_duplicates_are_two_nodes():
    tree = SearchTree(prompt_tokens=1)
    tree.grow([1, 2], [0, 0], [Step("same", 2), Step("same", 2)], [0.5, 0.5])
    assert tree.frontier == (1, 2)
    assert tree.unique_tokens == 5
    assert tree.common_text([1, 2]) == "same"


def test_published_metric_adds_up_before_pruning(tree):
    tree.record([4], [LeafVerdict(node=4, share=0)])
    assert tree.published_tokens == 16
    assert tree.verdict(4) == LeafVerdict(node=4, share=0)
    assert tree.verdict(5) is None


def test_trace(tree):
    tree.record([4], [LeafVerdict(node=4, share=0, cluster=7)])
    trace = tree.trace()
    assert [node.text for node in trace] == ["", "a ", "b", "e", "c", "d"]
    assert trace[4].verdict is not None and trace[4].verdict.cluster == 7


def test_frontier_covers_open_leaves_and_their_ancestors_only(tree):
    frontier = build_frontier(tree, tree.frontier, max_step_tokens=9)
    assert frontier.parents == (-1, 0, 1)
    assert frontier.num_tokens == (10, 4, 2)
    assert (frontier.leaves, frontier.scores, frontier.subtrees) == ((2,), (0.6,), (0,))
    assert (frontier.depth, frontier.max_step_tokens) == (2, 9)
    root = build_frontier(SearchTree(3), (0,))
    assert (root.parents, root.leaves, root.subtrees, root.depth) == ((-1,), (0,), (0,), 0)


@pytest.mark.parametrize(
    ("children", "parents", "message"),
    [
        ([7], [4], "numbered from 6"),
        ([], [], "numbered from 6"),
        ([6], [5], r"parents \[5\] are not on the frontier"),  # finished
        ([6], [1], r"parents \[1\] are not on the frontier"),  # of an earlier round
        ([6, 7], [4], "zip"),
    ],
)
def test_growing_elsewhere_is_refused(tree, children, parents, message):
    with pytest.raises(ValueError, match=message):
        tree.grow(children, parents, [Step("x", 1)] * len(children), [0.5] * len(children))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tree: tree._nodes.reverse(), "stands at place"),
        (lambda tree: tree._nodes.append(tree._nodes[4]), "stands at place"),
        (lambda tree: tree._path_tokens.__setitem__(4, 99), "counts 99 path tokens"),
        (lambda tree: tree._children.__setitem__(1, 3), "children are"),
        (lambda tree: tree._closed.remove(2), "closed are"),
        (lambda tree: setattr(tree, "_unique_tokens", 25), "there are 26 tokens, counted 25"),
        (lambda tree: tree._verdicts.__setitem__(1, LeafVerdict(node=1, share=1)), "has verdict"),
        (lambda tree: tree._nodes.__setitem__(4, replaced(tree, 4, step_score=1.5)), "has score 1.5"),
        (lambda tree: tree._nodes.__setitem__(4, replaced(tree, 4, parent=5)), "which is not before it"),
        (lambda tree: tree._nodes.__setitem__(4, replaced(tree, 4, parent=2)), "hangs below"),
        (lambda tree: tree._nodes.__setitem__(4, replaced(tree, 4, depth=3)), "hangs below"),
    ],
)
def test_integrity_check_notices(tree, damage, message):
    damage(tree)
    with pytest.raises(AssertionError, match=message):
        tree.check_integrity()


def replaced(tree, node, **changes):
    """A node with some fields changed."""
    from dataclasses import replace

    return replace(tree[node], **changes)
