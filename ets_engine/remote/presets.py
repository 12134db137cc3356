"""What the preset of a served model decides besides its prompt: where steps end, and how its texts map to answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from ets_engine.errors import ConfigError

if TYPE_CHECKING:
    from ets_engine.models.presets import Preset
    from ets_engine.protocols import StepView


def end_texts(preset: Preset) -> tuple[str, ...]:
    """The texts that end a step, for `RemotePolicy`; a limit of tokens beside them is no business of the server's.

    Raises:
        ConfigError: Steps are told apart by something else, which no server is asked to look for.
    """
    boundary = preset.boundary
    if boundary.begins or boundary.is_over is not None or not boundary.ends:
        raise ConfigError(
            f"preset={preset.name!r}: its steps {boundary.describe()}, and a server only stops at texts that end one; "
            "choose another preset, or name such texts: ets_engine.remote.connect(boundaries=[...])"
        )
    return boundary.ends


class PresetView:
    """`StepView` of a preset, for one conversation.

    Args:
        preset: Of the model.
        in_thought: Tells whether the conversation's prompt opened a <think> section; asked once, when a search is over
            and the prompt is known.
    """

    def __init__(self, preset: Preset, in_thought: Callable[[], bool]) -> None:
        """See the class."""
        self._preset = preset
        self._in_thought = in_thought

    @cached_property
    def _view(self) -> StepView:
        return self._preset.make_view(self._in_thought())

    def answer(self, problem: str, text: str) -> str | None:
        """The answer in a finished trajectory's text, or None where there is none."""
        return self._view.answer(problem, text)

    def same(self, left: str, right: str) -> bool:
        """Whether two answers count as the same vote."""
        return self._view.same(left, right)
