"""Reads DSPy's prompt markup: which fields an answer must have, and texts without markers for verifiers and votes."""

from __future__ import annotations

import contextvars
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import unescape

from ets_engine.answers import same_answer
from ets_engine.messages import Message, problem_text
from ets_engine.protocols import StepView
from ets_engine.scorers import BatchScorer, Scorer

StepReader = Callable[[str], str]
"""What a verifier reads of a step's text."""

COMPLETED = "[[ ## completed ## ]]"
"""Ends an answer in `dspy.ChatAdapter`'s markup."""

_MARKER = re.compile(r"\[\[ ## (\w+) ## \]\][ \t]*\n?")
_ASKS_CHAT = re.compile(r"^Respond with the corresponding output fields, starting with the field .*$", re.MULTILINE)
_ASKS_JSON = re.compile(r"^Respond with a JSON object in the following order of fields: .*$", re.MULTILINE)
_ASKS_XML = re.compile(r"^Respond with the corresponding output fields wrapped in XML tags `<.*$", re.MULTILINE)
_TAG = re.compile(r"`<(\w+)>`")
_ELEMENT = re.compile(r"^<(\w+)>\n(.*?)\n</\1>$", re.MULTILINE | re.DOTALL)
_QUOTED = re.compile(r"`(\w+)`")
_ALLOWS_NULL = re.compile(
    r"` \(must be formatted as a valid Python (?:(?:Union|Optional|Literal)\[[^`]*\bNone(?:Type)?\b|Any)[^`]*$"
)
_CHOICE = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""")  # a text among those of a Literal
_DIGIT = re.compile(r"\d")
_LONGEST_VALUE = 60  # characters of what may be a number or a formula


class FieldView:
    r"""`StepView` of answers in `dspy.ChatAdapter`'s markup: all fields must be there, the last one is the answer.

    Example:
        >>> view = FieldView(("reasoning", "answer"))
        >>> view.answer("1+1?", "[[ ## reasoning ## ]]\n1 and 1.\n\n[[ ## answer ## ]]\n2")
        '2'
        >>> view.answer("1+1?", "It is 2.") is None
        True
    """

    def __init__(self, fields: Sequence[str]) -> None:
        """See the class."""
        self._fields = tuple(fields)

    def answer(self, problem: str, text: str) -> str | None:
        """The last field's text, None where a field is missing."""
        found = split_fields(text)
        if any(field not in found for field in self._fields):
            return None
        return found[self._fields[-1]] or None

    def same(self, left: str, right: str) -> bool:
        """See `same_value`."""
        return same_value(left, right)


class JSONView:
    """`StepView` of answers that are one JSON object: all fields must be there, the last one is the answer.

    Args:
        fields: The fields.
        may_be_null: Whether null is an answer.
    """

    def __init__(self, fields: Sequence[str], may_be_null: bool = False) -> None:
        """See the class."""
        self._fields = tuple(fields)
        self._may_be_null = may_be_null

    def answer(self, problem: str, text: str) -> str | None:
        """The last field as text, None where the text is no such object."""
        begin, end = text.find("{"), text.rfind("}")
        try:
            found = json.loads(text[begin : end + 1]) if begin >= 0 else None
        except ValueError:
            return None
        if not isinstance(found, dict) or any(field not in found for field in self._fields):
            return None
        value = found[self._fields[-1]]
        return None if value is None and not self._may_be_null else to_answer(value)

    def same(self, left: str, right: str) -> bool:
        """See `same_value`."""
        return same_value(left, right)


class XMLView:
    r"""`StepView` of answers that are XML elements: all fields must be there, the last one is the answer.

    Args:
        fields: The fields.
        may_be_empty: Whether an element without content is an answer, as it is for a list. Where one stands for None,
            the request does not say so, and it does not vote.

    Example:
        >>> view = XMLView(("reasoning", "answer"))
        >>> view.answer("1+1?", "<reasoning>1 and 1.</reasoning>\n\n<answer>\n2\n</answer>")
        '2'
        >>> view.answer("1+1?", "<answer>2</answer>") is None
        True
    """

    def __init__(self, fields: Sequence[str], may_be_empty: bool = False) -> None:
        """See the class."""
        self._fields = tuple(fields)
        self._may_be_empty = may_be_empty

    def answer(self, problem: str, text: str) -> str | None:
        """The last field as text, None where a field is missing or the text is no XML."""
        try:
            found = {element.tag: element for element in ElementTree.fromstring(f"<fields>{text}</fields>")}
        except (ElementTree.ParseError, ValueError):
            return None
        if any(field not in found for field in self._fields):
            return None
        content = _content(found[self._fields[-1]])
        return to_answer(content or ([] if self._may_be_empty else ""))

    def same(self, left: str, right: str) -> bool:
        """See `same_value`."""
        return same_value(left, right)


