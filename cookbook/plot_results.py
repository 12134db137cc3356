"""Recipe: accuracy against KV of every method, from the summaries that `ets bench` wrote.

python cookbook/plot_results.py                                   # the committed summaries, into cookbook/results
python cookbook/plot_results.py runs/mine/summary.json --out mine.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from ets_engine.evaluation import Row, Summary, read_summary
from ets_engine.evaluation.methods import split_name
from ets_engine.evaluation.plot import Cost, Panel, draw, panel_of

RESULTS = Path(__file__).parent / "results"
COSTS: dict[str, tuple[str, Cost]] = {
    "kv": ("mean resident KV (tokens of the policy)", lambda row: row.mean_kv_tokens),
    "peak": ("peak resident KV (tokens of the policy)", lambda row: row.peak_kv_tokens),
    "published": ("KV by the published metric (tokens)", lambda row: row.published_kv_tokens),
    "latency": ("median latency (seconds)", lambda row: row.p50_s),
}


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", nargs="*", type=Path, help="default: cookbook/results/bench-*.json")
    parser.add_argument("--cost", choices=sorted(COSTS), default="kv")
    parser.add_argument("--out", type=Path, help="default: cookbook/results/accuracy-COST.svg")
    args = parser.parse_args()
    label, cost = COSTS[args.cost]
    paths = args.summaries or sorted(RESULTS.glob("bench-*.json"))
    panels = panels_of([read_summary(path) for path in paths], label, cost)
    out = args.out or RESULTS / f"accuracy-{args.cost}.svg"
    out.write_text(draw(panels), encoding="utf-8")
    print(out)


def panels_of(summaries: list[Summary], label: str, cost: Cost) -> list[Panel]:
    """One panel per family of problems; each row comes from the summary that measured it on most problems."""
    families: dict[str, dict[str, Row]] = {}
    for summary in summaries:
        family = summary.settings[-1].data.partition(" ")[0] if summary.settings else "problems"
        rows = families.setdefault(Path(family).stem, {})
        for row in summary.rows:
            if row.name not in rows or row.problems > rows[row.name].problems:
                rows[row.name] = row
    return [
        panel_of(rows.values(), cost, label, f"{family}: {_counts(rows.values())}") for family, rows in families.items()
    ]


def _counts(rows: Iterable[Row]) -> str:
    """How many problems, and at which width where that differs."""
    widths: dict[int, set[str]] = {}
    for row in rows:
        _, width, _ = split_name(row.name)
        widths.setdefault(row.problems, set()).update({str(width)} if width else ())
    counts = sorted(widths, reverse=True)
    if len(counts) == 1:
        return f"{counts[0]} problems"
    by_count = [f"{count} at width {' and '.join(sorted(widths[count], key=int))}" for count in counts if widths[count]]
    return ", ".join(by_count)


if __name__ == "__main__":
    main()
