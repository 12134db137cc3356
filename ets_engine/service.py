"""The engine: owns a policy and a verifier, and answers problems from any thread or event loop by tree search."""

from __future__ import annotations

import asyncio
import copy
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from types import TracebackType
from typing import Unpack

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError, EngineError, ETSError
from ets_engine.loading import load_models
from ets_engine.messages import Prompt, last_user_text, problem_text, to_messages
from ets_engine.models import PolicyFormat, Preset, PrmFormat, Probe
from ets_engine.models.description import describe_model
from ets_engine.models.formats import encode
from ets_engine.protocols import Cancel, Embedder, SearchOptions, StepView, check_options
from ets_engine.reference import REFERENCE, check_domain
from ets_engine.runtime import Runner, StepDecoder, resolve_device
from ets_engine.scorers import EqualVerifier, EvidenceScorer, Scorer
from ets_engine.search import SearchTree, needs_scores
from ets_engine.serving import Job, Models, Worker, in_callback
from ets_engine.serving.crew import Crew
from ets_engine.serving.helper import Helper
from ets_engine.serving.messages import Order
from ets_engine.serving.result import measure_job
from ets_engine.types import EngineDescription, EngineStats, SearchResult

Key = tuple[str, str | None, EngineConfig]
"""What an engine was loaded from: policy, verifier, settings."""

# Settings of an engine that decide answers, so that its name says them.
_DECIDING = "dtype preset verifier_format step_separator embedder load_options verifier_load_options".split()
_IN_FLIGHT = 256  # searches of one `search_many` that are submitted at a time

_registry: weakref.WeakValueDictionary[Key, ETSEngine] = weakref.WeakValueDictionary()
_registry_lock = threading.Lock()


