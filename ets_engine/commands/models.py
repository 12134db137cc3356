"""`ets models` and `ets check`: what a pair of models takes, from published sizes or from loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ets_engine.commands.common import (
    EXIT_FAILURE,
    StepSeparator,
    engine_settings,
    fail,
    one_line_errors,
    option,
    quiet_libraries,
)
from ets_engine.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from ets_engine.services import ServerDescription
    from ets_engine.types import EngineDescription, ModelDescription, SearchResult

CHECK_PROBLEM = "What is 12 + 30?"
CHECK_WIDTH = 4
CHECK_STEPS = 8


def models(
    width: Annotated[int, option("COUNT", "Trajectories kept alive.", default=16)] = 16,
    tokens: Annotated[int, option("COUNT", "Tokens of one path, prompt included.", default=1024)] = 1024,
    sharing: Annotated[
        float, option("RATIO", "Path tokens per distinct KV token that the last column assumes.", default=3)
    ] = 3.0,
) -> None:
    """List presets, PRM formats, and the memory that known models take at a width, in bfloat16.

    A search needs the weights and the KV of a policy and of a verifier. "KV at most" is with nothing shared, "shared"
    with so many path tokens per distinct one.

    Exit codes: 0 listed, 2 bad usage.
    """
    with one_line_errors():
        from rich.console import Console

        for name, value in (("--width", width), ("--tokens", tokens), ("--sharing", sharing)):
            _check_at_least_1(name, value)
        console = Console(highlight=False)
        console.print(_presets_table())
        for role in ("policy", "verifier"):
            console.print(_memory_table(role, width, tokens, sharing))
            console.print()


def check(
    model: Annotated[
        str,
        option(
            "NAME",
            "Model that proposes steps: a folder, a hub name, or openai:http://host:8000/v1#name.",
            default="the shipped one",
        ),
    ] = "reference",
    verifier: Annotated[
        str | None,
        option(
            "NAME",
            "What scores steps: a PRM, or logprob; judge:openai:... or pooling:openai:... for a model on a server.",
            default="the shipped model's own",
        ),
    ] = None,
    device: Annotated[str, option("NAME", "Where the models run.", default="cuda where there is one")] = "auto",
    preset: Annotated[
        str, option("NAME", "Prompt, step boundaries and answers.", default="as the model shows")
    ] = "auto",
    verifier_format: Annotated[str, option("NAME", "What the PRM reads.", default="as the model shows")] = "auto",
    step_separator: StepSeparator = None,
    problem: Annotated[
        str | None, option("TEXT", "What the trial search solves.", default="a sum, or one the shipped models know")
    ] = None,
    tokens: Annotated[int, option("COUNT", "Tokens of one path, for the widths that fit.", default=1024)] = 1024,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as one line of JSON.")] = False,
) -> None:
    """Load a policy and its verifier, run one small search, and say what was found and which widths fit.

    Of a model behind a server, say what that can do and how long one call takes.

    Exit codes: 0 both work together, 1 they do not, 2 bad usage.
    """
    with one_line_errors():
        from rich.console import Console
        from rich.text import Text

        from ets_engine.config import SearchConfig
        from ets_engine.reference import REFERENCE
        from ets_engine.services import open_engine

        _check_at_least_1("--tokens", tokens)
        quiet_libraries(is_terminal=False)
        config = engine_settings(device, preset, verifier_format, step_separator)
        knows_families = REFERENCE in (model, preset, model.partition("#")[2])
        asked = problem or ("Use 1, 3, 7 and 17 to make 22." if knows_families else CHECK_PROBLEM)
        with open_engine(model, verifier, config) as engine:
            found = engine.describe()
            strategy = "best_of_n" if found.verifier_name is None else "ets"
            vote = "majority" if found.verifier_name is None else "weighted"
            search = SearchConfig(strategy=strategy, vote=vote, width=CHECK_WIDTH, max_steps=CHECK_STEPS)
            result = engine.search(asked, search)
        if json:
            typer.echo(found.model_dump_json())
        else:
            console = Console(highlight=False)
            console.print(_found_table(found, tokens))
            console.print(Text(_trial(result)))
        if result.finish_reason == "error":
            fail(f"the trial search failed: {result.num_errors} branches with errors", EXIT_FAILURE)


def _check_at_least_1(name: str, value: float) -> None:
    if not 1 <= value < float("inf"):
        raise ConfigError(f"{name} {value:g}: give 1 or more")


def _presets_table() -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    from ets_engine.models.presets import PRESETS

    table = Table(title="Presets", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for head in ("preset", "for", "steps"):
        table.add_column(head, overflow="fold")
    for one in PRESETS:
        table.add_row(one.name, one.about, one.boundary.describe())
    return table


def _memory_table(role: str, width: int, tokens: int, sharing: float) -> Table:
    """Models by preset or format, whose names stay whole on 80 columns, to be copied from there."""
    from itertools import groupby

    from rich.box import SIMPLE
    from rich.table import Table

    from ets_engine.catalog import KNOWN_MODELS
    from ets_engine.terminal.words import count, plural, size

    plurals, by = ("Policies", "preset") if role == "policy" else ("Verifiers", "format")
    title = f"{plurals} by {by}, at width {count(width)} and paths of {plural(tokens, 'token')}"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=0, show_edge=False)
    table.add_column("", overflow="fold")
    for head in ("weights", "KV a\ntoken", "KV at\nmost", f"shared\n{sharing:g} x"):
        table.add_column(head, justify="right")
    known = [one for one in KNOWN_MODELS if one.role == role]
    for format, models in groupby(known, key=lambda one: one.format):
        table.add_row(format)
        for one in models:
            most, shared = one.kv_bytes(width, tokens), one.kv_bytes(width, tokens, sharing)
            table.add_row(f"  {one.name}", *map(size, (one.weight_bytes, one.token_bytes, most, shared)))
    return table


def _found_table(found: EngineDescription | ServerDescription, tokens: int) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from ets_engine.terminal.words import clean
    from ets_engine.types import EngineDescription

    def add(head: str, value: str) -> None:
        table.add_row(Text(clean(head)), Text(clean(value)))  # servers and checkpoints say what they like

    table = Table(box=SIMPLE, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    if not isinstance(found, EngineDescription):
        for head, value in _server_facts(found).items():
            add(head, value)
        return table
    for role, one in (("policy", found.policy), ("verifier", found.verifier)):
        if one is None:
            add(role, found.verifier_name or "none: each search brings a function")
            continue
        for head, value in _facts(one, tokens).items():
            add(f"{role}: {head}", value)
    add("embedder", found.embedder)
    return table


def _facts(one: ModelDescription, tokens: int) -> dict[str, str]:
    from ets_engine.terminal.words import count, plural, size

    tokens = min(tokens, one.context_tokens)
    width = one.width_that_fits(tokens)
    return {
        "model": f"{one.name} ({one.architecture}, {count(one.parameters)} parameters, {one.dtype} on {one.device})",
        "format": one.format,
        **one.details,
        "attention": one.attention,
        "context": plural(one.context_tokens, "token"),
        "weights": size(one.weight_bytes),
        "KV a token": size(one.kv_bytes_per_token),
        "KV pool": "as memory allows" if one.kv_pool_tokens is None else plural(one.kv_pool_tokens, "token"),
        "width that fits": "as memory allows"
        if width is None
        else f"{plural(width, 'path')} of {plural(tokens, 'token')}, nothing shared",
    }


def _server_facts(found: ServerDescription) -> dict[str, str]:
    from ets_engine.terminal.words import plural, seconds

    stops = {
        "told": "named with each choice",
        "kept": "kept in the text",
        "silent": "neither named nor kept: steps are sampled to their longest and cut here",
    }
    context = found.context_tokens
    measured = [url for url, has in found.metrics.items() if has]
    return {
        "policy: model": f"{found.name} at {', '.join(found.urls)}",
        "policy: context": "the server does not say" if context is None else plural(context, "token"),
        "policy: format": found.preset or "unknown",
        "policy: prompts": found.prompts,
        "policy: steps": f"end with {', '.join(map(repr, found.boundaries))}",
        "server: token ids": f"as prompts: {_yes(found.token_prompts)}, with choices: {_yes(found.token_ids)}",
        "server: n choices": _yes(found.choices) if found.choices else "no: a request for each branch",
        "server: seed": _yes(found.seed),
        "server: top_k, min_p": _yes(found.cuts),
        "server: stop texts": stops[found.stop],
        "server: metrics": "prefix-cache figures" if len(measured) == len(found.urls) else _some(measured),
        "server: one call": f"{seconds(found.call_s)} for one token",
        "verifier": found.verifier_name or "none: each search brings a function",
        "embedder": found.embedder,
    }


def _yes(has: bool) -> str:
    return "yes" if has else "no"


def _some(urls: list[str]) -> str:
    return f"prefix-cache figures of {', '.join(urls)} alone" if urls else "no prefix-cache figures"


def _trial(result: SearchResult) -> str:
    from ets_engine.terminal.words import one_line, plural, seconds

    finished = plural(result.trajectories, "trajectory", "trajectories")
    shared = "" if result.kv is None else f"sharing {result.kv.sharing_ratio:.2f}, "
    answer = "no answer" if result.answer is None else f"answer {one_line(result.answer)}"
    return (
        f"Trial search: {answer}, {finished} finished, best path of {plural(len(result.steps), 'step')}, "
        f"{shared}{seconds(result.timing.wall_s)}"
    )
