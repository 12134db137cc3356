"""The seams of a search, one page: policy, verifier, embedder, selector, step view, and the service that runs them.

Everything above a seam is pure; everything below owns a model, a device or a socket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypedDict, Unpack, runtime_checkable

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.messages import Message, Prompt
from ets_engine.scorers import EvidenceScorer, Scorer
from ets_engine.types import LeafVerdict, SearchEvent, SearchResult, Step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Frontier:
    """All that a selector sees: the open leaves and the tree above them, as plain arrays.

    Node arrays cover the root, every ancestor of a leaf, and the leaves; parents come before children.

    Attributes:
        parents: Parent position of each node, -1 for the root. Shape [N].
        num_tokens: KV tokens of each node. Shape [N].
        leaves: Position of each leaf in the node arrays. Shape [L], L >= 1.
        scores: Score of each leaf, finite, in [0, 1]. Shape [L].
        subtrees: Which child of the root each leaf descends from (0, 1, ...; the root itself is 0). Shape [L].
        depth: Depth of the leaves.
        max_step_tokens: Most tokens one child may add, for a hard KV budget: a step's, or what `max_tokens` leaves.
        embeddings: One vector per leaf, or None when the selector did not ask or L is 1. Shape [L, D].
    """

    parents: tuple[int, ...]
    num_tokens: tuple[int, ...]
    leaves: tuple[int, ...]
    scores: tuple[float, ...]
    subtrees: tuple[int, ...]
    depth: int
    max_step_tokens: int = 0
    embeddings: NDArray[np.floating] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Selection:
    """A selector's decision.

    Attributes:
        shares: Children granted to each leaf, >= 0, sum <= open width. Shape [L].
        verdicts: Why, one per leaf in the same order, `node` being the leaf's position in the
            frontier's node arrays; empty when the selector gives no reasons. Shape [L] or [0].
    """

    shares: tuple[int, ...]
    verdicts: tuple[LeafVerdict, ...] = ()


@runtime_checkable
class Selector(Protocol):
    """Decides which leaves are worth their KV; a pure function of the frontier."""

    @property
    def needs_embeddings(self) -> bool:
        """Whether `Frontier.embeddings` must be filled."""
        ...

    def select(self, frontier: Frontier, open_width: int) -> Selection:
        """Split `open_width` (count, >= 1) children over the leaves."""
        ...


@runtime_checkable
class Policy(Protocol):
    """One search's view of a model that proposes steps; nodes are named by their tree id."""

    def start(self) -> int:
        """Read the prompt as node 0 and return its tokens (count)."""
        ...

    def expand(self, parents: Sequence[int], children: Sequence[int]) -> Sequence[Step]:
        """Propose one step per child, `children[i]` below `parents[i]`, in one batch; a failed branch is a Step.

        No step may be longer than `max_step_tokens`, and no trajectory than `max_tokens`: a hard KV budget sets aside
        no more than that.
        """
        ...

    def retain(self, leaves: Sequence[int]) -> None:
        """Keep the paths to these nodes; every other branch's KV is free from now on."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """One search's view of a model that scores steps; a node is scored once, ever."""

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> Sequence[float]:
        """Score each new node (its step text given) in [0, 1], NaN for a branch that cannot be scored."""
        ...

    def retain(self, leaves: Sequence[int]) -> None:
        """Keep the paths to these nodes, free the rest."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """Maps steps to vectors whose cosine distance says how differently they reason."""

    def embed(self, nodes: Sequence[int], texts: Sequence[str]) -> NDArray[np.floating]:
        """One finite vector per node. Shape [len(nodes), D]."""
        ...


@runtime_checkable
class StepView(Protocol):
    """How text maps to answers and vote classes."""

    def answer(self, problem: str, text: str) -> str | None:
        """The answer in a finished trajectory's text, or None when there is none (it abstains)."""
        ...

    def same(self, left: str, right: str) -> bool:
        """Whether two answers count as the same vote."""
        ...


OnEvent = Callable[[SearchEvent], None]
"""Called with the progress of every depth."""


@runtime_checkable
class Cancel(Protocol):
    """What stops a search early, a `threading.Event` for instance."""

    def is_set(self) -> bool:
        """Whether the caller wants the best so far now; asked before every decode step, on a thread of the engine's."""
        ...


class SearchOptions(TypedDict, total=False):
    """What a search may be given besides its problem and its settings.

    Attributes:
        verifier: `verifier(problem, steps) -> [0, 1]` judges the last step, instead of the service's own verifier; an
            `EvidenceScorer` only where the service runs the policy itself.
        selector: Decides which leaves live, instead of the one that `config.strategy` names; it holds up everybody.
        view: How solution texts map to answers, instead of the service's own; an engine of several processes may call
            it in several threads at once.
        tools: Functions that the policy may call, as JSON schemas in OpenAI's layout; nothing calls them here.
        tool_choice: "auto", "any" or the name of one, for a policy that can pass it on; `view` is what demands it.
        problem_text: What verifiers and views read as the problem, instead of the conversation's text.
        read_step: What the service's own verifier reads of a step's text: markup that a framework asked the policy for
            is none of its business.
        on_event: Called with the progress of every depth; when it is slow, some are left out. What it raises ends
            this search.
        cancel: Once set, the best so far is the result. A future that is cancelled before its search was let in is
            never searched.
    """

    verifier: Scorer | EvidenceScorer | None
    selector: Selector | None
    view: StepView | None
    tools: Sequence[Message]
    tool_choice: str
    problem_text: str | None
    read_step: Callable[[str], str] | None
    on_event: OnEvent | None
    cancel: Cancel | None


def check_options(options: SearchOptions) -> None:
    """Refuse what no search takes, as a signature with these names would.

    Raises:
        TypeError: An unknown name.
        ConfigError: `cancel` cannot be asked.
    """
    for name in options:
        if name not in SearchOptions.__optional_keys__:
            raise TypeError(f"unexpected search option {name!r}; there are {', '.join(SearchOptions.__annotations__)}")
    cancel: object = options.get("cancel")
    if cancel is not None and (isinstance(cancel, type) or not callable(getattr(cancel, "is_set", None))):
        raise ConfigError(f"cancel={cancel!r:.100}: give a threading.Event(), or anything else with is_set()")


@runtime_checkable
class SearchService(Protocol):
    """Answers problems by tree search, from any thread: an engine with its models, or one over a model elsewhere."""

    @property
    def name(self) -> str:
        """Names the models, so that equal names give equal answers; part of every cache key."""
        ...

    @property
    def max_concurrent_searches(self) -> int:
        """So many searches at a time it takes at least, before one waits for another (count)."""
        ...

    def submit(
        self, problem: Prompt, config: SearchConfig | None = None, **options: Unpack[SearchOptions]
    ) -> Future[SearchResult]:
        """Start a search and return at once."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as the policy reads it."""
        ...
