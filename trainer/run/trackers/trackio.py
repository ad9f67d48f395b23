"""trackio stores its curves in a folder of this machine (TRACKIO_DIR), a Space (TRACKIO_SPACE_ID), or its own server.

TRACKIO_SERVER_URL names the server.
"""

from collections.abc import Sequence

from trainer.run.trackers import Page, ServiceKind, StepPoints


class Trackio:
    """One run in trackio for all starts.

    trackio knows runs by their name alone, so the name contains the run's id. trackio would store twice what it gets
    twice.
    """

    def __init__(self, page: Page) -> None:
        import trackio

        self._run = trackio.init(
            page.project,
            name=f"{page.name}-{page.id}",
            group=page.group,
            config={**page.settings, "tags": page.tags},
            resume="allow",
            embed=False,
            auto_log_cpu=False,
        )
        # trackio itself would give the next points the step after the last one in its database. A server that does not
        # answer now has no such step, but points for it wait in the folder.
        self.shown: int = max(self._run._next_step - 1, page.shown)

    def show(self, rows: Sequence[StepPoints]) -> None:
        for row in rows:
            self._run.log(row.points, step=row.step)

    def close(self, outcome: str | None) -> None:
        self._run.finish()


SERVICES = {"trackio": ServiceKind(Trackio, "trackio")}
