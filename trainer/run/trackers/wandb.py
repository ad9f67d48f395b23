"""Weights & Biases. Server, entity, key and mode come from the environment that it documents: WANDB_API_KEY, WANDB_MODE and so on."""

import os

from trainer.run.records import Record
from trainer.run.trackers.services import ServiceKind
from trainer.run.trackers.tracker import Page, Unshown

_ROWS = 100


class WeightsAndBiases:
    """One run there for all starts. Its server says what it has; offline, the run's folder does. It takes steps in order only."""

    name = "wandb"
    seconds = 10.0

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
        self._rows = Unshown(page.shown if self._run.offline else self._run.starting_step - 1)

    @property
    def shown(self) -> int:
        return self._rows.shown

    def add(self, record: Record) -> None:
        self._rows.add(record)

    def flush(self) -> None:
        for rows in self._rows.batches(_ROWS):
            for row in rows:
                self._run.log({**row.points, "_timestamp": row.time}, step=row.step, commit=True)

    def close(self) -> None:
        self.flush()
        self._run.finish(exit_code=0 if self._rows.outcome in ("finished", "stopped") else 1)


SERVICES = {"wandb": ServiceKind(WeightsAndBiases, "wandb")}