class ParsedView:
    """`StepView` that takes what an adapter can parse for an answer, and nothing else.

    Args:
        parse: Gives the output fields of a text, and raises where it has none; it must ask no model.
        same: Whether two answers count as one vote, None = what `parse` made of them is equal.

    Example:
        >>> view = ParsedView(lambda text: {"answer": int(text)})
        >>> view.answer("1+1?", " 2"), view.answer("1+1?", "two")
        ('2', None)
    """

    def __init__(
        self, parse: Callable[[str], Mapping[str, Any]], same: Callable[[str, str], bool] | None = None
    ) -> None:
        """See the class."""
        self._parse = parse
        self._same = same
        self._context = contextvars.copy_context()  # an engine's thread has no settings of DSPy's

    def answer(self, problem: str, text: str) -> str | None:
        """The last output field as text, None where the text does not parse."""
        try:
            fields = self._context.copy().run(self._parse, text)
        except Exception:  # whatever a field's type raises; the caller parses again and sees it
            return None
        return to_answer(list(fields.values())[-1]) if fields else None

    def same(self, left: str, right: str) -> bool:
        """Whether two answers count as one vote."""
        return left == right or (self._same is not None and self._same(left, right))


class PlainScorer:
    """A `BatchScorer` that shows another one problem and steps without markup.

    Args:
        scorer: The verifier; a step of which nothing but markup is there shows it the steps before.
        problem: What it reads as the problem.
        read_step: What it reads of a step.
    """

    def __init__(self, scorer: BatchScorer, problem: str, read_step: StepReader) -> None:
        """See the class."""
        self._scorer = scorer
        self._problem = problem
        self._read_step = read_step

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> Sequence[float]:
        """One score per path (`BatchScorer`)."""
        return self._scorer.score_many(self._problem, [_shown(path, self._read_step) for path in paths])


def plain_scorer(scorer: Scorer, problem: str, read_step: StepReader) -> Scorer:
    """A verifier that reads problem and steps without markup, of the same kind: paths of a function fail one by one."""
    if isinstance(scorer, BatchScorer):
        return PlainScorer(scorer, problem, read_step)
    return lambda _, steps: scorer(problem, _shown(steps, read_step))


def infer_view(messages: Sequence[Message]) -> StepView | None:
    r"""What an answer to these messages must look like, None where they do not say.

    Example:
        >>> asked = "Respond with the corresponding output fields, starting with the field `[[ ## answer ## ]]`."
        >>> infer_view([{"role": "user", "content": asked}]).answer("", "[[ ## answer ## ]]\n4")
        '4'
    """
    asked = _last_user(messages)
    if found := _ASKS_CHAT.search(asked):
        fields = [name for name in _MARKER.findall(found[0]) if name != "completed"]
        return FieldView(fields) if fields else None
    if found := _ASKS_JSON.search(asked):
        fields = _QUOTED.findall(found[0])
        return JSONView(fields, _ALLOWS_NULL.search(_CHOICE.sub("", found[0])) is not None) if fields else None
    if found := _ASKS_XML.search(asked):
        fields = _TAG.findall(found[0])
        return XMLView(fields, f"<{fields[-1]}><item>" in found[0]) if fields else None
    return None


def step_reader(messages: Sequence[Message]) -> StepReader | None:
    r"""What verifiers are to read of a step of an answer to these messages, None = all of it.

    Example:
        >>> asked = "Respond with the corresponding output fields wrapped in XML tags `<reasoning>`, then `<answer>`."
        >>> step_reader([{"role": "user", "content": asked}])("<reasoning>\n1 &lt; 2.\n</reasoning>\n\n<answer>")
        '1 < 2.\n\n'
    """
    if found := _ASKS_XML.search(_last_user(messages)):
        tags = re.compile(rf"</?(?:{'|'.join(_TAG.findall(found[0]))})\s*/?>[ \t]*\n?")
        return lambda text: unescape(tags.sub("", text))
    return plain_step if is_marked(messages) else None


