"""Tree search over a model that runs elsewhere: the same loop and selectors, without a KV tree of ours."""

from __future__ import annotations

import contextvars
import copy
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Self, Unpack

from ets_engine.answers import MathView
from ets_engine.config import SearchConfig
from ets_engine.deadline import Remaining, limited, outside
from ets_engine.errors import ConfigError, EngineClosedError, EngineError
from ets_engine.lexical import HashEmbedder
from ets_engine.messages import Message, Prompt, problem_text, to_messages
from ets_engine.protocols import (
    Cancel,
    Embedder,
    OnEvent,
    SearchOptions,
    SearchService,
    StepView,
    Verifier,
    check_options,
)
from ets_engine.results import EndedEarly, build_result
from ets_engine.scorers import CallableVerifier, EqualVerifier, EvidenceScorer, Scorer
from ets_engine.search import SearchTree, StopSearch, needs_scores, run, search
from ets_engine.types import KVStats, SearchEvent, SearchResult, Step, StopReason, Timing

CHARACTERS_PER_TOKEN = 4  # a usual figure for English, where nobody counts


@dataclass(frozen=True, slots=True)
class ProposalRequest:
    """Steps that a search wants from a model.

    Attributes:
        messages: The conversation that is to be answered.
        partials: What each branch has written of its answer so far; the same text may stand there several times.
        config: Sampling, limits, stop texts and the seed, the temperature being that of the strategy.
        tools: Functions that the model may call.
        tool_choice: Whether it must: "auto", "any" or the name of one.
        parents: Node that each branch continues, those of one node side by side; 0 is the prompt. Shape [W].
        children: Node that each branch's next step will be, ascending; no other step of this search has it. Shape [W].
        paths: The steps that make up each partial, as they were proposed. Shape [W].
        tokens_left: What each branch may still write under `config.max_tokens` (count). Shape [W].
    """

    messages: Sequence[Message]
    partials: Sequence[str]
    config: SearchConfig
    tools: Sequence[Message] = ()
    tool_choice: str = "auto"
    parents: Sequence[int] = ()
    children: Sequence[int] = ()
    paths: Sequence[Sequence[Step]] = ()
    tokens_left: Sequence[int] = ()


StepProposer = Callable[[ProposalRequest], Sequence[Step]]
"""Proposes the next step of every branch, in order; one that failed is a `Step` with `StopReason.ERROR`.

It alone can honour `config.max_step_tokens`, and spare the model what comes after one of `config.stop`. Where it
raises, every branch of that depth has failed.
"""


def estimate_tokens(text: str) -> int:
    """A guess at the tokens of a text.

    Example:
        >>> estimate_tokens("four letters")
        3
    """
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def cut_step(step: Step, above: str, stops: Sequence[str]) -> Step:
    """The step up to the first stop text, which finishes it; the step itself where there is none, or it has failed.

    Args:
        step: As the model wrote it.
        above: What its branch had written before; a stop text may begin there.
        stops: As in `SearchConfig.stop`.

    Example:
        >>> cut_step(Step("so x = 3. END of it", 9), "", ("END",))
        Step(text='so x = 3. ', num_tokens=9, stop=<StopReason.FINISHED: 'finished'>, error=None)
    """
    ends: list[int] = []
    for stop in stops:
        tail = above[max(0, len(above) - len(stop) + 1) :]
        place = (tail + step.text).find(stop)
        if place >= 0:
            ends.append(max(0, place - len(tail)))
    if not ends or step.stop is StopReason.ERROR:
        return step
    return replace(step, text=step.text[: min(ends)], stop=StopReason.FINISHED)