class ETSEngine:
    """A policy and a verifier, loaded once, that answer problems by tree search.

    Searches from any number of threads and event loops advance together, in the same forward passes. Use
    `from_pretrained` or `get_engine`, and `close` or a `with` block to give the memory back. A deep copy is the engine
    itself; a pickle holds the models' names, never their weights.

    Args:
        policy: Runner of the policy; the engine alone uses it from now on.
        policy_format: Its prompt and step boundaries.
        verifier: Runner of the PRM and what it reads, or a scorer of what the policy computes anyway; None = every
            search brings a verifier of its own.
        embedder: How differently steps reason, called in the engine's thread; None = the policy's hidden states say it.
        view: How solution texts map to answers, None = as the policy's preset says.
        read_problem: Gives a problem as the models know it, and raises for one that they do not know.
        key: What `get_engine` makes it from again, None = it cannot be pickled.
        max_queued_searches: As in `EngineConfig`.
        helpers: Processes that load the same models, which take part of the searches; the engine ends them.

    Raises:
        ETSError: A helper could not load its models.

    Attributes:
        num_parameters: Of the policy and of the PRM (counts).

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
        verifier: tuple[Runner, PrmFormat] | EvidenceScorer | None = None,
        *,
        embedder: Embedder | None = None,
        view: StepView | None = None,
        read_problem: Callable[[str], str] | None = None,
        key: Key | None = None,
        max_queued_searches: int = 4096,
        helpers: Sequence[Helper] = (),
    ) -> None:
        """See the class."""
        self._format = policy_format
        self._view = view
        self._read_problem = read_problem
        self._key = key
        self._max_queued = max_queued_searches
        self._name = f"engine-{uuid.uuid4().hex}"
        if key is not None:
            mark = f"#{verifier.fingerprint()}" if isinstance(verifier, Probe) else ""  # its file may be written anew
            self._name = _name(key[0], key[1] and key[1] + mark, key[2])
        self._own = verifier if isinstance(verifier, EvidenceScorer) else None
        prm = None if isinstance(verifier, EvidenceScorer) else verifier
        self._has_verifier = verifier is not None
        models = Models(StepDecoder(policy, policy_format.tokenizer), policy_format, prm, embedder)

        def finish(job: Job, tree: SearchTree) -> Callable[[], SearchResult]:
            return partial(measure_job(job, tree, models).to_result, job)

        self._worker = Worker(models, finish, max_queued_searches, models.share_threads(1 + len(helpers)))
        self._crew = Crew(self._worker, helpers, self._own, max_queued_searches)
        self.num_parameters = policy.num_parameters, prm[0].num_parameters if prm else 0
        names = (None, None) if key is None else (key[0], key[1] or (prm and REFERENCE))
        own = "embedder" if embedder else "the policy's own hidden states"
        self._description = EngineDescription(
            policy=describe_model(policy, names[0], policy_format.preset.name, policy_format.describe()),
            verifier=prm and describe_model(prm[0], names[1], prm[1].name, {"score": prm[1].details}),
            verifier_name=names[1] or (prm and prm[1].name) or getattr(self._own, "id", None),
            embedder=own if key is None or key[2].embedder is None else key[2].embedder,
        )
        weakref.finalize(self, self._crew.close, wait=False).atexit = False

    @classmethod
    def from_pretrained(
        cls,
        model: str = REFERENCE,
        verifier: str | None = None,
        config: EngineConfig | None = None,
        *,
        preset: Preset | None = None,
    ) -> ETSEngine:
        """Load a policy and its verifier.

        Args:
            model: "reference" for the shipped one, or a transformers causal LM by folder or hub name.
            verifier: "reference", or a PRM of a published format (see `load_prm`) by folder or hub name. Three need no
                second model: "logprob" and "self_certainty", how sure the policy is of what it writes, and
                "probe:FILE", a head on its hidden states. None takes the shipped one for the shipped policy; another
                policy then needs `search(..., verifier=function)`.
            config: Where and how they run.
            preset: The policy's prompt, step boundary and answers, where no preset that `EngineConfig.preset` can name
                fits; such an engine cannot be pickled.

        Raises:
            ModelLoadError: A model cannot be loaded, or its architecture cannot be honoured.
            ConfigError: The shipped PRM is asked to judge another model, a device is absent, there is no such preset,
                or a probe was trained on a policy of another width.
        """
        config = config or EngineConfig()
        own = config.model_copy(
            update={"processes": 1, "kv_memory_fraction": config.kv_memory_fraction / config.processes}
        )
        helpers: list[Helper] = []
        try:
            _start_helpers(helpers, Order(model, verifier, own, config.processes), preset)
            loaded = load_models(model, verifier, own, preset)
            return cls(
                loaded.policy,
                loaded.format,
                loaded.verifier,
                embedder=loaded.embedder,
                read_problem=check_domain if model == REFERENCE else None,
                key=(model, verifier, config) if preset is None else None,
                max_queued_searches=config.max_queued_searches,
                helpers=helpers,
            )
        except BaseException:
            for helper in helpers:
                helper.kill()
            raise

    def submit(
        self, problem: Prompt, config: SearchConfig | None = None, **options: Unpack[SearchOptions]
    ) -> Future[SearchResult]:
        """Start a search and return at once; the same seed gives the same result, whatever else runs.

        The verifier and `on_event` are called in a thread of this search's own, with the context variables of this
        call; they may use the engine themselves.

        Args:
            problem: A text, or the messages of a conversation, the last of which is to be answered.
            config: Strategy, width, limits, seed.
            options: As in `SearchOptions`. Without a verifier the engine's PRM judges; where there is none, only a
                search whose outcome no score can change.

        Returns:
            The result to come. What `search` raises for models, settings and contracts, the future raises.

        Raises:
            ReferenceDomainError: The shipped models do not know this kind of problem.
            ConfigError: The problem is no text and no conversation, or there is no verifier.
            EngineClosedError: The engine was closed, or belongs to another process.
            QueueFullError: Too many searches wait already.
        """
        job = self._make_job(problem, config or SearchConfig(), options)
        self._crew.submit(job)
        return job.future

    def _make_job(self, prompt: Prompt, config: SearchConfig, options: SearchOptions) -> Job:
        check_options(options)
        messages = to_messages(prompt)
        asked = problem_text(messages) if self._format.is_chat else last_user_text(messages)
        problem = options.get("problem_text") or asked
        known = None if self._read_problem is None else self._read_problem(asked)
        given: Scorer | EvidenceScorer | None = options.get("verifier")
        verifier: Scorer | EvidenceScorer | EqualVerifier | None = self._own if given is None else given
        if verifier is None and not self._has_verifier:
            if needs_scores(config, options.get("selector")):
                raise ConfigError(
                    "verifier=None: this engine has no PRM; pass search(..., verifier=function) or load one"
                )
            verifier = EqualVerifier()
        most = self._format.max_step_tokens
        if most is not None and most < config.max_step_tokens:
            config = config.model_copy(update={"max_step_tokens": most})
        return Job(
            problem,
            prompt=messages if known is None else known,
            prm_problem=problem if known is None else known,
            config=config,
            selector=options.get("selector"),
            verifier=verifier,
            view=options.get("view") or self._view or self._format.view(messages),
            on_event=options.get("on_event"),
            cancel=options.get("cancel"),
            read_step=options.get("read_step"),
            tools=copy.deepcopy(tuple(options.get("tools") or ())),
        )

    def search(
        self, problem: Prompt, config: SearchConfig | None = None, **options: Unpack[SearchOptions]
    ) -> SearchResult:
        """Answer one problem: `submit`, and wait.

        An exception in this thread meanwhile, KeyboardInterrupt for instance, stops the search.

        Raises:
            ReferenceDomainError: The shipped models do not know this kind of problem.
            ContextLengthError: The prompt does not fit a model or the KV budget.
            ConfigError: Settings contradict each other, or there is no verifier.
            ProtocolError: The verifier function or the selector broke its contract.
            EngineError: The engine was closed, is full, or failed.
        """
        check_options(options)
        stop = options["cancel"] = _Stop(options.get("cancel"))
        future = self.submit(problem, config, **options)
        try:
            return future.result()
        finally:
            stop.is_left = True

    async def asearch(
        self, problem: Prompt, config: SearchConfig | None = None, **options: Unpack[SearchOptions]
    ) -> SearchResult:
        """`search` for an event loop, which is never blocked; a cancelled task stops its search.

        Raises:
            asyncio.CancelledError: The task was cancelled.
            ETSError: As `search`.
        """
        check_options(options)
        stop = options["cancel"] = _Stop(options.get("cancel"))
        future = self.submit(problem, config, **options)
        try:
            return await asyncio.wrap_future(future)
        finally:
            stop.is_left = True

    def search_many(
        self,
        problems: Sequence[Prompt],
        config: SearchConfig | None = None,
        *,
        verifier: Scorer | EvidenceScorer | None = None,
    ) -> list[SearchResult]:
        """Answer many problems together.

        Returns:
            One result per problem, in order.

        Raises:
            ETSError: As `search`, for the first problem that could not be searched; the others were finished before.
        """
        pending: set[Future[SearchResult]] = set()
        futures: list[Future[SearchResult]] = []
        stop = _Stop(None)
        try:
            for problem in problems:
                while len(pending) >= self.max_concurrent_searches:
                    pending = wait(pending, return_when=FIRST_COMPLETED).not_done
                futures.append(self._begin(problem, config, verifier=verifier, cancel=stop))
                pending.add(futures[-1])
            wait(pending)
        finally:
            stop.is_left = True
        return [future.result() for future in futures]

    def _begin(
        self, problem: Prompt, config: SearchConfig | None, **options: Unpack[SearchOptions]
    ) -> Future[SearchResult]:
        """`submit`, where what is refused is a future that says so."""
        try:
            return self.submit(problem, config, **options)
        except ETSError as error:
            refused: Future[SearchResult] = Future()
            refused.set_exception(error)
            return refused

    @property
    def name(self) -> str:
        """Names the models: the policy, and the verifier where it is not the policy's own."""
        return self._name

    @property
    def max_concurrent_searches(self) -> int:
        """So many searches advance together before more of them at once gains nothing (count)."""
        return min(_IN_FLIGHT, self._max_queued)

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more searches, as in a fork of its process."""
        return self._crew.is_closed

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as the policy reads it."""
        return len(encode(self._format.tokenizer, text))

    def describe(self) -> EngineDescription:
        """What was found in the checkpoints, and what they take.

        Example:
            >>> found = get_engine("reference").describe()
            >>> found.policy.format, found.verifier.format, found.policy.kv_bytes_per_token
            ('reference', 'trl', 4608)
        """
        return self._description

    def stats(self) -> EngineStats:
        """What this engine has done so far, over all searches.

        Raises:
            EngineClosedError: It was closed.
        """
        return self._crew.stats()

    def close(self) -> None:
        """Give the models' memory back, after the searches submitted so far; later ones are refused.

        Raises:
            EngineError: Called from a callback of one of those searches: waiting would never end.
        """
        if in_callback() is self._worker:
            raise EngineError("a callback of a running search closed its engine; do that after the search")
        self._crew.close()

    def __enter__(self) -> ETSEngine:
        """Nothing to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __copy__(self) -> ETSEngine:
        """The engine itself: there is one of the models."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> ETSEngine:
        """The engine itself: there is one of the models."""
        return self

    def __reduce__(self) -> tuple[Callable[..., ETSEngine], Key]:
        """Pickle what it was loaded from; unpickling takes the process's engine of that name, or loads it.

        Raises:
            EngineError: It was not made by `from_pretrained`.
        """
        if self._key is None:
            raise EngineError("only an engine from ETSEngine.from_pretrained or get_engine can be pickled: by name")
        return get_engine, self._key


