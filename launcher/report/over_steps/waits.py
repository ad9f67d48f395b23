"""The seconds of each step in which the ranks did not compute: for data, other ranks, answers, saves, evaluations."""

from launcher.report.history import History, Point
from launcher.report.over_steps import Figure

_COMPUTES = {"forward", "backward", "optimizer"}
_WORDS = {
    "data": "for data",
    "exchange": "for other ranks",
    "save": "saves",
    "evaluate": "evaluations",
    "look": "looks for wrong bytes",
}


def read(history: History) -> dict[str, list[Point]]:
    """Return the waits of rank 0. Data is that of the rank which waited longest."""
    parts = [name.removesuffix("_seconds") for name in history.steps.names if name.endswith("_seconds")]
    found = {
        _WORDS.get(part, part): list(history.steps.points(f"{part}_seconds")) for part in parts if part not in _COMPUTES
    }
    stalls = [
        (record["step"], record["stall_seconds"]) for record in history.others["commit"] if "stall_seconds" in record
    ]
    return {name: points for name, points in (found | {"for commits": stalls}).items() if any(y for _, y in points)}


FIGURES = {"waits": Figure("Waits of a step", "seconds", read)}