class HostedEngine:
    """A `SearchService` over any model behind a function, a server's or a framework's; no model library is needed.

    Searches run side by side in threads of their own, each asking the model for all steps of a depth at once. What the
    model's owner does with the branches' common prefixes is not seen here: results have no KV figures, unless a
    subclass counts some from the tree. A deadline and `cancel` are looked at before and after each question to model or
    verifier; during one, proposer and verifier may look at `remaining_s`. Where they then fail on everything, the
    search ends with what it had before.

    Args:
        proposer: Asks the model.
        verifier: Judges steps; None = every search brings its own, or is one that no score can change.
        name: Names model and verifier, for caches.
        view: How texts map to answers.
        embedder: How differently steps reason; None compares their words.
        max_concurrent_searches: Searches that run at a time; more wait.
        count_tokens: Tokens of a text, None = a guess from its length.

    Example:
        >>> def propose(request):
        ...     return [Step("The answer is 2.", 5, StopReason.FINISHED) for _ in request.partials]
        >>> with HostedEngine(propose, lambda problem, steps: 1.0, name="two") as engine:
        ...     engine.search("What is 1+1?", SearchConfig(width=4)).answer
        '2'
    """

    def __init__(
        self,
        proposer: StepProposer,
        verifier: Scorer | None = None,
        *,
        name: str,
        view: StepView | None = None,
        embedder: Embedder | None = None,
        max_concurrent_searches: int = 64,
        count_tokens: Callable[[str], int] = estimate_tokens,
    ) -> None:
        """See the class."""
        self.name = name
        self.max_concurrent_searches = max_concurrent_searches
        self._count_tokens = count_tokens
        self._proposer = proposer
        self._verifier = verifier
        self._view: StepView = view or MathView()
        self._embedder: Embedder = embedder or HashEmbedder(dim=64)
        self._pool = ThreadPoolExecutor(max_concurrent_searches, thread_name_prefix=f"ets-{name}")
        self._searching: set[int] = set()  # threads that run a search
        self._is_closed = False

    def submit(
        self, problem: Prompt, config: SearchConfig | None = None, **options: Unpack[SearchOptions]
    ) -> Future[SearchResult]:
        """Start a search and return at once; verifier, model and `on_event` run with this call's context variables.

        They may search themselves: such a search waits for no other.

        Raises:
            ConfigError: The problem is no text and no conversation, or there is no verifier.
            EngineClosedError: The engine was closed.
        """
        return self._start(self._make_job(problem, config or SearchConfig(), options))

    def search(
        self, problem: Prompt, config: SearchConfig | None = None, **options: Unpack[SearchOptions]
    ) -> SearchResult:
        """Answer one problem: `submit`, and wait.

        An exception in this thread meanwhile, KeyboardInterrupt for instance, stops the search.

        Raises:
            EngineError: The model failed on every branch.
            ETSError: As `submit`.
        """
        job = self._make_job(problem, config or SearchConfig(), options)
        try:
            return self._start(job).result()
        finally:
            job.is_left = True

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, as the engine was told to count them."""
        return self._count_tokens(text)

    def count_prompt(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> int:
        """Tokens of a conversation as the model reads it; here, those of its texts, at least 1."""
        return max(1, sum(self.count_tokens(message.get("content") or "") for message in messages))

    def count_kv(self, tree: SearchTree) -> KVStats | None:
        """KV figures of a finished search; None, as nothing here knows of the model's cache."""
        return None

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more searches."""
        return self._is_closed

    def close(self) -> None:
        """Take no more searches, and wait for those submitted so far.

        Raises:
            EngineError: Called from a function of one of those searches: waiting would never end.
        """
        if threading.get_ident() in self._searching:
            raise EngineError(f"a running search of {self.name!r} closed its engine; do that after the search")
        self._is_closed = True
        self._pool.shutdown(wait=True)

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def __copy__(self) -> HostedEngine:
        """The engine itself: it stands for one model."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> HostedEngine:
        """The engine itself: it stands for one model."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle its name; unpickling takes what is registered under it there (`register_service`)."""
        return _find_registered, (self.name,)

    def _make_job(self, problem: Prompt, config: SearchConfig, options: SearchOptions) -> _HostedSearch:
        check_options(options)
        messages = to_messages(problem)
        scorer: Scorer | EvidenceScorer | None = options.get("verifier")
        if scorer is None:
            scorer = self._verifier
        if scorer is None and needs_scores(config, options.get("selector")):
            raise ConfigError("verifier=None: this engine has none; pass submit(..., verifier=function)")
        tools = copy.deepcopy(tuple(options.get("tools") or ()))
        return _HostedSearch(messages, config, scorer, options.get("cancel"), tools, options)

    def _start(self, job: _HostedSearch) -> Future[SearchResult]:
        if self._is_closed:
            raise EngineClosedError(f"the engine {self.name!r} was closed; make another")
        run = contextvars.copy_context().run
        if threading.get_ident() not in self._searching:
            try:
                return self._pool.submit(run, self._run, job)
            except RuntimeError as error:  # closed meanwhile, or the interpreter ends
                raise EngineClosedError(f"the engine {self.name!r} was closed; make another") from error
        own = ThreadPoolExecutor(1, thread_name_prefix=f"ets-{self.name}-inner")  # the others may wait for this one
        try:
            return own.submit(run, self._run, job)
        finally:
            own.shutdown(wait=False)

    def _run(self, job: _HostedSearch) -> SearchResult:
        self._searching.add(threading.get_ident())
        try:
            return self._search(job)
        finally:
            self._searching.discard(threading.get_ident())

    def _search(self, job: _HostedSearch) -> SearchResult:
        options = job.options
        view, selector = options.get("view") or self._view, options.get("selector")
        policy = _HostedPolicy(self._proposer, job, self.count_prompt)
        verifier: Verifier = EqualVerifier()
        if job.scorer is not None:
            read_step = options.get("read_step") if options.get("verifier") is None else None
            verifier = _Timed(CallableVerifier(job.scorer, job.problem, read_step), job)
        with limited(job.remaining_s) as around:
            tree = run(
                search(job.config, selector, clock=time.perf_counter),
                policy,
                verifier,
                self._embedder,
                on_event=_beside(options.get("on_event"), around),
                should_stop=job.wants_to_stop,
            )
        result = build_result(
            tree,
            job.config,
            view,
            problem=job.problem,
            timing=Timing(
                wall_s=time.perf_counter() - job.began_s,
                policy_s=job.policy_s,
                verifier_s=job.verifier_s,
                select_s=tree.select_s,
                bytes_moved=0,
                decode_steps=0,
            ),
            generated_tokens=tree.generated_tokens,
            kv=self.count_kv(tree),
            ended_early=job.ended_early,
            strategy=None if selector is None else type(selector).__name__,
        )
        if result.finish_reason == "error" and policy.error is not None:
            message = f"{self.name!r} failed on every branch, first with: {policy.error}"
            raise EngineError(message) from policy.raised
        return result


