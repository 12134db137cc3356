"""The search tree: the append-only owner of nodes, scores and verdicts; it knows neither models nor selectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ets_engine.types import LeafVerdict, Node, Step, StopReason, TraceNode


class SearchTree:
    """Nodes of one search, in the order they were created; only the loop writes it.

    A node is open while its step ended at a boundary; the frontier is the open nodes of the last depth. Every other
    leaf of its round (finished, out of tokens, failed) keeps its place in the width; only finished ones vote.
    Siblings with the same text are different nodes: each is scored, each may be kept, each votes.

    Attributes:
        published_tokens: Tokens on the union of root-to-candidate paths before pruning, summed over selections
            (the KV metric of arXiv 2502.13575).
        select_s: Seconds spent in the selector, 0.0 without a clock.
        stopped: Whether the caller stopped the search early.

    Example:
        >>> tree = SearchTree(prompt_tokens=10)
        >>> tree.grow([1, 2], [0, 0], [Step("a", 5), Step("b", 3, StopReason.FINISHED)], [0.5, 0.9])
        >>> tree.frontier, tree.finished, tree.unique_tokens, tree.path_tokens
        ((1,), (2,), 18, 28)
    """

    def __init__(self, prompt_tokens: int) -> None:
        """Start a tree with the prompt as its root, which is open."""
        self._nodes = [Node(id=0, parent=-1, depth=0, step=Step("", prompt_tokens), step_score=1.0)]
        self._path_tokens = [prompt_tokens]  # tokens from the root to each node, both included
        self._subtrees = [0]  # which child of the root each node descends from
        self._children = [0]  # children of each node (count)
        self._round = range(1)  # ids of the last round
        self._closed: list[int] = []  # nodes that will never be extended, ascending
        self._unique_tokens = prompt_tokens
        self._verdicts: dict[int, LeafVerdict] = {}
        self.published_tokens = 0
        self.select_s = 0.0
        self.stopped = False

    def __len__(self) -> int:
        """Nodes, the root included (count)."""
        return len(self._nodes)

    def __getitem__(self, node: int) -> Node:
        """The node with this id."""
        return self._nodes[node]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node, parents before children."""
        return tuple(self._nodes)

    @property
    def depth(self) -> int:
        """Depth of the last round; the root is 0."""
        return self._nodes[self._round[0]].depth

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the root."""
        return self._nodes[0].step.num_tokens

    @property
    def frontier(self) -> tuple[int, ...]:
        """Open nodes of the last round."""
        return tuple(node for node in self._round if self._nodes[node].step.stop is StopReason.BOUNDARY)

    @property
    def finished(self) -> tuple[int, ...]:
        """Nodes that end a solution: the ones that vote, earliest first."""
        return self.stopped_by(StopReason.FINISHED)

    @property
    def closed(self) -> tuple[int, ...]:
        """Nodes that will never be extended because they finished, ran out or failed; each consumes width."""
        return tuple(self._closed)

    @property
    def leaves(self) -> tuple[int, ...]:
        """Childless nodes: closed, pruned, or on the frontier."""
        return tuple(node for node, children in enumerate(self._children) if not children)

    @property
    def unique_tokens(self) -> int:
        """Tokens over all nodes ever created."""
        return self._unique_tokens

    @property
    def path_tokens(self) -> int:
        """Tokens of every leaf's whole path, summed over all leaves ever created."""
        return sum(self._path_tokens[leaf] for leaf in self.leaves)

    @property
    def sharing_ratio(self) -> float:
        """`path_tokens / unique_tokens`, >= 1; 1.0 means that nothing is shared."""
        return self.path_tokens / self.unique_tokens if self.unique_tokens else 1.0

    @property
    def generated_tokens(self) -> int:
        """Tokens of every node but the prompt."""
        return self.unique_tokens - self.prompt_tokens

    @property
    def contenders(self) -> tuple[int, ...]:
        """Ends of the paths that the result may still be, or begin with; all go on from the contenders before.

        Finished trajectories and the leaves that go on; until one finishes, those that are out of tokens too. A last
        frontier of which nothing was kept counts, and the last round where no other path is left.
        """
        frontier, finished = self.frontier, self.finished
        kept = tuple(leaf for leaf in frontier if (said := self.verdict(leaf)) is None or said.share)
        if finished:
            return finished if self.stopped else (*finished, *kept)
        return (*self.stopped_by(StopReason.LENGTH), *(kept or frontier)) or tuple(self._round)

    def stopped_by(self, *reasons: StopReason) -> tuple[int, ...]:
        """Closed nodes that ended for one of these reasons, earliest first."""
        return tuple(node for node in self._closed if self._nodes[node].step.stop in reasons)

    def tokens_to(self, node: int) -> int:
        """Tokens from the root to this node, both included."""
        return self._path_tokens[node]

    def subtree(self, node: int) -> int:
        """Which child of the root this node descends from (0, 1, ...); the root itself is 0."""
        return self._subtrees[node]

    def path(self, node: int) -> tuple[Node, ...]:
        """Nodes from the root to this one, both included."""
        nodes = [self._nodes[node]]
        while nodes[-1].parent >= 0:
            nodes.append(self._nodes[nodes[-1].parent])
        return tuple(reversed(nodes))

    def text(self, node: int) -> str:
        """Text of the path below the root."""
        return "".join(step.step.text for step in self.path(node))

    def union(self, nodes: Iterable[int]) -> list[int]:
        """Ids on the union of the paths from the root to these nodes, ascending."""
        held: set[int] = set()
        for node in nodes:
            while node >= 0 and node not in held:
                held.add(node)
                node = self._nodes[node].parent
        return sorted(held)

    def union_tokens(self, nodes: Iterable[int]) -> int:
        """Distinct tokens on these paths: what their KV holds."""
        return sum(self._nodes[node].step.num_tokens for node in self.union(nodes))

    def common_text(self, nodes: Sequence[int]) -> str:
        """The text that all these paths begin with.

        Example:
            >>> tree = SearchTree(prompt_tokens=1)
            >>> tree.grow([1, 2], [0, 0], [Step("2+3=5", 5), Step("2+3=6", 5)], [0.5, 0.9])
            >>> tree.common_text([1, 2])
            '2+3='
        """
        if not nodes:
            return ""
        texts = [self.text(node) for node in nodes]
        first, last = min(texts), max(texts)  # what these two share, all share
        return first[: next((place for place, sign in enumerate(first) if last[place] != sign), len(first))]

    def verdict(self, node: int) -> LeafVerdict | None:
        """What the selector decided about this node, None if it never was on a frontier."""
        return self._verdicts.get(node)

    def trace(self) -> tuple[TraceNode, ...]:
        """The whole tree with its verdicts, for drawing and replay."""
        return tuple(
            TraceNode(
                id=node.id,
                parent=node.parent,
                depth=node.depth,
                text=node.step.text,
                num_tokens=node.step.num_tokens,
                step_score=node.step_score,
                stop=node.step.stop,
                verdict=self.verdict(node.id),
            )
            for node in self._nodes
        )

    def grow(
        self, children: Sequence[int], parents: Sequence[int], steps: Sequence[Step], scores: Sequence[float]
    ) -> None:
        """Append one round of nodes.

        Args:
            children: Their ids: the next free ones, ascending. Shape [W], W >= 1.
            parents: Open node of the last round above each. Shape [W].
            steps: What the policy proposed. Shape [W].
            scores: Step scores in [0, 1]. Shape [W].

        Raises:
            ValueError: The ids are not the next free ones, a parent is not open, or lengths differ.
        """
        first = len(self._nodes)
        if not children or list(children) != list(range(first, first + len(children))):
            raise ValueError(f"children must be numbered from {first} up, got {list(children)!r}")
        if strangers := set(parents) - set(self.frontier):
            raise ValueError(f"parents {sorted(strangers)} are not on the frontier {self.frontier}")
        for child, parent, step, score in zip(children, parents, steps, scores, strict=True):
            above = self._nodes[parent]
            self._nodes.append(Node(child, parent, above.depth + 1, step, score))
            self._path_tokens.append(self._path_tokens[parent] + step.num_tokens)
            self._subtrees.append(child - first if parent == 0 else self._subtrees[parent])
            self._children.append(0)
            self._children[parent] += 1
            self._unique_tokens += step.num_tokens
            if step.stop is not StopReason.BOUNDARY:
                self._closed.append(child)
        self._round = range(first, len(self._nodes))

    def record(self, leaves: Sequence[int], verdicts: Sequence[LeafVerdict]) -> None:
        """Note what the selector decided about the leaves of this round.

        Args:
            leaves: The frontier. Shape [L].
            verdicts: One per leaf, `node` being the tree id. Shape [L].
        """
        self.published_tokens += self.union_tokens(leaves)
        self._verdicts.update(zip(leaves, verdicts, strict=True))

    def check_integrity(self) -> None:
        """Check what must always hold: order, depths, token sums, open parents, scores in range.

        Raises:
            AssertionError: naming the node and what is wrong with it.
        """
        children = [0] * len(self._nodes)
        for place, node in enumerate(self._nodes):
            if node.id != place:
                raise AssertionError(f"node {node.id} stands at place {place}")
            if not 0.0 <= node.step_score <= 1.0 or node.step.num_tokens < 0:
                raise AssertionError(f"node {node.id} has score {node.step_score}, {node.step.num_tokens} tokens")
            if place == 0:
                continue
            if not 0 <= node.parent < place:
                raise AssertionError(f"node {node.id} has parent {node.parent}, which is not before it")
            above = self._nodes[node.parent]
            children[above.id] += 1
            if node.depth != above.depth + 1 or above.step.stop is not StopReason.BOUNDARY:
                raise AssertionError(f"node {node.id} at depth {node.depth} hangs below {above}")
            if self._path_tokens[place] != self._path_tokens[above.id] + node.step.num_tokens:
                raise AssertionError(f"node {node.id} counts {self._path_tokens[place]} path tokens")
        if children != self._children:
            raise AssertionError(f"children are {children}, counted {self._children}")
        closed = [node.id for node in self._nodes if node.step.stop is not StopReason.BOUNDARY]
        if closed != self._closed:
            raise AssertionError(f"closed are {closed}, counted {self._closed}")
        unique_tokens = sum(node.step.num_tokens for node in self._nodes)
        if unique_tokens != self._unique_tokens:
            raise AssertionError(f"there are {unique_tokens} tokens, counted {self._unique_tokens}")
        for node, verdict in self._verdicts.items():
            if verdict.node != node or children[node] not in (0, verdict.share):  # 0 while the round is under way
                raise AssertionError(f"node {node} has verdict {verdict} and {children[node]} children")
