"""Weights & Biases. Server, entity, key and mode come from the environment that it documents: WANDB_API_KEY, WANDB_MODE
and so on.
"""

import os
from collections.abc import Sequence

from trainer.run.trackers.services import ServiceKind
from trainer.run.trackers.tracker import Page, Row


class WeightsAndBiases:
    """One run there for all starts. Its server says what it has; offline, the run's folder does. It takes steps in
    order only.
    """

    def __init__(self, page: Page) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",  # the run's folder has the logs
            silent=True,
            disable_git=True,  # the rank's directory need not be the run's code; the run's folder has that
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

    def show(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({**row.points, "_timestamp": row.time}, step=row.step, commit=True)

    def close(self, outcome: str | None) -> None:
        self._run.finish(exit_code=0 if outcome in ("finished", "stopped") else 1)


SERVICES = {"wandb": ServiceKind(WeightsAndBiases, "wandb")}
ABOUT = {"wandb": "Weights & Biases"}
