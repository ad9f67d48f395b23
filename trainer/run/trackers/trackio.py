"""trackio, which keeps its curves in a folder of this machine (TRACKIO_DIR), a Space (TRACKIO_SPACE_ID) or on a server of
its own (TRACKIO_SERVER_URL)."""

from trainer.run.records import Record
from trainer.run.trackers.services import ServiceKind
from trainer.run.trackers.tracker import Page, Unshown

_ROWS = 100


class Trackio:
    """One run there for all starts. It knows runs by their name alone, so that has the run's id in it, and it would keep twice
    what it gets twice."""

    name = "trackio"
    seconds = 10.0

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
        # The step that it would give the next points by itself comes after the last that its database has. A server that does
        # not answer now has none, but points for it wait in the folder.
        self._rows = Unshown(max(self._run._next_step - 1, page.shown))

    @property
    def shown(self) -> int:
        return self._rows.shown

    def add(self, record: Record) -> None:
        self._rows.add(record)

    def flush(self) -> None:
        for rows in self._rows.batches(_ROWS):
            for row in rows:
                self._run.log(row.points, step=row.step)

    def close(self) -> None:
        self.flush()
        self._run.finish()


SERVICES = {"trackio": ServiceKind(Trackio, "trackio")}
