"""A toy tracker: a line of text for each step, in the run's folder on this machine."""

from collections.abc import Sequence
from pathlib import Path

from trainer.run.trackers import Page, ServiceKind, StepPoints


class Diary:
    def __init__(self, page: Page) -> None:
        assert page.folder is not None
        self.shown: int = page.shown
        self._file = Path(page.folder, "diary.txt")

    def show(self, rows: Sequence[StepPoints]) -> None:
        self._write("".join(f"step {row.step}: {', '.join(sorted(row.points))}\n" for row in rows))

    def close(self, outcome: str | None) -> None:
        self._write(f"{outcome}\n")

    def _write(self, text: str) -> None:
        with self._file.open("a") as file:
            file.write(text)


SERVICES = {"diary": ServiceKind(Diary, "json")}
ABOUT = {"diary": "a line of text for each step, in the run's folder"}
