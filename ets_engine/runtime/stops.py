"""Where a step ends: strings in decoded text, end-of-text ids, token limits; it knows no model and no KV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
        openers: Strings that begin a step: where one follows content, the step ends before it. Its tokens stay where
            they were sampled, its text opens the next step's.
        is_over: Called after every token with the step's text so far, which has content; a step of which it says True
            ends there. It must be quick: all searches wait for it. Where it raises, the step has failed.

    Raises:
        ConfigError: an empty stop string, or no room for a token.
    """

    strings: tuple[str, ...] = ("\n\n",)
    eos_ids: frozenset[int] = field(default_factory=frozenset)
    max_step_tokens: int = 256
    final_strings: tuple[str, ...] = ()
    openers: tuple[str, ...] = ()
    is_over: Callable[[str], bool] | None = None

    def __post_init__(self) -> None:
        if not all(self.strings + self.final_strings + self.openers) or self.max_step_tokens < 1:
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
        self,
        rules: StopRules,
        recent: Sequence[int],
        tokens: Sequence[int],
        tokens_left: int,
        num_written: int = 0,
        carry: str = "",
    ) -> StopReason | None:
        """Why a step ends with its newest token, None = it goes on.

        Args:
            rules: Of this branch.
            recent: Last tokens before the step.
            tokens: Tokens of the step, the newest last; not stopped before.
            tokens_left: Most tokens the step may have for trajectory and context, >= 1.
            num_written: How many tokens before the step are no prompt (count); there may be more than in `recent`.
            carry: What the tokens before the step say of it already; see `split`.
        """
        if tokens[-1] in rules.eos_ids:
            return StopReason.FINISHED
        may_finish = rules.final_strings and self._may_close(rules.final_strings, tokens[-1])
        if may_finish and self.cut(rules, recent, tokens, num_written, carry) is not None:
            return StopReason.FINISHED
        try:
            if self._is_over(rules, recent, tokens, carry):
                return StopReason.BOUNDARY
        except Exception:  # whatever a function of the user's raises
            return StopReason.ERROR
        if len(tokens) >= tokens_left:
            return StopReason.LENGTH
        return StopReason.BOUNDARY if len(tokens) >= rules.max_step_tokens else None

    def _is_over(self, rules: StopRules, recent: Sequence[int], tokens: Sequence[int], carry: str) -> bool:
        """Whether the newest token completes a boundary; blank lines alone are no step."""
        may_end = bool(rules.strings) and self._may_close(rules.strings, tokens[-1])
        may_open = bool(rules.openers) and self._may_close(rules.openers, tokens[-1])
        if not (may_end or may_open or rules.is_over):
            return False
        text = carry + self.text(recent, tokens)
        written = text.lstrip()
        return bool(
            (may_end and any(stop in written for stop in rules.strings))
            or (may_open and _opening(rules.openers, text) is not None)
            or (rules.is_over and written and rules.is_over(text))
        )

    def split(self, rules: StopRules, recent: Sequence[int], tokens: Sequence[int], carry: str = "") -> tuple[str, str]:
        """Text of a step that ends at a boundary, and the text that its tokens carry over to the next step.

        Args:
            rules: Of this branch.
            recent: Last tokens before the step.
            tokens: Tokens of the step.
            carry: Text that the tokens before the step carry over to it.
        """
        text = carry + self.text(recent, tokens)
        place = _opening(rules.openers, text)
        return (text, "") if place is None else (text[:place], text[place:])

    def cut(
        self, rules: StopRules, recent: Sequence[int], tokens: Sequence[int], num_written: int = 0, carry: str = ""
    ) -> str | None:
        """Text of the step before the first final string, None when `tokens` complete none; as in `reason`."""
        if not rules.final_strings:
            return None
        prompt = max(0, len(recent) - num_written)
        before, text = self.text(recent[:prompt], recent[prompt:]), self.text(recent, tokens)
        before = max(before, carry, key=len)  # both end where the step's tokens begin
        ends: list[int] = []
        for stop in rules.final_strings:
            above = before[max(0, len(before) - len(stop) + 1) :]
            place = (above + text).find(stop)  # it may have begun above, but not ended there
            if place >= 0:
                ends.append(max(0, place - len(above) + len(carry)))
        return (carry + text)[: min(ends)] if ends else None

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


def _opening(openers: tuple[str, ...], text: str) -> int | None:
    """Where the next step begins in a text, None when it does not: at the first opener after content of this step."""
    start = len(text) - len(text.lstrip())
    start += max((len(opener) for opener in openers if text.startswith(opener, start)), default=1)  # this step's own
    return min((place for opener in openers if (place := text.find(opener, start)) >= 0), default=None)
