"""Weights & Biases. Server, entity, key and mode come from its own environment variables, such as WANDB_API_KEY."""

import os
from collections.abc import Sequence

from trainer.run.trackers import Page, ServiceKind, StepPoints


class WeightsAndBiases:
    """One run in Weights & Biases for all starts. It takes steps in order only.

    Its server says which steps it has. Offline, the run's folder says so.
    """

    def __init__(self, page: Page) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",  # the run's folder has the logs
            silent=True,
            disable_git=True,  # this directory may hold other code; the run's folder has the run's
            disable_code=True,
        )
        self._run = wandb.init(
            id=page.id,
            name=page.name,
            project=page.project,
            group=page.group,
            tags=page.tags,
            config=dict(page.settings),
            dir=None if os.environ.get("WANDB_DIR") else page.folder,
            resume="allow",
            settings=settings,
        )
        self._run.config.update(dict(page.settings), allow_val_change=True)
        self.shown: int = page.shown if self._run.offline else self._run.starting_step - 1

    def show(self, rows: Sequence[StepPoints]) -> None:
        for row in rows:
            self._run.log({**row.points, "_timestamp": row.time}, step=row.step, commit=True)

    def close(self, outcome: str | None) -> None:
        self._run.finish(exit_code=0 if outcome in ("finished", "stopped") else 1)


SERVICES = {"wandb": ServiceKind(WeightsAndBiases, "wandb")}
ABOUT = {"wandb": "Weights & Biases"}
