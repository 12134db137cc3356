"""The engine: owns a policy and a verifier, runs searches on them, and turns trees into results."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

from ets_engine.answers import MathView, ReferenceView
from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError, ETSError, ModelLoadError
from ets_engine.models import CallableVerifier, PolicyFormat, PrmFormat, PrmVerifier, StepScorer, TreePolicy
from ets_engine.protocols import Selector, StepView
from ets_engine.reference import REFERENCE, check_domain, policy_path, prm_path
from ets_engine.runtime import Runner, StepDecoder, load_causal_lm, load_token_classifier
from ets_engine.search import (
    Expand,
    Request,
    SearchTree,
    StopSearch,
    Trajectory,
    answer,
    effective_width,
    rank_answers,
    search,
    trajectories,
)
from ets_engine.types import KVStats, ScoredStep, SearchEvent, SearchResult, StopReason, Timing

OnEvent = Callable[[SearchEvent], None]
ShouldStop = Callable[[], bool]


class ETSEngine:
    """A policy and a verifier, loaded once, that answer problems by tree search.

    Searches from several threads take turns. Use `from_pretrained`, and `close` or a `with` block to give the memory
    back.

    Args:
        policy: Runner of the policy.
        policy_format: Its prompt and step boundaries.
        verifier: Runner of the PRM and what it reads, None = every search brings a verifier of its own.
        view: How solution texts map to answers.
        read_problem: Gives a problem as the models know it, and raises for one that they do not know.

    Example:
        >>> with ETSEngine.from_pretrained("reference") as engine:
        ...     result = engine.search("Use 4, 6, 10 and 19 to make 16.", SearchConfig(width=16, seed=0))
        >>> result.finish_reason
        'stop'
    """

    def __init__(
        self,
        policy: Runner,
        policy_format: PolicyFormat,
        verifier: tuple[Runner, PrmFormat] | None = None,
        *,
        view: StepView | None = None,
        read_problem: Callable[[str], str] | None = None,
    ) -> None:
        """See the class."""
        self._format = policy_format
        self._decoder: StepDecoder | None = StepDecoder(policy, policy_format.tokenizer)
        self._verifier = verifier
        self._view: StepView = view or MathView()
        self._read_problem = read_problem
        self._lock = threading.Lock()
        self._thread: int | None = None  # whose turn it is
        self._names = itertools.count()

    @classmethod
    def from_pretrained(
        cls, model: str = REFERENCE, verifier: str | None = None, config: EngineConfig | None = None
    ) -> ETSEngine:
        """Load a policy and its verifier.

        Args:
            model: "reference" for the shipped one, or a transformers causal LM by folder or hub name.
            verifier: "reference", or a token-classification PRM in TRL's layout by folder or hub name. None takes the
                shipped one for the shipped policy; another policy then needs `search(..., verifier=function)`.
            config: Where and how they run.

        Raises:
            ModelLoadError: A model cannot be loaded, or its architecture cannot be honoured.
            ConfigError: The shipped PRM is asked to judge another model, or a device is absent.
        """
        config = config or EngineConfig()
        own = model == REFERENCE
        if verifier is None and own:
            verifier = REFERENCE
        if verifier == REFERENCE and not own:
            raise ConfigError(
                f"verifier={verifier!r} only knows the problems of model='reference', not {model!r}'s; pass a PRM, or "
                "a function to search(..., verifier=function)"
            )
        loaded, tokenizer = load_causal_lm(policy_path() if own else model, config)
        ended = _eos_ids(loaded.generation_config.eos_token_id, tokenizer.eos_token_id)
        policy = Runner(loaded, config, verify=not own)
        shape = PolicyFormat(tokenizer, "line", ("\n",), ended, max_step_tokens=48) if own else None
        judge: tuple[Runner, PrmFormat] | None = None
        if verifier is not None:
            prm, prm_tokenizer = load_token_classifier(prm_path() if verifier == REFERENCE else verifier, config)
            if prm.config.num_labels != 2:
                raise ModelLoadError(f"verifier={verifier!r} has {prm.config.num_labels} labels, a PRM has 2")
            judge = Runner(prm, config, verify=verifier != REFERENCE), PrmFormat(prm_tokenizer)
        return cls(
            policy,
            shape or PolicyFormat.of(tokenizer, ended),
            judge,
            view=ReferenceView() if own else MathView(),
            read_problem=check_domain if own else None,
        )

    def search(
        self,
        problem: str,
        config: SearchConfig | None = None,
        *,
        verifier: StepScorer | None = None,
        selector: Selector | None = None,
        on_event: OnEvent | None = None,
        should_stop: ShouldStop | None = None,
    ) -> SearchResult:
        """Answer one problem; the same seed gives the same result.

        Args:
            problem: In plain text.
            config: Strategy, width, limits, seed.
            verifier: `verifier(problem, steps) -> [0, 1]` judges the last step, instead of the engine's PRM.
            selector: Decides which leaves live, instead of the one that `config.strategy` names.
            on_event: Called with the progress of every depth.
            should_stop: Asked before every decode step; once it says True the best so far is returned.

        Raises:
            ReferenceDomainError: The shipped models do not know this kind of problem.
            ContextLengthError: The prompt does not fit a model or the KV budget.
            ConfigError: Settings contradict each other, or there is no verifier.
            ProtocolError: The verifier function or the selector broke its contract.
        """
        began_s = time.perf_counter()
        self._open_decoder()
        config = config or SearchConfig()
        prompt = problem if self._read_problem is None else self._read_problem(problem)
        if verifier is None and self._verifier is None:
            raise ConfigError("verifier=None: this engine has no PRM; pass search(..., verifier=function) or load one")
        most = self._format.max_step_tokens
        if most is not None and most < config.max_step_tokens:
            config = config.model_copy(update={"max_step_tokens": most})
        with self._turn():
            name = next(self._names)
            policy = TreePolicy(self._open_decoder(), self._format, prompt, config, name)
            judge: PrmVerifier | CallableVerifier
            if verifier is not None:
                judge = CallableVerifier(verifier, problem)
            else:
                assert self._verifier is not None
                judge = PrmVerifier(*self._verifier, prompt, name)
            try:
                tree = _drive(search(config, selector, clock=time.perf_counter), policy, judge, on_event, should_stop)
                strategy = config.strategy if selector is None else type(selector).__name__
                return self._result(problem, config, strategy, tree, policy, judge, began_s)
            finally:
                policy.close()
                judge.close()

    def close(self) -> None:
        """Give the models' memory back, after the searches under way; later ones are refused."""
        with self._turn():
            self._decoder = self._verifier = None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The models are this thread's alone.

        Raises:
            ETSError: They are already: waiting would never end.
        """
        if self._thread == threading.get_ident():
            raise ETSError("a callback of a running search used the same engine; do that after the search")
        with self._lock:
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None

    def _open_decoder(self) -> StepDecoder:
        if self._decoder is None:
            raise ETSError("this engine was closed; make another with ETSEngine.from_pretrained")
        return self._decoder

    def __enter__(self) -> ETSEngine:
        """Nothing to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _result(
        self,
        problem: str,
        config: SearchConfig,
        strategy: str,
        tree: SearchTree,
        policy: TreePolicy,
        judge: PrmVerifier | CallableVerifier,
        began_s: float,
    ) -> SearchResult:
        paths = trajectories(tree, config.reduce)
        answers = [self._view.answer(problem, path.text) for path in paths]
        candidates = rank_answers(paths, answers, self._view.same, config.vote)
        steps = candidates[0].steps if candidates else _best_steps(tree, paths)
        usage, judged = policy.usage, judge.usage if isinstance(judge, PrmVerifier) else None
        return SearchResult(
            problem=problem,
            text="".join(step.text for step in steps),
            answer=candidates[0].answer if candidates else None,
            score=candidates[0].score if candidates else max((path.score for path in paths), default=0.0),
            steps=steps,
            candidates=candidates[: config.n_candidates],
            finish_reason=_finish_reason(tree, bool(candidates)),
            prompt_tokens=tree.prompt_tokens,
            generated_tokens=usage.generated_tokens,
            verifier_tokens=judged.tokens if judged else 0,
            path_tokens=sum(step.num_tokens for step in steps),
            trajectories=len(paths),
            num_errors=len(tree.stopped_by(StopReason.ERROR)),
            kv=KVStats(
                peak_tokens=usage.peak_tokens,
                mean_tokens=usage.mean_tokens,
                bytes_per_token=self._open_decoder().runner.bytes_per_token,
                unique_tokens=tree.unique_tokens,
                path_tokens=tree.path_tokens,
                published_tokens=tree.published_tokens,
            ),
            verifier_kv=KVStats(
                peak_tokens=judged.peak_tokens,
                mean_tokens=judged.mean_tokens,
                bytes_per_token=self._verifier[0].bytes_per_token,
                unique_tokens=judged.tokens,
                path_tokens=judged.path_tokens,
                published_tokens=None,
            )
            if judged and self._verifier
            else None,
            timing=Timing(
                wall_s=time.perf_counter() - began_s,
                policy_s=usage.busy_s,
                verifier_s=judged.busy_s if judged else 0.0,
                select_s=tree.select_s,
                bytes_moved=usage.bytes_moved + (judged.bytes_moved if judged else 0),
                decode_steps=usage.decode_steps,
            ),
            strategy=strategy,
            width=effective_width(config),
            seed=config.seed,
            trace=tree.trace() if config.trace else None,
        )


