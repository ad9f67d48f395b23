"""A toy figure: how far the loss jumps from a step to the next."""

from itertools import pairwise

from launcher.report.history import History, Point
from launcher.report.over_steps import Figure


def read(history: History) -> dict[str, list[Point]]:
    return {"jump": [(step, loss - before) for (_, before), (step, loss) in pairwise(history.steps.points("loss"))]}


FIGURES = {"jumps": Figure("Jumps of the loss", "nats", read)}
