"""A run's records as plain lines, for logs and for people who watch without a terminal."""

from collections import deque
from collections.abc import Callable, Mapping

from trainer.run.records import Record, measures

_RATE_STEPS = 10
_PHASES = {
    "load": "load: reads the base and the newest checkpoint",
    "first_step": "first step: takes longer than those after it",
    "reference": "reference: computes the base's log-probabilities of all answers once",
    "features": "features: computes the features of all pictures once, with the base's tower",
}


_ALIKE = (
    "; reward_spread 0: the answers to each prompt were all rewarded alike, so nothing is learnt from them. Prompts"
    " that the base answers right now and then, a reward with more than two values, more rollout.answers or a higher"
    " rollout.temperature change that"
)


class PlainLines:
    """Makes lines of the records that people wait for: phases, evaluations, commits, ends, and some steps.

    A step gets a line every `every` steps; 0 makes none.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._total: int | None = None
        self._printed = False
        self._alike_told = False
        self._seconds: deque[float] = deque(maxlen=_RATE_STEPS)
        self._kinds: dict[str, Callable[[Record], str | None]] = {
            "phase": self._phase,
            "start": self._start,
            "step": self._step,
            "eval": lambda record: (
                f"{_at(record)}: held-out loss{_of(record)}{_number(record, 'loss', '.4f')}{_accuracy(record)}"
            ),
            "measured": lambda record: f"{_at(record)}: {record.get('by')} {figures_line(measures(record))}",
            "waiting": lambda record: f"{_at(record)}: waits for {record.get('what')}",
            "slow_rank": slow_sentence,
            "wrong_bytes": wrong_sentence,
            "commit": lambda record: f"{_at(record)}: committed",
            "end": lambda record: end_sentence(record["outcome"], record["reason"]),
        }

    def of(self, record: Record) -> str | None:
        """Return the line, or None for a record that nobody waits for."""
        make = self._kinds.get(record["kind"])
        return make(record) if make and self._every else None

    def doing(self, record: Record) -> str | None:
        """Return what the run does from this record on, in a few words. None if the record does not tell."""
        if record["kind"] == "phase":
            return (_PHASES.get(record.get("phase") or "") or "").partition(":")[0] or None
        if record["kind"] == "step":
            following = record["step"] + 1
            return f"step {following:,}" if following <= (self._total or following) else "the end of the run"
        return None

    def _phase(self, record: Record) -> str | None:
        if "done" in record:
            return f"{record.get('phase')}: {record['done']:,} of {record.get('in_all') or 0:,}"
        return _PHASES.get(record.get("phase") or "")

    def _start(self, record: Record) -> None:
        self._total, self._printed = record.get("total_steps"), False
        self._seconds.clear()

    def _step(self, record: Record) -> str | None:
        step = record["step"]
        self._seconds.append(record.get("seconds") or 0.0)
        alike = "" if self._alike_told or record.get("reward_spread") != 0 else _ALIKE
        self._alike_told = self._alike_told or bool(alike)
        if not alike and self._printed and step != self._total and step % self._every:
            return None
        self._printed = True
        of = "" if self._total is None else f"/{self._total:,}"
        left = 0.0 if self._total is None else (self._total - step) * sum(self._seconds) / len(self._seconds)
        parts = (
            f"step {step:,}{of}",
            f"loss{_number(record, 'loss', '.4f')}",
            f"accuracy{_number(record, 'accuracy', '.3f')}" if "accuracy" in record else "",
            f"reward{_number(record, 'reward', '.4f')}" if "reward" in record else "",
            f"lr{_number(record, 'lr', '.3g')}",
            f"{_number(record, 'tokens_per_second', ',.0f').strip()} tokens/s",
            f"{duration(left)} left" if left else "",
        )
        return ", ".join(filter(None, parts)) + alike


def slow_sentence(record: Record) -> str:
    """Name a slow rank and say why it is slow, or that it is as fast as the others again."""
    who = f"{_at(record)}: rank {record['rank']} on {record['machine']}"
    if record.get("over"):
        return f"{who} is as fast as the others again"
    why = f": {record['why']}" if record.get("why") else "; nothing on its machine tells why"
    return f"{who} takes{_number(record, 'ratio', '.2f')} times as long as the others{why}"


_WRONG = {
    "share": "holds a wrong byte in {tensor}{since}. It has been read again",
    "gathered": "computed with another {tensor} than its owners have{since}",
    "learnt": "holds {tensor} with a byte that nobody wrote",
    "kept": "has kept a wrong byte of {tensor}{since}. It has been kept again",
    "copied": "has a wrong byte in its copy of {tensor} at another machine{since}. It has been sent again",
    "gradient": "computes another gradient than the others{since}",
}


def wrong_sentence(record: Record) -> str:
    """Name a rank that held or computed something wrong, and the steps that it may have been wrong for."""
    since = f", perhaps since step {record['since']:,}"
    said = _WRONG.get(record["where"], "has a wrong {tensor}{since}").format(tensor=record["tensor"], since=since)
    return f"{_at(record)}: rank {record['rank']} on {record['machine']} {said}"


def _accuracy(record: Record) -> str:
    return f", accuracy{_number(record, 'accuracy', '.3f')}" if "accuracy" in record else ""


def _at(record: Record) -> str:
    return f"step {record.get('step') or 0:,}"


def _of(record: Record) -> str:
    return f" of {record['set']}" if record.get("set") else ""


def _number(record: Record, name: str, form: str) -> str:
    value = record.get(name)
    return " ?" if value is None else f" {value:{form}}"


def figures_line(figures: Mapping[str, float]) -> str:
    """Return the figures that an action measured, in a line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items())


def end_sentence(outcome: str, reason: str) -> str:
    """Say how a start ended and why. A reason such as "stopped at step 4" says both."""
    return reason if reason.startswith(outcome) else f"{outcome}{': ' if reason else ''}{reason}"


def of_total(step: int, total: int | None) -> str:
    """Return a text such as "3 of 20".

    A run that was later told to take fewer steps may be beyond them. Its text is such as "12 (9 asked for)".
    """
    if not total:
        return f"{step:,}"
    return f"{step:,} of {total:,}" if step <= total else f"{step:,} ({total:,} asked for)"


def duration(seconds: float) -> str:
    """Return the duration in two units: 45 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    for size, unit, smaller, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {small_unit}"
    return f"{whole} s"