def is_marked(messages: Sequence[Message]) -> bool:
    """Whether these messages ask for an answer in `dspy.ChatAdapter`'s markup."""
    return _ASKS_CHAT.search(_last_user(messages)) is not None


def plain_problem(messages: Sequence[Message]) -> str:
    r"""The question without markers and without the request for a format: the last turn's where there is markup.

    Example:
        >>> plain_problem([{"role": "user", "content": "[[ ## question ## ]]\n1+1?"}])
        '1+1?'
        >>> plain_problem([{"role": "user", "content": "[[ ## a ## ]]\n1\n\n[[ ## b ## ]]\n2"}])
        'a: 1\n\nb: 2'
    """
    asked = _last_user(messages)
    if found := _ASKS_XML.search(asked):
        fields = dict(_ELEMENT.findall(asked[: found.start()]))
    else:
        fields = split_fields(_ASKS_JSON.sub("", _ASKS_CHAT.sub("", asked)))
    if not fields:
        return problem_text(messages)
    return next(iter(fields.values())) if len(fields) == 1 else "\n\n".join(f"{k}: {v}" for k, v in fields.items())


def plain_steps(steps: Sequence[str], read_step: StepReader) -> list[str]:
    r"""The steps without markup; one of which nothing is left is gone.

    Example:
        >>> plain_steps(["[[ ## reasoning ## ]]\n", "1 and 1.\n\n", "[[ ## answer ## ]]\n2"], plain_step)
        ['1 and 1.\n\n', '2']
    """
    plain = map(read_step, steps)
    return [step for step in plain if step.strip()]


def plain_step(text: str) -> str:
    r"""A step without markers.

    Example:
        >>> plain_step("[[ ## answer ## ]]\n2")
        '2'
    """
    return _MARKER.sub("", text)


def split_fields(text: str) -> dict[str, str]:
    """The fields of a text in `dspy.ChatAdapter`'s markup, as they first appear."""
    pieces = _MARKER.split(text)[1:]
    fields: dict[str, str] = {}
    for name, value in zip(pieces[::2], pieces[1::2], strict=True):
        fields.setdefault(name, value.strip())
    fields.pop("completed", None)
    return fields


def same_value(left: str, right: str) -> bool:
    """Whether two answers in words or formulas are one vote; prose is compared as text, which takes no time.

    Example:
        >>> same_value("Paris", " paris"), same_value("1,000", "1000.0"), same_value("no 1 knows", "no 2 knows")
        (True, True, False)
    """
    if " ".join(left.split()).casefold() == " ".join(right.split()).casefold():
        return True
    are_values = all(len(one) <= _LONGEST_VALUE and _DIGIT.search(one) for one in (left, right))
    return are_values and same_answer(left, right)


def to_answer(value: Any) -> str | None:
    """A field's value as the text that votes compare: equal values give the same, a text without a word gives None.

    Example:
        >>> to_answer({"b": {3, 1}, "a": None}), to_answer(None), to_answer(" ")
        ('{"a": null, "b": [1, 3]}', 'null', None)
    """
    if isinstance(value, str):
        return value.strip() or None
    return _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(_ordered(value), sort_keys=True, default=str)


def _ordered(value: Any) -> Any:
    """A value whose JSON does not depend on the order of sets, with text for keys."""
    if hasattr(value, "model_dump"):
        return _ordered(value.model_dump())
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else _dump(key): _ordered(one) for key, one in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_ordered, value), key=_dump)
    return [_ordered(one) for one in value] if isinstance(value, list | tuple) else value


def _content(element: ElementTree.Element) -> Any:
    """What is in an element: its text, tags within it included, or the elements in it by name, in their order."""
    texts = [element.text, *(one.tail for one in element)]
    if any(text and text.strip() for text in texts):
        return "".join([element.text or "", *(ElementTree.tostring(one, "unicode") for one in element)]).strip()
    return [[one.get("key", one.tag), _content(one)] for one in element] or ""


def _shown(steps: Sequence[str], read_step: StepReader) -> list[str]:
    """What a verifier reads of a path: one step at least."""
    return plain_steps(steps, read_step) or [""]


def _last_user(messages: Sequence[Message]) -> str:
    said = next((message.get("content") or "" for message in reversed(messages) if message["role"] == "user"), "")
    return said if isinstance(said, str) else "\n".join(part.get("text") or "" for part in said)
