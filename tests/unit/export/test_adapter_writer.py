"""Which adapters beside the checkpoints are written: those that are missing, until the run stops."""

from pathlib import Path

from tests.material import Workshop, commit
from trainer.export.write.checkpoint_adapters import AdapterWriter
from trainer.run import layout


class Noted(AdapterWriter):
    """Notes the steps instead of exporting them. After `stops_at` the run stops."""

    steps: list[int]
    stops_at: int | None = None

    def _export(self, step: int) -> None:
        self.steps.append(step)
        if step == self.stops_at:
            self._stopping.set()


def written(workshop: Workshop, stops_at: int | None = None) -> list[int]:
    writer = Noted(workshop.store.sub("run"), ("README.md", "adapter_model.safetensors"), lambda line: None)
    writer.steps, writer.stops_at = [], stops_at
    writer.write()
    writer.close(wait=True)
    return writer.steps


def test_what_is_missing_is_written_the_newest_first_until_the_run_stops(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    run, config = workshop.store.sub("run"), workshop.config("run")
    for step in (2, 4, 6):
        commit(run, config, step)
    run.put(f"{layout.adapter(4)}/adapter_config.json", b"{}")  # it is whole
    run.put(f"{layout.adapter(2)}/README.md", b"")  # it is half written
    assert written(workshop) == [6, 2]
    assert written(workshop, stops_at=6) == [6]
