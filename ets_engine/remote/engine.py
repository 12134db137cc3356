"""The engine whose models are served elsewhere, and the one call that makes it from an address."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import httpx

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.hosted import HostedEngine
from ets_engine.messages import Message, Prompt, last_user_text
from ets_engine.protocols import Embedder, SearchOptions, StepView
from ets_engine.remote.address import Address
from ets_engine.remote.description import ServerDescription
from ets_engine.remote.metrics import ServerMetrics, read_metrics
from ets_engine.remote.policy import RemotePolicy
from ets_engine.remote.presets import PresetView, end_texts
from ets_engine.remote.replicas import Replicas
from ets_engine.remote.server import ServerError
from ets_engine.remote.verifier import JudgeVerifier, PoolingVerifier, ServedVerifier, find_layout, parse_verifier
from ets_engine.results import counted_kv
from ets_engine.scorers import BatchScorer, Scorer
from ets_engine.search import SearchTree
from ets_engine.types import KVStats

if TYPE_CHECKING:
    from ets_engine.models.presets import Preset

Rebuild = tuple[Callable[..., Any], tuple[Any, ...]]
Reach = Callable[[Address], Replicas]

_OF_PRM = ("dtype", "step_separator", "verifier_format", "verifier_load_options")  # settings that decide its scores
_SECRET = ("token", "use_auth_token")  # of from_pretrained


class RemoteEngine(HostedEngine):
    """Searches over a model behind OpenAI-compatible servers; see `connect`.

    Results have KV figures that are counted from the tree (`counted_kv`): what a cache would hold that keeps just the
    live paths. What the servers' caches really did is in `server_metrics`.

    Args:
        address: Of the policy.
        verifier: Judges steps; None = every search brings its own, or is one that no score can change.
        name: Names both models and what else decides answers, for caches.
        replicas: Of the policy.
        policy: Asks them.
        preset: What ends a solution besides the end of text, the longest step, what of a step the engine's own verifier
            reads, and, without `view`, how texts map to answers; None = nothing is known of the model.
        closes: Called when it closes, the last search having ended.
        rebuild: A function and its arguments, which make or find this engine again where it is unpickled; None = what
            is registered under its name there.
        judged_by: Names the verifier, None = there is none.
        view, embedder, max_concurrent_searches: As in `HostedEngine`.
    """

    def __init__(
        self,
        address: Address,
        verifier: Scorer | None,
        *,
        name: str,
        replicas: Replicas,
        policy: RemotePolicy,
        preset: Preset | None = None,
        closes: Sequence[Callable[[], None]] = (),
        rebuild: Rebuild | None = None,
        judged_by: str | None = None,
        view: StepView | None = None,
        embedder: Embedder | None = None,
        max_concurrent_searches: int = 64,
    ) -> None:
        """See the class."""
        super().__init__(
            policy,
            verifier,
            name=name,
            view=view,
            embedder=embedder,
            max_concurrent_searches=max_concurrent_searches,
            count_tokens=policy.count_tokens,
        )
        self.address = address
        self._replicas = replicas
        self._policy = policy
        self._preset = preset
        self._has_view = view is not None
        self._closes = tuple(closes)
        self._rebuild = rebuild
        self._judged_by = judged_by
        self._embedded_by = "the words of the steps" if embedder is None else _name_of(embedder)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle how it is made or found again, else its name, as in `HostedEngine`."""
        return super().__reduce__() if self._rebuild is None else self._rebuild

    def count_prompt(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> int:
        """Tokens of a conversation as the model reads it, as exactly as they are known (count).

        Raises:
            ConfigError: It cannot be put into a prompt; the message says what to pass to `connect`.
            EngineError: The server cannot be asked.
        """
        return self._policy.count_prompt(messages, tools)

    def count_kv(self, tree: SearchTree) -> KVStats:
        """KV figures counted from the tree."""
        return counted_kv(tree)

    def server_metrics(self) -> dict[str, ServerMetrics | None]:
        """Each replica's own prefix-cache figures by its address, None where it has none or does not answer."""
        found: dict[str, ServerMetrics | None] = {}
        for server in self._replicas.servers:
            try:
                found[server.url] = read_metrics(server.get("^/metrics").text)
            except ServerError:
                found[server.url] = None
        return found

    def describe(self) -> ServerDescription:
        """What is known of the server and the model, by a handful of tiny requests.

        Raises:
            ConfigError: It is not known how the model wants its prompts; the message says what to pass to `connect`.
            EngineError: The server cannot be asked.
        """
        able = self._policy.capabilities()
        return ServerDescription(
            name=self.address.model,
            urls=self.address.urls,
            context_tokens=able.context_tokens,
            prompts=self._policy.describe_prompts(),
            preset=None if self._preset is None else self._preset.name,
            boundaries=self._policy.boundaries,
            token_prompts=able.token_prompts,
            token_ids=able.token_ids,
            choices=able.choices,
            seed=able.seed,
            cuts=able.extras,
            stop=able.stop,
            metrics={url: found is not None for url, found in self.server_metrics().items()},
            call_s=self._policy.measure_call(),
            verifier_name=self._judged_by,
            embedder=self._embedded_by,
        )

    def close(self) -> None:
        """Take no more searches, wait for those submitted so far, and close all connections.

        Raises:
            EngineError: As in `HostedEngine`.
        """
        super().close()
        for close in self._closes:
            close()

    def _make_job(self, problem: Prompt, config: SearchConfig, options: SearchOptions) -> Any:
        """The search as the model's preset has it."""
        preset = self._preset
        if preset is None:
            return super()._make_job(problem, config, options)
        most = preset.boundary.tokens or config.max_step_tokens
        limits = {"max_step_tokens": min(most, config.max_step_tokens), "stop": (*preset.stop, *config.stop)}
        job = super()._make_job(problem, config.model_copy(update=limits), options)
        own: SearchOptions = {"read_step": preset.make_reader(options.get("read_step"))}
        if not (options.get("view") or self._has_view):
            own["view"] = PresetView(preset, lambda: self._policy.in_thought(job.messages, job.tools))
        if not options.get("problem_text") and preset.prompt != "chat":
            own["problem_text"] = last_user_text(job.messages)
        job.options = {**options, **own}
        return job


def connect(
    address: str,
    verifier: Scorer | str | None = None,
    config: EngineConfig | None = None,
    *,
    boundaries: Sequence[str] | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    timeout_s: float = 120.0,
    retries: int = 4,
    max_concurrent_requests: int = 64,
    max_concurrent_searches: int = 64,
    view: StepView | None = None,
    embedder: Embedder | None = None,
    rebuild: Rebuild | None = None,
    transport: httpx.BaseTransport | None = None,
) -> RemoteEngine:
    """The search service over a model that is served elsewhere; nothing is asked before the first search.

    Args:
        address: `openai:URL[,URL...]#model`, the URLs being replicas of the same model.
        verifier: A function or `BatchScorer`; `judge:openai:URL#model`, a chat model that marks steps;
            `pooling:openai:URL#model`, a PRM behind a pooling endpoint; a PRM to be run here, by folder or hub name or
            "reference"; None = every search brings its own, or is one that no score can change.
        config: `preset`: prompt, step boundary and answer pattern of the model, "auto" = as its name there suggests,
            else its chat template, steps that end with a blank line, and answers of mathematics. How a PRM is run here,
            or what one behind a pooling endpoint reads (`verifier_format` "qwen" or "trl", `step_separator`). Nothing
            else of it reaches a server.
        boundaries: Texts that end a step, None = as the preset says; see `RemotePolicy` for what token ids make of
            them.
        tokenizer: The model's, by folder or hub name, for its chat template; not needed where the server has
            `/tokenize`, or the model's name is that of a cached or local one.
        template: For a model without a chat template: a text with `{problem}`, or "plain"; the preset's prompt and
            instruction do not count then.
        api_key_env: Environment variable with the key, which policy and verifier share.
        timeout_s: Longest wait for one reply.
        retries: More tries after a failed one (count).
        max_concurrent_requests: Most requests in flight (count), the verifier's aside.
        max_concurrent_searches: Searches that run at a time; more wait.
        view: How texts map to answers, None = as the preset says.
        embedder: How differently steps reason; None compares their words.
        rebuild: As in `RemoteEngine`.
        transport: Instead of the network.

    Raises:
        ConfigError: An address or a setting is wrong, there is no such preset, or no texts end its steps.
        ModelLoadError: A PRM cannot be loaded.

    Example:
        >>> with connect("openai:http://localhost:8000#Qwen/Qwen2.5-Math-7B-Instruct") as engine:
        ...     engine.name
        'openai:http://localhost:8000/v1#Qwen/Qwen2.5-Math-7B-Instruct'
    """
    from ets_engine.models.presets import find_preset

    where, config = Address.parse(address), config or EngineConfig()
    preset = find_preset(config.preset, where.model, None)
    ends = end_texts(preset) if boundaries is None else boundaries

    def reach(at: Address) -> Replicas:
        return Replicas.connect(
            at,
            api_key_env=api_key_env,
            timeout_s=timeout_s,
            retries=retries,
            max_concurrent_requests=max_concurrent_requests,
            transport=transport,
        )

    scorer, judged_by, closes = _find_verifier(verifier, config, reach)
    replicas = reach(where)
    policy = RemotePolicy(replicas, where.model, boundaries=ends, tokenizer=tokenizer, template=template, preset=preset)
    settings = {"boundaries": tuple(ends), "tokenizer": tokenizer, "template": template}
    usual = {"boundaries": preset.boundary.ends, "tokenizer": None, "template": None}
    shown = config.changed(["preset"])
    shown += [f"{key}={value!r}" for key, value in settings.items() if value != usual[key]]
    given = {"view": view, "embedder": embedder}
    shown += [f"{key}={_name_of(value)}" for key, value in given.items() if value is not None]
    return RemoteEngine(
        where,
        scorer,
        name="+".join([where.name, *shown, *([] if judged_by is None else [judged_by])]),
        replicas=replicas,
        policy=policy,
        preset=preset,
        closes=(replicas.close, *closes),
        rebuild=rebuild,
        judged_by=judged_by,
        view=view,
        embedder=embedder,
        max_concurrent_searches=max_concurrent_searches,
    )


def _find_verifier(
    verifier: Scorer | str | None, config: EngineConfig, reach: Reach
) -> tuple[Scorer | None, str | None, tuple[Callable[[], None], ...]]:
    """The verifier, its name for caches, and what closes it."""
    if verifier is None:
        config.refuse_prm_settings("what each search brings")
        return None, None, ()
    if not isinstance(verifier, str):
        if not (callable(verifier) or isinstance(verifier, BatchScorer)):
            raise ConfigError(f"verifier={verifier!r:.100}: give a function, a BatchScorer or a name")
        config.refuse_prm_settings("an object of the caller's")
        return verifier, _name_of(verifier), ()
    served = parse_verifier(verifier)
    if served is not None:
        return _find_served(*served, config, reach)
    if verifier in ("logprob", "self_certainty") or verifier.startswith("probe:"):  # as `find_intrinsic` reads them
        raise ConfigError(
            f"verifier={verifier!r} reads what the policy computes as it writes, which no server tells; give "
            "judge:openai:..., pooling:openai:..., a PRM to be run here, or a function"
        )
    from ets_engine.models import PrmScorer  # it loads torch

    options = {key: value for key, value in config.verifier_load_options.items() if key not in _SECRET}
    changed = config.model_copy(update={"verifier_load_options": options}).changed(_OF_PRM)
    return PrmScorer.from_pretrained(verifier, config), "+".join([verifier, *changed]), ()


def _find_served(
    kind: ServedVerifier, at: Address, config: EngineConfig, reach: Reach
) -> tuple[Scorer, str, tuple[Callable[[], None], ...]]:
    """The same for a verifier behind a server."""
    if kind is JudgeVerifier:
        config.refuse_prm_settings("a chat model that judges")
        name = f"judge:{at.name}"
        judge = JudgeVerifier(reach(at), at.model, id=name)
    else:
        name = "+".join([f"pooling:{at.name}", *config.changed(("verifier_format", "step_separator"))])
        judge = PoolingVerifier(reach(at), at.model, layout=find_layout(config), id=name)
    return judge, name, (judge.close,)


def _name_of(given: object) -> str:
    """What an object calls itself in names for caches; without that it is never taken for another."""
    known = getattr(given, "id", None)
    return known if isinstance(known, str) else f"object:{uuid.uuid4().hex}"
