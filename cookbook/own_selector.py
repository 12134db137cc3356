"""Recipe: a selector of your own is one frozen dataclass; here, leaves below a floor die and the rest share evenly."""

from __future__ import annotations

from dataclasses import dataclass

from ets_engine import ETSEngine, SearchConfig
from ets_engine.protocols import Frontier, Selection
from ets_engine.search.allocate import best_first, even_shares


@dataclass(frozen=True, slots=True)
class ScoreFloor:
    """Keep every leaf that scores at least `floor`, the best one in any case, and split the width evenly."""

    floor: float = 0.5
    needs_embeddings: bool = False

    def select(self, frontier: Frontier, open_width: int) -> Selection:
        """See the class."""
        ranked = best_first(frontier.scores)
        kept = [leaf for leaf in ranked if frontier.scores[leaf] >= self.floor] or ranked[:1]
        return Selection(even_shares(kept[:open_width], len(frontier.scores), open_width))


def main() -> None:
    """Solve one problem with it."""
    with ETSEngine.from_pretrained("reference") as engine:
        config = SearchConfig(width=16, seed=0)
        result = engine.search("Use 4, 6, 10 and 19 to make 16.", config, selector=ScoreFloor(0.3))
    print(result.text)
    print(f"answer {result.answer}, score {result.score:.2f}, found by {result.strategy}")


if __name__ == "__main__":
    main()