def get_engine(model: str = REFERENCE, verifier: str | None = None, config: EngineConfig | None = None) -> ETSEngine:
    """The process's one engine of these models and settings, loaded when it is first asked for.

    Args:
        model: As in `ETSEngine.from_pretrained`.
        verifier: As there.
        config: As there.

    Raises:
        ModelLoadError: A model cannot be loaded, or its architecture cannot be honoured.
        ConfigError: The shipped PRM is asked to judge another model, or a device is absent.

    Example:
        >>> get_engine("reference") is get_engine("reference")
        True
    """
    key = (model, verifier, config or EngineConfig())
    with _registry_lock:
        engine = _registry.get(key)
        if engine is None or engine.is_closed:
            engine = _registry[key] = ETSEngine.from_pretrained(*key)
        return engine


def _start_helpers(helpers: list[Helper], order: Order, preset: Preset | None) -> None:
    """Add processes that load these models meanwhile; whoever calls this ends them if anything goes wrong.

    Raises:
        ConfigError: There can be none here.
    """
    if order.processes == 1:
        return
    if preset is not None:
        raise ConfigError(
            f"processes={order.processes} and preset={preset.name!r}: other processes know presets by name only; take "
            "one that `ets models` lists, or leave processes at 1"
        )
    if resolve_device(order.config).type != "cpu":
        raise ConfigError(
            f"processes={order.processes} is for device='cpu': on a GPU, searches share the passes of one process"
        )
    for _ in range(order.processes - 1):
        helpers.append(Helper(order))


def _name(model: str, verifier: str | None, config: EngineConfig) -> str:
    """Of an engine: its models, and whatever else decides its answers."""
    return "+".join([model, *([] if verifier is None else [verifier]), *config.changed(_DECIDING)])


class _Stop:
    """A caller's own `cancel`, and whether the caller is still there."""

    def __init__(self, cancel: Cancel | None) -> None:
        self._cancel = cancel
        self.is_left = False

    def is_set(self) -> bool:
        return self.is_left or (self._cancel is not None and self._cancel.is_set())