def _beside(on_event: OnEvent | None, around: Remaining) -> OnEvent | None:
    """A listener whose own searches have nothing to do with the deadline of the one that it listens to."""
    if on_event is None:
        return None

    def tell(event: SearchEvent) -> None:
        with outside(around):
            on_event(event)

    return tell


def _find_registered(name: str) -> SearchService:
    from ets_engine.registry import registered_service

    return registered_service(name)


@dataclass(eq=False)
class _HostedSearch:
    """One search: what was asked, when it must end, and where its time went."""

    messages: Sequence[Message]
    config: SearchConfig
    scorer: Scorer | EvidenceScorer | None
    cancel: Cancel | None
    tools: Sequence[Message]
    options: SearchOptions
    began_s: float = field(default_factory=time.perf_counter)
    policy_s: float = 0.0
    verifier_s: float = 0.0
    ended_early: EndedEarly | None = None
    is_left: bool = False  # by the caller who waited for it

    @property
    def problem(self) -> str:
        return self.options.get("problem_text") or problem_text(self.messages)

    @property
    def is_cancelled(self) -> bool:
        return self.is_left or (self.cancel is not None and self.cancel.is_set())

    def wants_to_stop(self) -> bool:
        if self.is_cancelled:
            self.ended_early = "cancelled"
        elif self.remaining_s() <= 0:
            self.ended_early = "deadline"
        return self.ended_early is not None

    def remaining_s(self) -> float:
        if self.is_cancelled:
            return 0.0
        if self.config.deadline_s is None:
            return math.inf
        return max(0.0, self.config.deadline_s - (time.perf_counter() - self.began_s))


