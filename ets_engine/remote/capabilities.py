"""What a completions server can do, found out by a handful of tiny requests; nothing is taken on trust."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ets_engine.deadline import remaining_s
from ets_engine.remote.replicas import Replicas
from ets_engine.remote.server import AbandonedError, ServerError

COMPLETIONS = "/completions"
EXTRAS = {"include_stop_str_in_output": True, "no_stop_trim": True, "return_token_ids": True}
"""Fields of vLLM and SGLang beyond OpenAI's; each ignores those of the other."""

_PROMPT = "1 2 3 4 5 6 7"
_NOT_UNDERSTOOD = (400, 422)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Of one server and model.

    Attributes:
        extras: It takes `EXTRAS`, and so `top_k` and `min_p`.
        seed: It takes `seed`.
        choices: `n` gives that many choices.
        stop: What a choice says of the stop text that ended it: "told" names it, "kept" leaves it in the text, "silent"
            does neither, so that it looks like a solution's end.
        token_prompts: A prompt may be a list of token ids.
        token_ids: Choices come with their token ids.
        generation_config: Sampling is set by a `generation_config` in JSON, as `transformers serve` wants it, which
            otherwise samples as the checkpoint says: often not at all.
        context_tokens: Most tokens of prompt and completion, None = it does not say.
    """

    extras: bool
    seed: bool
    choices: bool
    stop: Literal["told", "kept", "silent"]
    token_prompts: bool
    token_ids: bool
    generation_config: bool
    context_tokens: int | None


def probe(replicas: Replicas, model: str) -> Capabilities:
    """Ask for a few short completions, at most 8 tokens each.

    Raises:
        ServerError: The server cannot be reached, does not know the model, or has no completions API.
        AbandonedError: The search that asks ended first.
    """
    plain: dict[str, Any] = {"model": model, "prompt": _PROMPT, "max_tokens": 8, "temperature": 0.0}
    sample: Mapping[str, Any] = {}
    first: dict[str, Any] | None = None
    for sample in ({**EXTRAS, "seed": 1}, {"seed": 1}, {}):
        first = _try(replicas, {**plain, **sample}, must=not sample)
        if first is not None:
            break
    assert first is not None
    extras, seed = "return_token_ids" in sample, "seed" in sample
    choice = choices_of(first)[0]
    asked = {**plain, **sample}
    many = _try(replicas, {**asked, "max_tokens": 1, "temperature": 1.0, "n": 2})
    ids = prompt_ids(first) or [1, 2, 3]
    by_ids = _try(replicas, {**asked, "prompt": ids, "max_tokens": 1})
    by_config = None
    if not extras:
        settings = json.dumps({"max_new_tokens": 1, "do_sample": False})
        by_config = _try(replicas, {"model": model, "prompt": _PROMPT, "generation_config": settings})
    return Capabilities(
        extras=extras,
        seed=seed,
        choices=many is not None and len(many.get("choices") or ()) == 2,
        stop=_probe_stop(replicas, asked, choice["text"]),
        token_prompts=by_ids is not None and usage_of(by_ids, "prompt_tokens") == len(ids),
        token_ids=isinstance(choice.get("token_ids"), list),
        generation_config=by_config is not None and usage_of(by_config, "completion_tokens") == 1,
        context_tokens=_context_tokens(replicas, model),
    )


def choices_of(reply: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The choices of a completion, in order.

    Raises:
        ServerError: There are none, or one has no text.
    """
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ServerError(f"the server's reply has no choices, only {sorted(reply)}")
    for choice in choices:
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise ServerError(f"a choice of the server's reply has no text: {choice!r:.100}")
    return sorted(choices, key=lambda choice: choice.get("index") or 0)


def usage_of(reply: Mapping[str, Any], name: str) -> int | None:
    """A count of the reply's usage, None where there is none."""
    usage = reply.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def stopped_by(choice: Mapping[str, Any]) -> object:
    """The stop text or token that a choice names, in vLLM's or SGLang's field."""
    return choice.get("stop_reason") if "stop_reason" in choice else choice.get("matched_stop")


def prompt_ids(reply: Mapping[str, Any]) -> list[int] | None:
    """The prompt's token ids, where the reply has them."""
    found = reply.get("prompt_token_ids") or choices_of(reply)[0].get("prompt_token_ids")
    return found if isinstance(found, list) and found else None


def _try(
    replicas: Replicas, body: Mapping[str, Any], *, must: bool = False, may_fail: bool = False
) -> dict[str, Any] | None:
    """The reply, None where the server does not understand the request, or where it may and does fail over it."""
    try:
        return replicas.post(COMPLETIONS, body, retries=1 if may_fail else None)
    except ServerError as error:
        understood = error.status not in _NOT_UNDERSTOOD and not (may_fail and error.status is not None)
        if must or understood:
            raise
        return None


def _probe_stop(replicas: Replicas, asked: Mapping[str, Any], text: str) -> Literal["told", "kept", "silent"]:
    """Greedy decoding writes the same text again, so a character of it as the stop text does stop it.

    `transformers serve` answers 500 to any stop text where it cannot search the vocabulary for it.
    """
    stop = next((sign for sign in text if not sign.isspace()), None)
    found = _try(replicas, {**asked, "stop": [stop]}, may_fail=True) if stop else None
    choice = choices_of(found)[0] if found is not None else {}
    if stop is None or choice.get("finish_reason") != "stop":
        return "silent"
    if stopped_by(choice) == stop:
        return "told"
    return "kept" if stop in choice["text"] else "silent"


def _context_tokens(replicas: Replicas, model: str) -> int | None:
    try:
        found = replicas.servers[0].get("/models", remaining_s()).json()
        cards = {card["id"]: card for card in found["data"]}
        context = cards[model].get("max_model_len")
    except (ServerError, ValueError, LookupError, TypeError, AttributeError) as error:
        if remaining_s() <= 0:
            raise AbandonedError("the search ended before the model's context was known") from error
        return None
    return context if isinstance(context, int) else None
