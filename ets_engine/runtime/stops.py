"""Where a step ends: strings in decoded text, end-of-text ids, token limits; it knows no model and no KV."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
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
    """Applies `StopRules` to growing token lists.

    `reason` decodes and looks; it is exact and slow. `may_end` first asks what is known of the tokens alone, in a
    microsecond, whether there can be anything to see. It relies on this: but for spaces, a text is the texts of its
    tokens one after the other, where no token holds a part of a character.

    Args:
        tokenizer: Decodes.

    Example:
        if finder.may_end(rules, recent, tokens, token, tokens_left):
            reason = finder.reason(rules, recent, [*tokens, token], tokens_left)
    """

    def __init__(self, tokenizer: Detokenizer) -> None:
        self._tokenizer = tokenizer
        self._letters = _Letters(self._decode)
        self._closing: dict[tuple[tuple[str, ...], ...], _Closing] = {}  # by stop strings
        self._quiet: dict[Hashable, _Quiet] = {}  # by stop strings and ends of text

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

    def may_end(
        self,
        rules: StopRules,
        recent: Sequence[int],
        tokens: Sequence[int],
        token: int,
        tokens_left: int,
        carry: str = "",
    ) -> bool:
        """Whether a step may end with its newest token; where False, `reason` is None.

        Args:
            rules: Of this branch.
            recent: Last tokens before the step.
            tokens: Tokens of the step before the newest; it goes on after each of them.
            token: The newest.
            tokens_left: As in `reason`.
            carry: As in `reason`.
        """
        if rules.is_over or token in rules.eos_ids or len(tokens) + 1 >= min(tokens_left, rules.max_step_tokens):
            return True
        if carry and not tokens:
            return True  # the carry itself may hold a stop string
        closing = self._closing_of(rules)
        if not closing.stops:
            return False
        before = tokens[-1] if tokens else recent[-1] if recent else token
        if self._letters[before] is None and self._withholds(closing, recent, tokens):
            return True
        return closing[token] and self._closes(closing, recent, tokens, token, carry)

    def quiet_tokens(self, rules: StopRules) -> Mapping[int, bool] | None:
        """Tokens of which one right after another, both of the same step, ends it by nothing but its length.

        Returns:
            By token id, found out when it is asked for; None where any token may end a step.
        """
        if rules.is_over:
            return None
        key = rules.strings, rules.final_strings, rules.openers, rules.eos_ids
        known = self._quiet.get(key)
        if known is None:
            if len(self._quiet) >= _KNOWN_RULES:
                self._quiet.clear()
            known = self._quiet[key] = _Quiet(self._letters, self._closing_of(rules), rules.eos_ids)
        return known

    def _closing_of(self, rules: StopRules) -> _Closing:
        """What is known of tokens under these rules."""
        key = rules.strings, rules.final_strings, rules.openers
        known = self._closing.get(key)
        if known is None:
            if len(self._closing) >= _KNOWN_RULES:
                self._closing.clear()
            known = self._closing[key] = _Closing(self._letters, rules.strings + rules.final_strings + rules.openers)
        return known

    def _withholds(self, closing: _Closing, recent: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether the last tokens may hold the end of a stop string that is not seen until a character is complete."""
        last = (*recent, *tokens[1 - _CHARACTER_TOKENS :])[1 - _CHARACTER_TOKENS :]
        return any(self._letters[one] is None and closing[one] for one in last)

    def _closes(self, closing: _Closing, recent: Sequence[int], tokens: Sequence[int], token: int, carry: str) -> bool:
        """Whether a token that may end a stop string does so, going by the letters of the tokens before it."""
        tail = self._letters[token]
        if tail is None:
            return True
        enough = len(tail) + closing.longest
        for one in reversed(tokens) if carry else chain(reversed(tokens), reversed(recent)):
            if len(tail) >= enough:
                break
            above = self._letters[one]
            if above is None:
                return True
            tail = above + tail
        if carry and len(tail) < enough:
            return True
        return any(stop in tail for stop in closing.stops)

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
        if rules.strings or rules.final_strings or rules.openers or rules.is_over:
            text = self.text(recent, tokens)
            if self._cut(rules, recent, text, num_written, carry) is not None:
                return StopReason.FINISHED
            try:
                if _is_over(rules, carry + text):
                    return StopReason.BOUNDARY
            except Exception:  # whatever a function of the user's raises
                return StopReason.ERROR
        if len(tokens) >= tokens_left:
            return StopReason.LENGTH
        return StopReason.BOUNDARY if len(tokens) >= rules.max_step_tokens else None

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
        return self._cut(rules, recent, self.text(recent, tokens), num_written, carry)

    def _cut(self, rules: StopRules, recent: Sequence[int], text: str, num_written: int, carry: str) -> str | None:
        """`cut` where the text of the step's tokens is known."""
        if not rules.final_strings:
            return None
        prompt = max(0, len(recent) - num_written)
        before = max(self.text(recent[:prompt], recent[prompt:]), carry, key=len)  # both end where the tokens begin
        ends: list[int] = []
        for stop in rules.final_strings:
            above = before[max(0, len(before) - len(stop) + 1) :]
            place = (above + text).find(stop)  # it may have begun above, but not ended there
            if place >= 0:
                ends.append(max(0, place - len(above) + len(carry)))
        return (carry + text)[: min(ends)] if ends else None


