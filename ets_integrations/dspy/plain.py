"""A `dspy.Adapter` without markup, for models that follow no instructions and read one question, like the shipped."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import dspy
from dspy.adapters.utils import parse_value
from dspy.utils.exceptions import AdapterParseError

from ets_engine.answers import MathView, ReferenceView
from ets_engine.errors import ReferenceDomainError
from ets_engine.protocols import StepView
from ets_integrations.settings import verifier_name

_PROBLEM: ContextVar[str] = ContextVar("ets_dspy_problem", default="")  # what this context formatted last


class PlainAdapter(dspy.Adapter):
    """Renders one input field's value as the prompt, and reads the answer from the solution that comes back.

    The last output field is the answer; any other one is the whole solution. Instructions are not rendered, and demos
    are earlier turns, which a model without a chat template does not read.

    Args:
        field: The input field that is the question, None = the signature's only one. The others are not rendered.
        view: How solutions map to answers, None = as the shipped problem families or mathematics do. An ETSPredict
            caches no search with one that `verifier_name` cannot name: give it a text `id`.

    Example:
        >>> adapter = PlainAdapter()
        >>> signature = dspy.Signature("question -> reasoning, answer: int")
        >>> adapter.format(signature, [], {"question": "What is 1+1?"})
        [{'role': 'user', 'content': 'What is 1+1?'}]
        >>> adapter.parse(signature, "1 and 1. The answer is 2.")
        {'reasoning': '1 and 1. The answer is 2.', 'answer': 2}
    """

    def __init__(self, field: str | None = None, view: StepView | None = None, **kwargs: Any) -> None:
        """See the class."""
        super().__init__(**kwargs)
        self.field = field
        self._view = view

    def format(
        self, signature: type[dspy.Signature], demos: list[dict[str, Any]], inputs: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The demos that are complete, and the question.

        Raises:
            ValueError: It is not clear which input field is the question.
        """
        question = self.format_user_message_content(signature, inputs)
        _PROBLEM.set(question)
        return [*self.format_demos(signature, demos), {"role": "user", "content": question}]

    def format_demos(self, signature: type[dspy.Signature], demos: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One turn each for question and solution."""
        name, turns = self._question_field(signature), []
        for demo in demos:
            solution = self.format_assistant_message_content(signature, demo)
            if demo.get(name) is not None and solution:
                turns.append({"role": "user", "content": str(demo[name])})
                turns.append({"role": "assistant", "content": solution})
        return turns

    def format_user_message_content(
        self, signature: type[dspy.Signature], inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> str:
        """The question."""
        return str(inputs.get(self._question_field(signature), ""))

    def format_assistant_message_content(
        self, signature: type[dspy.Signature], outputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> str:
        """The solution, or the answer alone where there is none."""
        values = [outputs[name] for name in signature.output_fields if outputs.get(name) is not None]
        return str(values[0]) if values else ""

    def parse(self, signature: type[dspy.Signature], completion: str) -> dict[str, Any]:
        """The output fields of a solution of the question that was formatted last in this context.

        Raises:
            AdapterParseError: It states no answer, or one that does not fit the field's type.
        """
        *others, last = signature.output_fields
        problem = _PROBLEM.get()
        answer = self.view_for(problem).answer(problem, completion)
        try:
            if answer is None:
                raise ValueError("it states no answer")
            fields = {name: parse_value(completion, signature.output_fields[name].annotation) for name in others}
            return {**fields, last: parse_value(answer, signature.output_fields[last].annotation)}
        except ValueError as error:
            raise AdapterParseError(
                adapter_name=type(self).__name__, signature=signature, lm_response=completion, message=str(error)
            ) from error

    @property
    def view_name(self) -> str | None:
        """What tells the view that was given from others, "" where none was, None where nothing does."""
        return "" if self._view is None else verifier_name(self._view)

    def view_for(self, problem: str) -> StepView:
        """How solutions of this problem map to answers."""
        return self._view or view_of(problem)

    def _question_field(self, signature: type[dspy.Signature]) -> str:
        names = list(signature.input_fields)
        if self.field is None and len(names) == 1:
            return names[0]
        if self.field in names:
            return self.field
        raise ValueError(
            f"PlainAdapter(field={self.field!r}) renders one input field, and the signature has {names}: name one of "
            "them, or use dspy.ChatAdapter with a model that follows instructions"
        )


def view_of(problem: str) -> StepView:
    """The shipped families' view for a problem of theirs, that of mathematics for any other."""
    from ets_engine.reference import family_of  # its tables take a moment to load

    try:
        family_of(problem)
    except ReferenceDomainError:
        return MathView()
    return ReferenceView()