def _drive(
    searching: Generator[Request, Any, SearchTree],
    policy: TreePolicy,
    judge: PrmVerifier | CallableVerifier,
    on_event: OnEvent | None,
    should_stop: ShouldStop | None,
) -> SearchTree:
    """Run one search; unlike `ets_engine.search.run`, look at `should_stop` between decode steps too."""
    is_wanted = is_thrown = False

    def stop() -> bool:
        nonlocal is_wanted
        is_wanted = is_wanted or (should_stop is not None and should_stop())
        return is_wanted

    try:
        request = next(searching)
        while True:
            if not is_thrown and stop():
                is_thrown = True
                request = searching.throw(StopSearch())
            elif isinstance(request, Expand):
                policy.submit(request.parents, request.children)
                while (steps := policy.steps()) is None and not stop():
                    policy.advance()
                if steps is not None:
                    request = searching.send(steps)
            else:
                request = searching.send(answer(request, policy, judge, policy, on_event))
    except StopIteration as ended:
        tree: SearchTree = ended.value
        return tree


def _best_steps(tree: SearchTree, paths: tuple[Trajectory, ...]) -> tuple[ScoredStep, ...]:
    """Steps to show where there is no answer: the best trajectory's, else the best other path's."""
    if paths:
        return max(paths, key=lambda path: path.score).steps
    leaf = max(tree.leaves, key=lambda node: (tree[node].step.stop is not StopReason.ERROR, tree[node].step_score))
    nodes = tree.path(leaf)[1:]
    return tuple(ScoredStep(text=n.step.text, score=n.step_score, num_tokens=n.step.num_tokens) for n in nodes)


def _finish_reason(tree: SearchTree, answered: bool) -> Literal["stop", "no_answer", "length", "cancelled", "error"]:
    if tree.stopped:
        return "cancelled"
    if answered:
        return "stop"
    if tree.finished:
        return "no_answer"
    all_failed = not tree.frontier and not tree.stopped_by(StopReason.LENGTH)
    return "error" if all_failed else "length"


def _eos_ids(*found: int | list[int] | None) -> frozenset[int]:
    """Every end-of-text id that the checkpoint names."""
    return frozenset(i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids]))
