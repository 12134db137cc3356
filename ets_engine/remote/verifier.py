"""Verifiers behind servers: a PRM at a pooling endpoint, and a chat model that judges; both are `BatchScorer`s."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ets_engine.config import EngineConfig
from ets_engine.errors import ConfigError
from ets_engine.marks import read_mark
from ets_engine.remote.address import Address
from ets_engine.remote.replicas import Replicas, digest
from ets_engine.remote.server import AbandonedError, ServerError

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrmLayout:
    """The text that a PRM reads; it ends at the mark where the score of its last step is read.

    Attributes:
        before: What comes before the first step, with `{problem}`.
        separator: Ends every step.
    """

    before: str
    separator: str

    def text(self, problem: str, steps: Sequence[str]) -> str:
        r"""Text of a path.

        Example:
            >>> LAYOUTS["lines"].text("1+1?", ["It is 2.  ", "So 2."])
            '1+1?\nIt is 2.\nSo 2.\n'
        """
        return self.before.replace("{problem}", problem.strip()) + "".join(
            step.strip() + self.separator for step in steps
        )


LAYOUTS: Mapping[str, PrmLayout] = {
    "qwen": PrmLayout(
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n",
        "<extra_0>",
    ),
    "lines": PrmLayout("{problem}\n", "\n"),
}
r"""By name: "qwen" is Qwen2.5-Math-PRM's chat with `<extra_0>` marks; "lines" is a step a line.

"lines" is only for tokenizers that never join the separator to the text before it. Qwen's make one token of ".\n",
while Skywork's and TRL's PRMs of that family learned to score a newline token of its own: run such a one here instead.
"""

_CHUNK = 32  # paths of one request
_REFUSED = (400, 413, 422)  # what a server says of a path that is too long for it, among others


class PoolingVerifier:
    """A process reward model behind a pooling endpoint, vLLM's for instance; a `BatchScorer`.

    The text of a path ends at the mark of its last step, and all these models are causal, so the score is in the last
    row of what comes back, whether that has a row per token (`ALL` pooling), per mark (`STEP`) or one (`LAST`). Of two
    columns, the second is the class that says "right"; one column is a logit, or with `endpoint="classify"` a share.
    The whole path is sent for each new step. Whether the server reads the common part again is its own affair: vLLM
    skips its prefix cache for token-wise pooling unless it is told otherwise. vLLM refuses a whole request for one path
    that is too long, so what is refused is asked again in halves, and only that path has no score.

    Args:
        replicas: Of the PRM.
        model: Its name there.
        layout: A name in `LAYOUTS` or one of your own, None = the one that the model's name tells, as Qwen's do.
        endpoint: "pooling" is `/pooling` at the server's root, "classify" is `/classify` there.
        id: Names it in caches.

    Raises:
        ConfigError: The layout is not known.
    """

    def __init__(
        self,
        replicas: Replicas,
        model: str,
        *,
        layout: str | PrmLayout | None = None,
        endpoint: Literal["pooling", "classify"] = "pooling",
        id: str | None = None,
    ) -> None:
        """See the class."""
        if layout is None:
            layout = next((found for part, found in _LAYOUT_OF if part in model.lower()), "")
        if isinstance(layout, str) and layout not in LAYOUTS:
            raise ConfigError(
                f"what the PRM {model!r} reads is not known; pass verifier_format 'qwen' or 'trl', or to "
                f"PoolingVerifier(..., layout=) one of {', '.join(LAYOUTS)} or a PrmLayout"
            )
        self.id = id
        self._layout = LAYOUTS[layout] if isinstance(layout, str) else layout
        self._endpoint = endpoint
        self._replicas = replicas
        self._model = model
        self._log = _FirstOnly(f"the PRM {model!r}")

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> list[float]:
        """Probability that the last step of each path is right; NaN where the server gives no legible score."""
        texts = [self._layout.text(problem, path) for path in paths]
        chunks = [texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK)]

        def ask(chunk: list[str]) -> list[float]:
            body = {"model": self._model, "input": chunk}
            prefixes = digest("".join(chunk)), digest(problem)
            reply = self._replicas.post(f"^/{self._endpoint}", body, prefixes=prefixes, load=len(chunk))
            rows = reply.get("data")
            if not isinstance(rows, list) or len(rows) != len(chunk):
                found = len(rows) if isinstance(rows, list) else "no"
                raise ServerError(f"it gave {found} scores, {len(chunk)} were asked for")
            return [self._read(row) for row in rows]

        def score(chunk: list[str]) -> list[float]:
            try:
                return ask(chunk)
            except ServerError as error:
                if len(chunk) == 1 or error.status not in _REFUSED:
                    return self._log.dead(error, len(chunk))
            half = len(chunk) // 2
            return [*score(chunk[:half]), *score(chunk[half:])]

        return [one for scores in self._replicas.map(score, chunks) for one in scores]

    def close(self) -> None:
        """Close all connections."""
        self._replicas.close()

    def _read(self, row: Any) -> float:
        found = row.get("data", row.get("probs")) if isinstance(row, dict) else None
        while isinstance(found, list) and found and isinstance(found[-1], list):
            found = found[-1]
        if not isinstance(found, list) or not found or not all(_is_finite(one) for one in found):
            return self._log.dead(f"{row!r:.100} is no score", 1)[0]
        if len(found) == 1:
            value = float(found[0])
            if self._endpoint == "classify":
                return _checked(value, self._log)
            return 1 / (1 + math.exp(-value)) if value > -700 else 0.0
        if len(found) > 2:
            return self._log.dead(f"it gave {len(found)} classes, a PRM has 2", 1)[0]
        wrong, right = map(float, found)
        if min(wrong, right) >= 0 and math.isclose(wrong + right, 1.0, abs_tol=1e-3):
            return _checked(right, self._log)
        gap = wrong - right  # logits
        return 1 / (1 + math.exp(gap)) if gap < 700 else 0.0


_LAYOUT_OF = (("qwen2.5-math-prm", "qwen"), ("qwen2.5-math-7b-prm800k", "qwen"))


def find_layout(config: EngineConfig) -> PrmLayout | None:
    r"""The layout that settings name for a PRM behind a pooling endpoint; None = as the model's name tells.

    Raises:
        ConfigError: A setting that only a PRM loaded here would read.

    Example:
        >>> find_layout(EngineConfig(verifier_format="trl", step_separator="\n\n"))
        PrmLayout(before='{problem}\n\n', separator='\n\n')
    """
    kind, separator = config.verifier_format, config.step_separator
    if config.verifier_load_options:
        raise ConfigError(
            "verifier_load_options: the PRM behind pooling:openai:... was loaded by its server; leave it out"
        )
    if separator is not None and kind != "trl":
        raise ConfigError(f"step_separator={separator!r}: behind pooling:openai:... it goes with verifier_format='trl'")
    if kind == "auto":
        return None
    if kind == "trl":
        end = separator or "\n"
        return PrmLayout("{problem}" + end, end)
    if kind == "qwen":
        return LAYOUTS["qwen"]
    raise ConfigError(
        f"verifier_format={kind!r}: behind pooling:openai:... a PRM is of 'qwen' or 'trl'; load others here, by folder "
        "or hub name"
    )


_ASK = (
    "You judge the last step of an unfinished solution. Answer with one number from 0 to 10 and nothing else: 10 = all "
    "steps are right and lead towards the answer, 0 = something is wrong."
)


class JudgeVerifier:
    """A chat model that marks each step from 0 to 10; a `BatchScorer`. One call per new step, so take a cheap one.

    Args:
        replicas: Of the judge.
        model: Its name there.
        instruction: The system message; it asks for one number.
        scale: The best mark.
        max_tokens: Most tokens of a judgement; one that thinks first needs many.
        id: Names it in caches.

    Raises:
        ConfigError: `scale` or `max_tokens` is not positive.
    """

    def __init__(
        self,
        replicas: Replicas,
        model: str,
        *,
        instruction: str = _ASK,
        scale: float = 10.0,
        max_tokens: int = 512,
        id: str | None = None,
    ) -> None:
        """See the class."""
        if not scale > 0 or max_tokens < 1:
            raise ConfigError(f"need scale > 0 and max_tokens >= 1, got {scale=}, {max_tokens=}")
        self.id = id
        self._instruction = instruction
        self._scale = scale
        self._max_tokens = max_tokens
        self._replicas = replicas
        self._model = model
        self._log = _FirstOnly(f"the judge {model!r}")

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> list[float]:
        """Mark of each path's last step, in [0, 1]; NaN where the judge fails, is cut off, or says no number."""
        found = self._replicas.map(lambda path: self._judge(problem, path), paths)
        return [self._log.dead(one, 1)[0] if isinstance(one, ServerError) else one for one in found]

    def close(self) -> None:
        """Close all connections."""
        self._replicas.close()

    def _judge(self, problem: str, path: Sequence[str]) -> float:
        asked = f"Problem:\n{problem}\n\nSteps so far:\n{''.join(path)}\n\nScore of the last step:"
        body = {
            "model": self._model,
            "messages": [
                {"role": "system", "content": self._instruction},
                {"role": "user", "content": asked},
            ],
            "temperature": 0.0,
            "max_tokens": self._max_tokens,
        }
        reply = self._replicas.post("/chat/completions", body, prefixes=(digest(asked), digest(problem)))
        try:
            choice = reply["choices"][0]
            said, is_cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (LookupError, TypeError, AttributeError):
            said, is_cut = None, False
        if is_cut:  # a number in half a thought is no mark
            why = f"its reply was cut off after {self._max_tokens} tokens; raise JudgeVerifier(max_tokens=)"
            return self._log.dead(why, 1)[0]
        score = read_mark(said, self._scale) if isinstance(said, str) else None
        if score is None:
            return self._log.dead(f"{said!r:.100} holds no mark from 0 to {self._scale:g}", 1)[0]
        return score