class _HostedPolicy:
    """A `Policy` that asks a proposer and keeps the steps of each path."""

    def __init__(
        self,
        proposer: StepProposer,
        job: _HostedSearch,
        count_prompt: Callable[[Sequence[Message], Sequence[Message]], int],
    ) -> None:
        self._proposer = proposer
        self._job = job
        self._config = job.config
        if job.config.strategy == "greedy":
            self._config = job.config.model_copy(update={"temperature": 0.0})
        self._count_prompt = count_prompt
        self._paths: dict[int, tuple[Step, ...]] = {0: ()}
        self.error: str | None = None  # of the first step that failed
        self.raised: Exception | None = None  # what the proposer raised first

    def start(self) -> int:
        try:
            return self._count_prompt(self._job.messages, self._job.tools)
        except Exception as error:
            if self._job.wants_to_stop():
                raise StopSearch from error
            raise

    def expand(self, parents: Sequence[int], children: Sequence[int]) -> list[Step]:
        began_s = time.perf_counter()
        request = self._ask(parents, children)
        try:
            found: object = self._proposer(request)
            steps = list(found) if isinstance(found, Iterable) else found
        except Exception as error:
            self.raised = self.raised or error
            steps = [Step("", 0, StopReason.ERROR, f"{type(error).__name__}: {error}") for _ in parents]
        self._job.policy_s += time.perf_counter() - began_s
        if not isinstance(steps, list) or not all(isinstance(step, Step) for step in steps):
            return steps  # type: ignore[return-value] # the loop refuses it, as it does a wrong number
        if all(step.stop is StopReason.ERROR for step in steps) and self._job.wants_to_stop():
            raise StopSearch
        for place, (parent, child) in enumerate(zip(parents[: len(steps)], children, strict=False)):
            step = steps[place] = cut_step(steps[place], request.partials[place], self._config.stop)
            self._paths[child] = (*self._paths[parent], step)
            if step.stop is StopReason.ERROR:
                self.error = self.error or step.error or "a step that says nothing of its error"
        return steps

    def _ask(self, parents: Sequence[int], children: Sequence[int]) -> ProposalRequest:
        texts = {parent: "".join(step.text for step in self._paths[parent]) for parent in parents}
        spent = {parent: sum(step.num_tokens for step in self._paths[parent]) for parent in parents}
        return ProposalRequest(
            self._job.messages,
            [texts[parent] for parent in parents],
            self._config,
            self._job.tools,
            self._job.options.get("tool_choice", "auto"),
            parents=tuple(parents),
            children=tuple(children),
            paths=[self._paths[parent] for parent in parents],
            tokens_left=[max(0, self._config.max_tokens - spent[parent]) for parent in parents],
        )

    def retain(self, leaves: Sequence[int]) -> None:
        self._paths = {leaf: self._paths[leaf] for leaf in leaves}


class _Timed:
    """A `Verifier` whose time is written down."""

    def __init__(self, verifier: CallableVerifier, job: _HostedSearch) -> None:
        self._verifier = verifier
        self._job = job

    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        began_s = time.perf_counter()
        scores = self._verifier.score(nodes, parents, texts)
        self._job.verifier_s += time.perf_counter() - began_s
        if all(map(math.isnan, scores)) and self._job.wants_to_stop():
            raise StopSearch
        return scores

    def retain(self, leaves: Sequence[int]) -> None:
        self._verifier.retain(leaves)
