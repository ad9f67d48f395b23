"""The energy that the steps have taken so far, by the power of rank 0's GPU where it is recorded."""

from launcher.report.history import History, Point
from launcher.report.over_steps import Figure


def read(history: History) -> dict[str, list[Point]]:
    """Return the sum over the steps that count, in watt hours of all ranks."""
    seconds, found, energy = dict(history.steps.points("seconds")), list[Point](), 0.0
    begun = [(start.step, start.world_size or 1) for start in reversed(history.starts) if start.step is not None]
    for step, watts in history.steps.points("device_watts"):
        # A step that counts is of the newest start that began before it.
        ranks = next((count for begin, count in begun if begin < step), 1)
        energy += ranks * watts * seconds.get(step, 0.0) / 3600
        found.append((step, energy))
    return {"all ranks": found} if energy else {}


FIGURES = {"energy": Figure("Energy of the steps so far", "Wh, at the power of rank 0's GPU", read)}
