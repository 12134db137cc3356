"""How a conversation becomes a prompt for a server: token ids where it takes them, else text."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ets_engine.errors import ConfigError, ModelLoadError
from ets_engine.hosted import estimate_tokens
from ets_engine.messages import Message, last_user_text, split_reply
from ets_engine.models.shapes import first_heard
from ets_engine.remote.capabilities import Capabilities
from ets_engine.remote.replicas import Replicas, held
from ets_engine.remote.server import ServerError

if TYPE_CHECKING:
    from ets_engine.models.presets import Preset

RemotePrompt = str | tuple[int, ...]
"""What a server is sent: text, or token ids."""

PLAIN = "{problem}\n"
_PROBLEM = "{problem}"
_THINK, _THOUGHT = "<think>", "</think>"  # around a thought, which some templates open themselves
_KNOWN_PROMPTS = 512
_TOKENIZE = "^/tokenize"


class PromptWriter:
    """Writes prompts for one model, in the first of these ways that its server allows; the way is chosen once.

    * a local tokenizer: its chat template, or without one the last user turn on a line of its own;
    * the server's `/tokenize` (vLLM), which applies the chat template there, or takes the line where there is none;
    * a tokenizer of the model's own name that lies in the local cache; nothing is downloaded.

    With `template`, or a preset whose prompt is a text, it is neither: the last user turn in that text.

    A conversation that ends with an assistant's text is gone on with, as in `PolicyFormat.prompt_ids`: that text
    follows what every reply follows, in ids of its own where ids are sent, with nothing of the end of a turn.

    Args:
        replicas: Of the model.
        model: Its name there.
        capabilities: Of the server.
        tokenizer: A tokenizer by folder or hub name, None = none was given.
        template: A text with `{problem}` for a model without a chat template, "plain" = the problem on a line of its
            own, None = see above.
        preset: The prompt of the model's family where there is no `template`, its instruction for a conversation that
            brings none, and the options of its chat template; None = nothing is known of it.

    Raises:
        ConfigError: `template` has no place for the problem.
    """

    def __init__(
        self,
        replicas: Replicas,
        model: str,
        capabilities: Callable[[], Capabilities],
        *,
        tokenizer: str | None = None,
        template: str | None = None,
        preset: Preset | None = None,
    ) -> None:
        """See the class."""
        if template is None and preset is not None and preset.prompt != "chat":
            template = "plain" if preset.prompt == "line" else preset.prompt
        template = PLAIN if template == "plain" else template
        if template is not None and _PROBLEM not in template:
            raise ConfigError(f"template={template!r} has no {_PROBLEM}; write it where the problem goes")
        self._replicas = replicas
        self._model = model
        self._capabilities = capabilities
        self._tokenizer_name = tokenizer
        self._template = template
        self._preset = preset
        self._system = None if preset is None or template is not None else preset.system
        self._options = {} if preset is None else dict(preset.template_options)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._by_server = False  # whether the server's tokenizer is asked
        self._is_ready = False
        self._think_tags: tuple[tuple[int, ...], ...] = ()  # tokens that open a thought, as a prompt may end with them
        self._written: OrderedDict[str, RemotePrompt] = OrderedDict()

    def write(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> RemotePrompt:
        """The prompt, to be continued by the first step.

        Raises:
            ConfigError: There is no way to write it, or no place for tools in it; the message says what to pass.
            ServerError: The server cannot be asked.
        """
        key = json.dumps([list(map(dict, messages)), list(map(dict, tools))], default=str)
        with held(self._lock):
            self._prepare()
            found = self._written.get(key)
        if found is None:
            found = self._write(messages, tools)
        with self._lock:
            self._written[key] = found
            self._written.move_to_end(key)
            if len(self._written) > _KNOWN_PROMPTS:
                self._written.popitem(last=False)
        return found

    def describe(self) -> str:
        """How prompts are written, for people.

        Raises:
            ConfigError: There is no way to write them; the message says what to pass.
            ServerError: The server cannot be asked.
        """
        with held(self._lock):
            self._prepare()
        if self._template == PLAIN:
            how = "the problem on a line of its own"
        elif self._template is not None:
            how = f"the problem in {self._template!r}"
        else:
            how = "the chat template"
        by = "the server's tokenizer" if self._by_server else "a tokenizer here"
        how = how if self._tokenizer is None and not self._by_server else f"{how}, by {by}"
        return how if self._system is None else f"{how}, after the instruction {self._system.partition(chr(10))[0]!r}"

    def in_thought(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> bool:
        """Whether solutions begin inside a thought, which the prompt or the reply that is gone on with has opened.

        Raises:
            ConfigError: As `write`.
            ServerError: As `write`.
        """
        asked, begun = split_reply(messages)
        opened = (_THINK if self._opens_thought(self.write(asked, tools)) else "") + begun
        return opened.rfind(_THINK) > opened.rfind(_THOUGHT)

    def encode(self, text: str) -> tuple[int, ...] | None:
        """Token ids of a step, without special tokens; None where nobody here knows the tokenizer.

        Raises:
            ServerError: The server cannot be asked.
        """
        if self._tokenizer is not None:
            return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._ask(prompt=text, add_special_tokens=False) if self._by_server else None

    def count(self, text: str) -> int:
        """Tokens of a text: exact with a local tokenizer, else a guess from its length.

        Raises:
            ModelLoadError: The tokenizer that was given cannot be loaded.
        """
        self._load_given()
        if self._tokenizer is None:
            return estimate_tokens(text)
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _load_given(self) -> None:
        """Load the tokenizer that was given; threads that come first together may each do so."""
        if self._tokenizer is None and self._tokenizer_name is not None:
            self._tokenizer = _load(self._tokenizer_name)

    def _prepare(self) -> None:
        """Choose the way, once."""
        if self._is_ready:
            return
        takes_ids = self._capabilities().token_prompts
        if self._tokenizer_name is not None:
            self._load_given()
        elif takes_ids and self._find_server_tokenizer():
            self._by_server = True
        elif self._template is None:
            self._tokenizer = _load_cached(self._model)
        if self._template is None and self._tokenizer is not None and not self._tokenizer.chat_template:
            self._template = PLAIN
        if self._template is None and self._tokenizer is None and not self._by_server:
            raise ConfigError(
                f"how {self._model!r} wants its prompts is not known here; pass tokenizer=folder or hub name, or, for "
                "a model without a chat template, template='plain' or the preset 'plain'"
            )
        if self._preset is not None and self._system is not None and self._template is not None:
            raise ConfigError(
                f"preset={self._preset.name!r} needs a chat template, and {self._model!r} has none; choose 'plain'"
            )
        if takes_ids:
            tags = (self.encode(_THINK + space) for space in ("", "\n"))
            self._think_tags = tuple(tag for tag in tags if tag)
        self._is_ready = True

    def _find_server_tokenizer(self) -> bool:
        """Whether the server tokenises; where it has no chat template, the plain one is taken from now on."""
        try:
            if self._template is None:
                return self._render([{"role": "user", "content": "1"}], ()) is not None
        except ServerError as error:
            if error.status is None:
                raise
            if "chat template" not in str(error):  # what vLLM says where there is none
                return False
            self._template = PLAIN
        try:
            return self._ask(prompt="1") is not None
        except ServerError as error:
            if error.status is None:
                raise
            return False

    def _write(self, messages: Sequence[Message], tools: Sequence[Message]) -> RemotePrompt:
        messages, begun = split_reply(messages)
        if not messages:
            raise ConfigError(
                "the conversation has no question before the reply to go on with; begin with a user message"
            )
        prompt = self._write_asked(messages, tools)
        if begun.lstrip().startswith(_THINK) and self._opens_thought(prompt):
            begun = begun.lstrip().removeprefix(_THINK).lstrip("\n")
        if not begun:
            return prompt
        if isinstance(prompt, str):
            return prompt + begun
        ids = self.encode(begun)
        if ids is None:
            raise ServerError(f"the server's /tokenize has no tokens for {self._model!r}")
        return prompt + ids

    def _opens_thought(self, prompt: RemotePrompt) -> bool:
        """Whether a prompt ends with the tag that opens a thought."""
        if isinstance(prompt, str):
            return prompt.rstrip().endswith(_THINK)
        return any(prompt[-len(tag) :] == tag for tag in self._think_tags)

    def _write_asked(self, messages: Sequence[Message], tools: Sequence[Message]) -> RemotePrompt:
        """The prompt up to the beginning of a reply."""
        takes_ids = self._capabilities().token_prompts
        if self._template is not None:
            if tools:
                raise ConfigError(f"tools: {self._model!r} is prompted without a chat template; leave them out")
            text = self._template.replace(_PROBLEM, last_user_text(messages).strip())
            ids = None
            if takes_ids:
                ids = tuple(self._tokenizer(text)["input_ids"]) if self._tokenizer else self._by_server_ids(text)
            return text if ids is None else ids
        if self._preset is not None:
            messages = self._preset.instruct(messages, has_tools=bool(tools))
        if self._by_server:
            _, ids = first_heard(messages, lambda turns: self._render(turns, tools), is_refusal=_is_refusal)
            if ids is None:
                raise ServerError(f"the server's /tokenize has no tokens for {self._model!r}")
            return ids
        text = _apply(self._tokenizer, messages, tools, self._options)
        return (self.encode(text) or text) if takes_ids else _without_bos(self._tokenizer, text)

    def _by_server_ids(self, text: str) -> tuple[int, ...] | None:
        return self._ask(prompt=text) if self._by_server else None

    def _render(self, messages: Sequence[Message], tools: Sequence[Message]) -> tuple[int, ...] | None:
        told: dict[str, Any] = {"tools": [dict(tool) for tool in tools]} if tools else {}
        told |= {"chat_template_kwargs": self._options} if self._options else {}
        return self._ask(messages=[dict(message) for message in messages], add_generation_prompt=True, **told)

    def _ask(self, **fields: Any) -> tuple[int, ...] | None:
        found = self._replicas.post(_TOKENIZE, {"model": self._model, **fields}).get("tokens")
        if not isinstance(found, list) or not all(isinstance(one, int) for one in found):
            return None
        return tuple(found)


def _load(name: str) -> Any:
    from transformers import AutoTokenizer  # heavy, and needed only here

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever a file made it stumble over
        line = next(iter(str(error).splitlines()), "")
        raise ModelLoadError(f"tokenizer={name!r} cannot be loaded: {type(error).__name__}: {line}") from error


def _load_cached(name: str) -> Any:
    from transformers import AutoTokenizer  # heavy, and needed only here

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # it is not there, or no tokenizer
        return None


def _apply(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Message], options: Mapping[str, Any]) -> str:
    given = [dict(tool) for tool in tools] or None

    def write(turns: Sequence[Message]) -> str:
        told = [dict(turn) for turn in turns]
        return tokenizer.apply_chat_template(told, tools=given, add_generation_prompt=True, tokenize=False, **options)

    try:
        return first_heard(messages, write, says=lambda text, instruction: instruction in text)[1]
    except Exception as error:  # templates raise whatever their author thought of
        reason = " ".join(str(error).split())
        raise ConfigError(f"the model's chat template refuses these messages: {reason:.300}") from error


def _is_refusal(error: Exception) -> bool:
    """Whether a server refused a request as it was, its chat template perhaps."""
    return isinstance(error, ServerError) and error.status == 400


def _without_bos(tokenizer: Any, text: str) -> str:
    """A rendered prompt for a server that adds the begin-of-text token itself."""
    bos = tokenizer.bos_token
    adds = bos and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds else text
