"""From settings to a selector: the one place that knows strategies by name."""

from __future__ import annotations

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.protocols import Selector
from ets_engine.search.dora import Dora
from ets_engine.search.ets import Ets
from ets_engine.search.selectors import Beam, BeamSqrt, BestOfN, Dvts, Rebase

_BUDGETED = ("ets", "ets_kv")


def build_selector(config: SearchConfig) -> Selector:
    """The selector that a `SearchConfig` names.

    Raises:
        ConfigError: A setting contradicts the strategy.

    Example:
        >>> build_selector(SearchConfig(strategy="beam", width=16))
        Beam(keep=4)
    """
    if config.kv_budget_tokens is not None and config.strategy not in _BUDGETED:
        raise ConfigError(
            f"kv_budget_tokens={config.kv_budget_tokens}: strategy {config.strategy!r} cannot honour a KV budget; use"
            f" one of {', '.join(_BUDGETED)}"
        )
    keep = config.keep or max(1, config.width // 4)
    match config.strategy:
        case "greedy" | "best_of_n":
            return BestOfN()
        case "beam":
            return Beam(keep)
        case "beam_sqrt":
            return BeamSqrt()
        case "dvts":
            return Dvts(keep)
        case "rebase":
            return Rebase(config.softmax_temperature)
        case "dora":
            return Dora(config.softmax_temperature)
        case "ets" | "ets_kv":
            return Ets(
                lambda_b=config.lambda_b,
                lambda_d=config.lambda_d if config.strategy == "ets" else 0.0,
                cluster_cut=config.cluster_cut,
                softmax_temperature=config.softmax_temperature,
                node_cost=config.node_cost,
                ceil_split=config.allocation == "ceil",
                kv_budget_tokens=config.kv_budget_tokens,
            )
        case "ets_published":
            return Ets(
                lambda_b=config.lambda_b,
                lambda_d=config.lambda_d,
                cluster_cut=config.cluster_cut,
                softmax_temperature=config.softmax_temperature,
                published=True,
            )


def effective_width(config: SearchConfig) -> int:
    """Trajectories that a search keeps alive: `width`, but 1 for "greedy".

    Example:
        >>> effective_width(SearchConfig(strategy="greedy", width=16))
        1
    """
    return 1 if config.strategy == "greedy" else config.width


def needs_scores(config: SearchConfig, selector: Selector | None = None) -> bool:
    """Whether the scores of a verifier can change what a search finds, ties of a majority vote aside.

    Args:
        config: Strategy, width and vote.
        selector: Of the caller's own, which may look at scores; None = the one that `config` names.

    Example:
        >>> needs_scores(SearchConfig(strategy="best_of_n", vote="majority")), needs_scores(SearchConfig())
        (False, True)
    """
    if selector is not None:
        return True
    return effective_width(config) > 1 and (config.strategy != "best_of_n" or config.vote != "majority")
