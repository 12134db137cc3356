"""Where an ETSLM's searches run: a service at hand, or one found by name when it is first asked for; never copied."""

from __future__ import annotations

from typing import Any

from ets_engine.protocols import SearchService
from ets_engine.registry import registered_service
from ets_engine.scorers import Scorer
from ets_engine.services import find_service
from ets_integrations.dspy.coalesce import Flights
from ets_integrations.settings import verifier_name


class ServiceSource:
    """Names a service and a verifier, and holds the service once it was found.

    Copies of an LM share it, deep copies too: there is one of the weights. A pickle holds names, never weights.

    Args:
        model: Name of a model, or of a registered service.
        verifier: Name of a PRM to load with the model, or a function that judges instead of the service's own.
        service: The service itself, or the name of a registered one; None = find the model's.

    Attributes:
        flights: The searches of this source that are under way.
        scorer: The verifier, where it is a function.
        verifier_name: Tells the verifier from others; None for the service's own and for a function without a name.
    """

    def __init__(self, model: str, verifier: str | Scorer | None, service: SearchService | str | None) -> None:
        """See the class."""
        self.model = model
        self.scorer: Scorer | None = None if isinstance(verifier, str) else verifier
        self.verifier_name = verifier_name(verifier)
        self.flights = Flights()
        self._prm = verifier if isinstance(verifier, str) else None
        self._given = service
        self._found: SearchService | None = None

    @property
    def name(self) -> str:
        """Names the models in every cache key."""
        if isinstance(self._given, str | None):
            return self._given or self.model
        return self._given.name

    @property
    def is_found(self) -> bool:
        """Whether the next `find` loads nothing."""
        return self._found is not None or self._given is not None

    @property
    def has_nameless_verifier(self) -> bool:
        """Whether two verifiers could look the same in a cache key."""
        return self.scorer is not None and self.verifier_name is None

    def find(self) -> SearchService:
        """The service; the first call may load its weights.

        Raises:
            ModelLoadError: There is no such model.
            ConfigError: The shipped PRM is asked to judge another model, or there is no such registered service.
        """
        if self._given is None:
            self._found = find_service(self.model, self._prm)  # a closed engine is replaced there
            return self._found
        return registered_service(self._given) if isinstance(self._given, str) else self._given

    def dump_state(self) -> dict[str, Any]:
        """Names, as JSON.

        Raises:
            TypeError: The verifier is a function.
        """
        if self.scorer is not None:
            raise TypeError(
                "an ETSLM whose verifier is a function cannot be saved; save the program without its LM and set one "
                "after loading, or register an engine with that verifier (register_service) and name it"
            )
        service = None if self._given is None else self.name
        return {"model": f"ets/{self.model}", "verifier": self._prm, "service": service}

    def __copy__(self) -> ServiceSource:
        """The source itself."""
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> ServiceSource:
        """The source itself."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle names and functions; a service pickles as it can, an engine by its name."""
        return ServiceSource, (self.model, self._prm or self.scorer, self._given)
