"""A completions server as the policy of a tree search: one request per distinct parent."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.hosted import ProposalRequest, estimate_tokens
from ets_engine.messages import Message
from ets_engine.remote.capabilities import (
    COMPLETIONS,
    EXTRAS,
    Capabilities,
    choices_of,
    probe,
    stopped_by,
    usage_of,
)
from ets_engine.remote.prompts import PromptWriter, RemotePrompt
from ets_engine.remote.replicas import Replicas, digest, held
from ets_engine.remote.server import AbandonedError, ServerError
from ets_engine.types import Step, StopReason

if TYPE_CHECKING:
    from ets_engine.models.presets import Preset

_LOGGER = logging.getLogger(__name__)
_FAILURE_KEPT_S = 5.0
_MEASURED_CALLS = 5


@dataclass(frozen=True, slots=True)
class TokenStep(Step):
    """A step and the tokens that it adds to its path, so that they need not be guessed from its text later.

    Attributes:
        token_ids: Empty where nobody knows them.
    """

    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Branches:
    """Children of one node that one request asks for."""

    prompt: RemotePrompt
    children: tuple[int, ...]
    max_tokens: int  # of the step
    is_last: bool  # whether the trajectory has no tokens left after so many
    prefixes: tuple[str, ...]
    opening: str = ""  # white space that the steps began with, when it was all they were


class RemotePolicy:
    r"""Proposes steps by the completions API of a server; a `StepProposer` for `HostedEngine`.

    What the server can do is found out once, at the first request (`Capabilities`). Children of one node are one
    request with `n`, or as many requests where there is no `n`. Where the server takes and gives token ids, a path is
    sent as the very tokens that it was sampled as; else as text. Each request has a seed of its own, made from the
    search's, the prompt and its first child's id; same seed, same tree holds only as far as the server keeps to it, and
    `transformers serve` does so for one request at a time.

    A step ends with a boundary, and a solution with the model's end of text or one of `SearchConfig.stop`. Where the
    server neither names nor keeps the text that stopped it, the two look alike: steps are then sampled without stop
    texts up to `max_step_tokens` and cut here, which wastes what comes after the boundary; it is said once in the log.
    White space up to a boundary is no step: the server is asked once more, below it, for the rest of one.

    Args:
        replicas: Of the model.
        model: Its name there.
        boundaries: Texts that end a step. A step's text ends there; its token ids, which are what its children are sent
            as, may reach beyond it, as the last token need not end where the server trims the text.
        tokenizer, template, preset: As in `PromptWriter`; a preset decides nothing else here.

    Raises:
        ConfigError: No boundary, or an empty one.
    """

    def __init__(
        self,
        replicas: Replicas,
        model: str,
        *,
        boundaries: Sequence[str] = ("\n\n",),
        tokenizer: str | None = None,
        template: str | None = None,
        preset: Preset | None = None,
    ) -> None:
        """See the class."""
        if isinstance(boundaries, str) or not boundaries or not all(boundaries):
            raise ConfigError(f"boundaries={boundaries!r}: give a list of texts that end a step, none of them empty")
        self._replicas = replicas
        self._model = model
        self._boundaries = tuple(boundaries)
        self._writer = PromptWriter(
            replicas, model, self.capabilities, tokenizer=tokenizer, template=template, preset=preset
        )
        self._lock = threading.Lock()
        self._known: Capabilities | None = None
        self._failure: ServerError | None = None  # of the last probe, until it is old
        self._failed_s = 0.0  # when, on the monotonic clock

    def capabilities(self) -> Capabilities:
        """What the server can do; asks it the first time.

        Raises:
            ServerError: It cannot be asked. For a few seconds all others who ask are told so at once, so that not each
                of them tries in its turn.
            AbandonedError: The search that asks ended first.
        """
        with held(self._lock):
            if self._known is None:
                if self._failure is not None and time.monotonic() < self._failed_s + _FAILURE_KEPT_S:
                    raise copy.copy(self._failure)
                try:
                    self._known = probe(self._replicas, self._model)
                except AbandonedError:
                    raise  # others have more time
                except ServerError as error:
                    self._failure, self._failed_s = copy.copy(error), time.monotonic()
                    raise
                if self._known.stop == "silent":
                    _LOGGER.warning("the server of %r does not say what stops it; steps are cut here", self._model)
            return self._known

    @property
    def boundaries(self) -> tuple[str, ...]:
        """Texts that end a step."""
        return self._boundaries

    def describe_prompts(self) -> str:
        """How prompts are written, as `PromptWriter.describe`."""
        return self._writer.describe()

    def in_thought(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> bool:
        """Whether solutions begin inside a thought, as `PromptWriter.in_thought`."""
        return self._writer.in_thought(messages, tools)

    def measure_call(self) -> float:
        """Median of some calls for one token, one after another (seconds).

        Raises:
            ServerError: The server cannot be asked.
        """
        body = {"model": self._model, "prompt": "1", "max_tokens": 1, **_sampling(SearchConfig(), self.capabilities())}
        seconds: list[float] = []
        for _ in range(_MEASURED_CALLS):
            began_s = time.perf_counter()
            self._replicas.post(COMPLETIONS, body)
            seconds.append(time.perf_counter() - began_s)
        return median(seconds)

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, as `PromptWriter.count`."""
        return self._writer.count(text)

    def count_prompt(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> int:
        """Tokens of a prompt: exact where it is sent as ids, or a local tokenizer counts them.

        Raises:
            ConfigError: As `PromptWriter.write`.
            ServerError: The server cannot be asked.
        """
        prompt = self._writer.write(messages, tools)
        return max(1, self._writer.count(prompt) if isinstance(prompt, str) else len(prompt))

    def __call__(self, request: ProposalRequest) -> list[Step]:
        """The next step of every branch; a request that fails fails its branches alone.

        Raises:
            ConfigError: As `PromptWriter.write`, or the server has no such sampling.
            ServerError: The server cannot be asked what it can do.
        """
        able = self.capabilities()
        sampling = _sampling(request.config, able)
        steps: dict[int, Step] = {}
        wanted: list[_Branches] = []
        for branches in self._group(request, able):
            if branches.max_tokens > 0:
                wanted.append(branches)
            else:  # the context is full
                steps |= {child: TokenStep("", 0, StopReason.LENGTH) for child in branches.children}

        def ask(branches: _Branches) -> list[Step]:
            return self._ask(branches, request.config, sampling, able)

        for branches, found in zip(wanted, self._replicas.map(ask, wanted), strict=True):
            if isinstance(found, ServerError):
                found = [Step("", 0, StopReason.ERROR, str(found)) for _ in branches.children]
            steps |= dict(zip(branches.children, found, strict=True))
        return [steps[child] for child in request.children]

    def _group(self, request: ProposalRequest, able: Capabilities) -> list[_Branches]:
        root = self._writer.write(request.messages, request.tools)
        home = digest(json.dumps(root))
        found: list[_Branches] = []
        places = range(len(request.children))
        for _, group in groupby(places, key=lambda place: request.parents[place]):
            siblings = list(group)
            path, left = tuple(request.paths[siblings[0]]), request.tokens_left[siblings[0]]
            prompt = _extend(root, path)
            room = min(left, _room(prompt, able))
            prefixes = (digest(f"{home} {path[0].text}"), home) if path else (home,)
            children = tuple(request.children[place] for place in siblings)
            max_tokens = min(room, request.config.max_step_tokens)
            together = able.choices and request.config.temperature > 0  # vLLM refuses n > 1 without sampling
            parts = [children] if together else [(child,) for child in children]
            found += [_Branches(prompt, part, max_tokens, max_tokens == room, prefixes) for part in parts]
        return found

    def _ask(
        self, branches: _Branches, config: SearchConfig, sampling: Mapping[str, Any], able: Capabilities
    ) -> list[Step]:
        """The steps of all children; those that are blank are gone on with once, the same ones together."""
        steps = self._ask_once(branches, config, sampling, able)
        blank: dict[Step, list[int]] = {}
        for place, step in enumerate(steps):
            if step.text and not step.text.strip() and step.stop is StopReason.BOUNDARY:
                blank.setdefault(step, []).append(place)
        for step, places in blank.items():
            below = replace(
                branches,
                prompt=_extend(branches.prompt, (step,)),
                children=tuple(branches.children[place] for place in places),
                max_tokens=branches.max_tokens - step.num_tokens,
                opening=step.text,
            )
            if below.max_tokens <= 0:
                continue
            try:
                rests = self._ask_once(below, config, sampling, able)
            except ServerError as error:
                rests = [Step("", 0, StopReason.ERROR, str(error))] * len(places)
            for place, rest in zip(places, rests, strict=True):
                steps[place] = _join(step, rest)
        return steps

    def _ask_once(
        self, branches: _Branches, config: SearchConfig, sampling: Mapping[str, Any], able: Capabilities
    ) -> list[Step]:
        count = len(branches.children)
        body = {
            "model": self._model,
            "prompt": branches.prompt if isinstance(branches.prompt, str) else list(branches.prompt),
            "max_tokens": branches.max_tokens,
            **sampling,
        }
        if count > 1:
            body["n"] = count
        if able.seed:
            body["seed"] = _seed(config.seed, branches.prefixes[-1] + branches.opening, branches.children[0])
        if able.stop != "silent":
            body["stop"] = [*self._boundaries, *config.stop]
        reply = self._replicas.post(COMPLETIONS, body, prefixes=branches.prefixes, load=count)
        choices = choices_of(reply)
        if len(choices) != count:
            raise ServerError(f"the server of {self._model!r} gave {len(choices)} choices, {count} were asked for")
        written = usage_of(reply, "completion_tokens")
        characters = sum(len(choice["text"]) for choice in choices)
        steps: list[Step] = []
        for choice in choices:
            share = len(choice["text"]) / characters if characters else 1 / count
            tokens = None if written is None else round(written * share)
            steps.append(self._read(choice, tokens, branches, config, able))
        return steps

    def _read(
        self,
        choice: Mapping[str, Any],
        written: int | None,
        branches: _Branches,
        config: SearchConfig,
        able: Capabilities,
    ) -> Step:
        """One choice as a step.

        Args:
            choice: Of the reply, with a text.
            written: Its tokens, as well as they are known (count).
            branches: What was asked for.
            config: As asked for.
            able: What the server can do.
        """
        text, reason = choice["text"], choice.get("finish_reason")
        if reason not in ("stop", "length"):
            return Step("", 0, StopReason.ERROR, f"the server of {self._model!r} ended a step for {reason!r}")
        ids: tuple[int, ...] | None = tuple(choice["token_ids"]) if able.token_ids and choice.get("token_ids") else None
        named = stopped_by(choice)
        if able.stop == "told" and isinstance(named, str) and named not in text:
            text += named  # it was cut off
        end = self._end(text)
        if able.stop == "told":
            is_boundary = named in self._boundaries
        else:
            is_boundary = end is not None or (able.stop == "kept" and text.endswith(self._boundaries))
        if able.stop == "silent" and end is not None and end < len(text):
            written = None if written is None else round(written * end / len(text))
            text, ids = text[:end], None  # the model's next step must not see what came after
        if ids is None and not isinstance(branches.prompt, str):
            ids = self._writer.encode(text)
        if ids is not None:
            written = len(ids)
        elif written is None:
            written = estimate_tokens(text)
        if is_boundary:
            stop = StopReason.BOUNDARY
        elif reason == "stop":
            stop = StopReason.FINISHED
        else:
            stop = StopReason.LENGTH if branches.is_last else StopReason.BOUNDARY
        return TokenStep(text, written, stop, token_ids=ids or ())

    def _end(self, text: str) -> int | None:
        """Where the first boundary after some content ends; blank lines alone are no step."""
        start = len(text) - len(text.lstrip())
        ends = [place + len(one) for one in self._boundaries if (place := text.find(one, start)) >= 0]
        return min(ends, default=None)


def _join(begun: Step, rest: Step) -> Step:
    """A step that came in two parts."""
    if rest.stop is StopReason.ERROR:
        return rest
    ids = (*_ids(begun), *_ids(rest))
    return TokenStep(begun.text + rest.text, begun.num_tokens + rest.num_tokens, rest.stop, token_ids=ids)


def _ids(step: Step) -> tuple[int, ...]:
    return step.token_ids if isinstance(step, TokenStep) else ()


def _extend(root: RemotePrompt, path: Sequence[Step]) -> RemotePrompt:
    """The prompt of a path: its tokens where all are known."""
    if isinstance(root, str):
        return root + "".join(step.text for step in path)
    ids = list(root)
    for step in path:
        if not isinstance(step, TokenStep) or (step.text and not step.token_ids):
            raise ServerError(f"the tokens of {step.text!r:.60} are not known, and its prompt is one of tokens")
        ids += step.token_ids
    return tuple(ids)


def _room(prompt: RemotePrompt, able: Capabilities) -> int:
    """Tokens that the model's context still has for a prompt, as far as known (count)."""
    if able.context_tokens is None or isinstance(prompt, str):
        return 2**31
    return able.context_tokens - len(prompt)


def _sampling(config: SearchConfig, able: Capabilities) -> dict[str, Any]:
    """The fields that set a server's sampling."""
    if able.generation_config:
        settings: dict[str, Any] = {"do_sample": config.temperature > 0}
        if config.temperature > 0:
            settings |= {"top_k": config.top_k, "top_p": config.top_p, "temperature": config.temperature}
            settings |= {"min_p": config.min_p} if config.min_p else {}
        return {"generation_config": json.dumps(settings)}
    fields: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
    cuts = {name: value for name, value in (("top_k", config.top_k), ("min_p", config.min_p)) if value}
    if cuts and not able.extras:
        raise ConfigError(f"{cuts}: this server samples by temperature and top_p alone; leave the others out")
    return fields | cuts | (EXTRAS if able.extras else {})


def _seed(seed: int, home: str, node: int) -> int:
    """A seed for the steps of one request, in [0, 2^31).

    The prompt is part of it: where a server seeds one generator for all its requests, as `transformers serve` does,
    searches with the same seed would otherwise draw the same numbers again and again.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {home} {node}".encode()).digest()[:4]) >> 1
