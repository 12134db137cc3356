"""Where a step ends: stop strings on decoded text, end-of-text ids, token limits; it knows no model and no KV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ets_engine.errors import ConfigError
from ets_engine.types import StopReason

CONTEXT_TOKENS = 8  # earlier tokens decoded along, so that a step's first token keeps its leading space
_KNOWN_RULES = 64  # sets of stop strings, of which callers may bring ever new ones, whose tokens are remembered
_CHARACTER_TOKENS = 4  # a character has at most 4 bytes, so an incomplete one at most 3 tokens
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character decode to


class Detokenizer(Protocol):
    """The part of a transformers tokenizer that is needed here."""

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
        final_strings: One of these finishes the trajectory. It may have begun in what was written before the step, at
            most `CONTEXT_TOKENS` tokens above, where the beginning stays; it never begins in the prompt.

    Raises:
        ConfigError: an empty stop string, or no room for a token.
    """

    strings: tuple[str, ...] = ("\n\n",)
    eos_ids: frozenset[int] = field(default_factory=frozenset)
    max_step_tokens: int = 256
    final_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(self.strings + self.final_strings) or self.max_step_tokens < 1:
            raise ConfigError(f"{self}: stop strings must not be empty and max_step_tokens must be >= 1")


class StopFinder:
    """Applies `StopRules` to growing token lists, decoding only when the newest token could complete a stop string.

    Args:
        tokenizer: Decodes.
    """

    def __init__(self, tokenizer: Detokenizer) -> None:
        self._tokenizer = tokenizer
        self._closing: dict[tuple[str, ...], dict[int, bool]] = {}  # by stop strings: what is known of each token

    def text(self, recent: Sequence[int], tokens: Sequence[int]) -> str:
        """Text that `tokens` add after the tokens `recent`, special tokens left out.

        A character of several bytes belongs to the tokens that complete it.
        """
        first, before = self._complete(recent, range(_CHARACTER_TOKENS))
        _, both = self._complete([*recent[first:], *tokens], [0])
        if both.startswith(before):
            return both[len(before) :]
        return self._decode(tokens)  # this tokenizer's text changes backwards

    def _complete(self, tokens: Sequence[int], starts: Iterable[int]) -> tuple[int, str]:
        """The first start from which the text has no incomplete character at either end, and that text."""
        for first in starts:
            for left_out in range(min(_CHARACTER_TOKENS, len(tokens) - first + 1)):
                text = self._decode(tokens[first : len(tokens) - left_out])
                if not text.endswith(_INCOMPLETE) and not (first and text.startswith(_INCOMPLETE)):
                    return first, text
        return 0, self._decode(tokens)  # not incomplete but wrong: the model wrote bytes that are no text

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def reason(
        self, rules: StopRules, recent: Sequence[int], tokens: Sequence[int], tokens_left: int, num_written: int = 0
    ) -> StopReason | None:
        """Why a step ends with its newest token, None = it goes on.

        Args:
            rules: Of this branch.
            recent: Last tokens before the step.
            tokens: Tokens of the step, the newest last; not stopped before.
            tokens_left: Most tokens the step may have for trajectory and context, >= 1.
            num_written: How many tokens before the step are no prompt (count); there may be more than in `recent`.
        """
        if tokens[-1] in rules.eos_ids:
            return StopReason.FINISHED
        may_finish = rules.final_strings and self._may_close(rules.final_strings, tokens[-1])
        if may_finish and self.cut(rules, recent, tokens, num_written) is not None:
            return StopReason.FINISHED
        if rules.strings and self._may_close(rules.strings, tokens[-1]):
            text = self.text(recent, tokens).lstrip()  # blank lines alone are no step
            if any(stop in text for stop in rules.strings):
                return StopReason.BOUNDARY
        if len(tokens) >= tokens_left:
            return StopReason.LENGTH
        return StopReason.BOUNDARY if len(tokens) >= rules.max_step_tokens else None

    def cut(self, rules: StopRules, recent: Sequence[int], tokens: Sequence[int], num_written: int = 0) -> str | None:
        """Text that `tokens` add before the first final string, None when they complete none; as in `reason`."""
        if not rules.final_strings:
            return None
        prompt = max(0, len(recent) - num_written)
        before, text = self.text(recent[:prompt], recent[prompt:]), self.text(recent, tokens)
        ends: list[int] = []
        for stop in rules.final_strings:
            above = before[len(before) - len(stop) + 1 :] if len(before) >= len(stop) else before
            place = (above + text).find(stop)  # it may have begun above, but not ended there
            if place >= 0:
                ends.append(max(0, place - len(above)))
        return text[: min(ends)] if ends else None

    def _may_close(self, strings: tuple[str, ...], token: int) -> bool:
        """Whether a token may hold the last character of a stop string, or complete one of several bytes."""
        if len(self._closing) >= _KNOWN_RULES and strings not in self._closing:
            self._closing.clear()
        known = self._closing.setdefault(strings, {})
        found = known.get(token)
        if found is None:
            piece = self._tokenizer.decode([token])
            last = {stop[-1] for stop in strings}
            # a token may have text, a space at its start or the end of a character that it does not show alone
            found = not piece or " " in last or not last.isdisjoint(piece)
            found = found or (_INCOMPLETE in piece and any(ord(character) > 127 for character in last))
            known[token] = found
        return found
