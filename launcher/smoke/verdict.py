"""The findings of a smoke run: every claim was measured in that very run, or does not hold."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import yaml
from rich.text import Text

from launcher.view.console import FoldedTable
from trainer.export.figures import Proof

STEPS = 15
LEAST_RIGHT, MOST_BY_CHANCE = 0.8, 0.65  # of answers that are one of two
RESUME_GAP_ALLOWED = 1e-3  # nats: another world size adds the same numbers in another order


@dataclass(frozen=True)
class SmokePlan:
    """A smoke run that would work in `directory`. `config` None is the sample made on the spot."""

    directory: str
    steps: int
    commit_every: int
    config: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return {"dry_run": True, **asdict(self)}

    def text(self) -> str:
        what = "a sample made on the spot" if self.config is None else yaml.safe_dump(self.config, sort_keys=False)
        return (
            f"would work in {self.directory}: train {self.steps} steps undisturbed, train again with a kill (-9) after"
            f" a commit (every {self.commit_every} steps), resume on another world size, export and verify;"
            f" with\n{what.rstrip()}"
        )


@dataclass(frozen=True)
class Sight:
    """The shares of held-out questions about pictures that are answered right: by the base, by the exported adapter,
    and by the adapter where each question has another one's picture. `pictures` is their number."""

    before: float
    after: float
    shuffled: float
    pictures: int


class Finding(NamedTuple):
    what: str
    measured: str
    required: str
    held: bool


@dataclass
class SmokeResult:
    """Everything that was measured.

    Losses are in nats a target token, the mean of several steps. `error` says which part failed; None when all ran.
    """

    steps: int | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    killed_at_step: int | None = None
    resumed_at_step: int | None = None
    world_before: int | None = None
    world_after: int | None = None
    resume_loss_gap: float | None = None
    proof: Proof | None = None  # of the exported adapter
    checkpoints: int | None = None
    # For a run that learns from sampled answers: the steps with such answers, and the mean reward of its first and last
    # ones.
    chapters: int | None = None
    reward_first: float | None = None
    reward_last: float | None = None
    sight: Sight | None = None  # of a run over pictures
    images: bool = False  # whether the run is over pictures
    asked: int = STEPS  # the steps that the run has to make
    seconds: float | None = None
    store: str | None = None
    device: str | None = None
    error: str | None = None
    exit_code: int = 0  # the exit code of the part that failed
    phases: dict[str, float] = field(default_factory=dict)  # seconds of each

    @property
    def checks(self) -> list[Finding]:
        """Every claim of the table. A claim that was not measured does not hold."""
        one_gpu = self.device is not None and self.device.startswith("cuda") and self.world_before == 1
        other_size = (
            "1 -> 1 (one GPU: the world size stays 1)" if one_gpu else f"{self.world_before} -> {self.world_after}"
        )
        return [
            self._learning(),
            Finding(
                "killed (-9) at step",
                str(self.killed_at_step),
                f"< {self.asked}",
                _less(self.killed_at_step, self.asked),
            ),
            Finding("resumed at step", str(self.resumed_at_step), "from a commit", bool(self.resumed_at_step)),
            Finding("world size", other_size, "changes", one_gpu or _less(self.world_after, self.world_before)),
            Finding(
                "loss against an undisturbed run",
                f"{_short(self.resume_loss_gap)} nats",
                f"<= {RESUME_GAP_ALLOWED}",
                self.resume_loss_gap is not None and self.resume_loss_gap <= RESUME_GAP_ALLOWED,
            ),
            *self._export_findings(),
            *(self._sight_findings() if self.images else ()),
            Finding(
                "checkpoints committed",
                f"{self.checkpoints} in {self.store}",
                ">= 2",
                bool(self.checkpoints and self.checkpoints >= 2),
            ),
        ]

    def _learning(self) -> Finding:
        if self.chapters is None:
            losses = f"{_short(self.loss_first)} -> {_short(self.loss_last)} nats"
            return Finding("loss falls", losses, "last < first", _less(self.loss_last, self.loss_first))
        rewards = f"of {self.chapters} steps, their reward {_short(self.reward_first)} -> {_short(self.reward_last)}"
        return Finding("answers sampled", rewards, f"of each of {self.asked} once", self.chapters == self.asked)

    def _export_findings(self) -> list[Finding]:
        """Compare the exported adapter in transformers + PEFT with the trained model, by either measure."""
        proof = self.proof
        if proof is None:
            return [Finding("exported adapter's predictions", "not measured", "those of the trained model", False)]
        measures = (
            ("distributions (KL)", proof.kl, proof.kl_allowed, proof.kl_effect),
            ("trained tokens", proof.log_prob, proof.log_prob_allowed, proof.log_prob_effect),
        )
        return [
            Finding(
                f"exported adapter's {what}",
                f"differ by {_short(found)} nats",
                f"<= {_short(allowed)} (its effect: {_short(effect)})",
                proof.holds,
            )
            for what, found, allowed, effect in measures
        ]

    def _sight_findings(self) -> list[Finding]:
        """Whether the exported adapter answers questions about pictures that nothing was trained with."""
        sight = self.sight
        if sight is None:
            return [Finding("held-out pictures", "not measured", f">= {LEAST_RIGHT} right", False)]
        return [
            Finding(
                f"{sight.pictures} held-out pictures",
                f"{sight.before:.2f} -> {sight.after:.2f} right",
                f">= {LEAST_RIGHT}",
                sight.before < LEAST_RIGHT <= sight.after,
            ),
            Finding(
                "the same, pictures shuffled",
                f"{sight.shuffled:.2f} right",
                f"<= {MOST_BY_CHANCE}",
                sight.shuffled <= MOST_BY_CHANCE,
            ),
        ]

    @property
    def ok(self) -> bool:
        return self.error is None and self.steps == self.asked and all(check.held for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self), "checks": [check._asdict() for check in self.checks]}


def _short(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _less(small: float | None, large: float | None) -> bool:
    return small is not None and large is not None and small < large


def table(result: SmokeResult) -> FoldedTable:
    """Return a table with a line for each finding."""
    title = f"capstan smoke: {'everything holds' if result.ok else 'NOT OK'} ({result.seconds} s on {result.device})"
    shown = FoldedTable("checked", "measured", "required", "", title=title)
    for check in result.checks:
        shown.add_row(
            check.what, check.measured, check.required, Text("ok", "green") if check.held else Text("FAILED", "red")
        )
    spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in result.phases.items())
    shown.caption = "\n".join(filter(None, (f"The time went into: {spent}." if spent else "", result.error)))
    return shown
