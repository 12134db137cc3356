"""What is known of a served model: what its server can do, how prompts are written, and how long a call takes."""

from __future__ import annotations

from typing import Literal

from ets_engine.types import Value


class ServerDescription(Value):
    """A policy behind servers, as `RemoteEngine.describe` finds it.

    Attributes:
        name: The model's name there.
        urls: Of its replicas, in order.
        context_tokens: Most tokens of prompt and completion, None = the server does not say.
        prompts: How a problem becomes a prompt.
        preset: Of the model's family, None = nothing is known of it.
        boundaries: Texts that end a step.
        token_prompts: A prompt may be a list of token ids.
        token_ids: Choices come with their token ids.
        choices: `n` gives that many choices.
        seed: It takes `seed`.
        cuts: It takes `top_k` and `min_p`.
        stop: What a choice says of the stop text that ended it: "told" names it, "kept" leaves it in the text, "silent"
            does neither, so that steps are cut here.
        metrics: By replica, whether it has prefix-cache figures.
        call_s: Median of a few calls for one token, after the first ones (seconds).
        verifier_name: What scores steps, None = nothing but what a search brings.
        embedder: What says how differently steps reason.
    """

    name: str
    urls: tuple[str, ...]
    context_tokens: int | None
    prompts: str
    preset: str | None
    boundaries: tuple[str, ...]
    token_prompts: bool
    token_ids: bool
    choices: bool
    seed: bool
    cuts: bool
    stop: Literal["told", "kept", "silent"]
    metrics: dict[str, bool]
    call_s: float
    verifier_name: str | None
    embedder: str