class _Letters(dict[int, str | None]):
    """Text of each token without its spaces, which depend on its neighbours; None = other characters do so too."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        super().__init__()
        self.decode = decode

    def __missing__(self, token: int) -> str | None:
        alone, twice = (_without_spaces(self.decode(tokens)) for tokens in ([token], [token, token]))
        self[token] = None if _INCOMPLETE in alone or twice != alone + alone else alone
        return self[token]


class _Closing(dict[int, bool]):
    """Whether a token may hold the last character of one of some stop strings; False is certain.

    Attributes:
        letters: Of the tokens.
        stops: The strings without their spaces; "" for one of which nothing is known, as it may be anywhere.
        longest: Of those (characters).
    """

    def __init__(self, letters: _Letters, stops: Sequence[str]) -> None:
        super().__init__()
        self.letters = letters
        self.stops = tuple("" if _INCOMPLETE in stop else _without_spaces(stop) for stop in stops)
        self.longest = max(map(len, self.stops), default=0)
        self._any_token = "" in self.stops or any(stop.endswith(" ") for stop in stops)
        self._tails = tuple({stop[start:] for stop in self.stops for start in range(1, len(stop))})
        self._last = {stop[-1] for stop in stops}

    def __missing__(self, token: int) -> bool:
        self[token] = self._any_token or self._may_close(token)
        return self[token]

    def _may_close(self, token: int) -> bool:
        text = self.letters[token]
        if text is not None:
            return text.startswith(self._tails) or any(stop in text for stop in self.stops)
        alone = self.letters.decode([token])
        return _INCOMPLETE not in alone or any(last in alone or ord(last) > 127 for last in self._last)


class _Quiet(dict[int, bool]):
    """See `StopFinder.quiet_tokens`; the tokens asked for so far."""

    def __init__(self, letters: _Letters, closing: _Closing, eos_ids: Collection[int]) -> None:
        super().__init__()
        self._letters, self._closing, self._eos_ids = letters, closing, eos_ids

    def __missing__(self, token: int) -> bool:
        closes = bool(self._closing.stops) and (self._letters[token] is None or self._closing[token])
        self[token] = token not in self._eos_ids and not closes
        return self[token]


def _without_spaces(text: str) -> str:
    return text.replace(" ", "")


def _is_over(rules: StopRules, text: str) -> bool:
    """Whether a step of this text is over; blank lines alone are no step."""
    written = text.lstrip()
    return bool(
        any(stop in written for stop in rules.strings)
        or _opening(rules.openers, text) is not None
        or (rules.is_over and written and rules.is_over(text))
    )


def _opening(openers: tuple[str, ...], text: str) -> int | None:
    """Where the next step begins in a text, None when it does not: at the first opener after content of this step."""
    start = len(text) - len(text.lstrip())
    start += max((len(opener) for opener in openers if text.startswith(opener, start)), default=1)  # this step's own
    return min((place for opener in openers if (place := text.find(opener, start)) >= 0), default=None)