class _FirstOnly:
    """Logs the first failure of a verifier; the branches of all of them end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_failed = False
        self._lock = threading.Lock()

    def dead(self, why: object, count: int) -> list[float]:
        has_failed = not isinstance(why, AbandonedError)
        with self._lock:
            is_first, self._has_failed = has_failed and not self._has_failed, has_failed or self._has_failed
        if is_first:
            _LOGGER.warning("%s failed: %s; such branches end", self._name, why)
        return [math.nan] * count


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _checked(score: float, log: _FirstOnly) -> float:
    """A score that may be off [0, 1] by rounding only."""
    if not -1e-3 <= score <= 1 + 1e-3:
        return log.dead(f"{score} is no score in [0, 1]", 1)[0]
    return min(1.0, max(0.0, score))


ServedVerifier = type[JudgeVerifier] | type[PoolingVerifier]
_KINDS: Mapping[str, ServedVerifier] = {"judge": JudgeVerifier, "pooling": PoolingVerifier}


def parse_verifier(text: str) -> tuple[ServedVerifier, Address] | None:
    """What `judge:openai:URL#model` and `pooling:openai:URL#model` name; None for another name.

    Raises:
        ConfigError: The address is none, or it is not said which of the two it is.
    """
    kind, _, where = text.partition(":")
    if kind == "openai":
        raise ConfigError(
            "verifier=openai:...: say what it is, judge:openai:... (a chat model) or pooling:openai:... (a PRM)"
        )
    return (_KINDS[kind], Address.parse(where)) if kind in _KINDS else None
