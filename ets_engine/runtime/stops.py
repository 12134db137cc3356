"""Where a step ends: stop strings on decoded text, end-of-text ids, token limits; it knows no model and no KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ets_engine.errors import ConfigError
from ets_engine.types import StopReason

CONTEXT_TOKENS = 8  # earlier tokens decoded along, so that a step's first token keeps its leading space


class Detokenizer(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def __len__(self) -> int: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of the tokens."""
        ...


@dataclass(frozen=True, slots=True)
class StopRules:
    """When a step is over.

    Attributes:
        strings: A step whose text has content and then one of these ends there; it may straddle tokens.
        eos_ids: Tokens that finish the trajectory; they are no part of its text.
        max_step_tokens: A longer step ends at a boundary, >= 1.

    Raises:
        ConfigError: an empty stop string, or no room for a token.
    """

    strings: tuple[str, ...] = ("\n\n",)
    eos_ids: frozenset[int] = field(default_factory=frozenset)
    max_step_tokens: int = 256

    def __post_init__(self) -> None:
        if not all(self.strings) or self.max_step_tokens < 1:
            raise ConfigError(f"{self}: stop strings must not be empty and max_step_tokens must be >= 1")


class StopFinder:
    """Applies `StopRules` to growing token lists, decoding only when the newest token could complete a stop string.

    Args:
        tokenizer: Decodes; its vocabulary is read once per set of last characters.
    """

    def __init__(self, tokenizer: Detokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: list[str] | None = None
        self._closers: dict[tuple[str, ...], frozenset[int]] = {}

    def text(self, recent: Sequence[int], tokens: Sequence[int]) -> str:
        """Text that `tokens` add after the tokens `recent`, special tokens left out."""
        before = self._tokenizer.decode(list(recent), skip_special_tokens=True)
        both = self._tokenizer.decode([*recent, *tokens], skip_special_tokens=True)
        if both.startswith(before):
            return both[len(before) :]
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)  # `recent` ends inside a character

    def reason(
        self, rules: StopRules, recent: Sequence[int], tokens: Sequence[int], tokens_left: int
    ) -> StopReason | None:
        """Why a step ends with its newest token, None = it goes on.

        Args:
            rules: Of this branch.
            recent: Last tokens before the step.
            tokens: Tokens of the step, the newest last; not stopped before.
            tokens_left: Most tokens the step may have for trajectory and context, >= 1.
        """
        if tokens[-1] in rules.eos_ids:
            return StopReason.FINISHED
        if tokens[-1] in self._closing(rules.strings):
            text = self.text(recent, tokens).lstrip()  # blank lines alone are no step
            if any(stop in text for stop in rules.strings):
                return StopReason.BOUNDARY
        if len(tokens) >= tokens_left:
            return StopReason.LENGTH
        return StopReason.BOUNDARY if len(tokens) >= rules.max_step_tokens else None

    def _closing(self, strings: tuple[str, ...]) -> frozenset[int]:
        """Ids of tokens that contain the last character of a stop string, or a part of a character."""
        if not strings:
            return frozenset()
        found = self._closers.get(strings)
        if found is None:
            if self._pieces is None:
                self._pieces = [self._tokenizer.decode([token]) for token in range(len(self._tokenizer))]
            last = {stop[-1] for stop in strings}
            if any(ord(character) > 127 for character in last):
                last.add("\N{REPLACEMENT CHARACTER}")  # a byte token may complete a character of several bytes
            found = frozenset(
                token
                for token, piece in enumerate(self._pieces)
                if not piece or not last.isdisjoint(piece)  # a piece without text alone may have some in context
            )
            self._closers[strings] = found
        return found
