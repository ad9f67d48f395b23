"""Which adapters beside the checkpoints are written: those that are missing, until the run stops."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.material import Workshop, commit
from trainer.export.write import checkpoint_adapters
from trainer.export.write.checkpoint_adapters import AdapterWriter, adapters_beside
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


class Held(AdapterWriter):
    """Looks for what is missing until it is let go."""

    def hold(self) -> None:
        self.looks, self.began, self.goes = 0, threading.Event(), threading.Event()

    def _write_missing(self) -> None:
        self.looks += 1
        self.began.set()
        assert self.goes.wait(60)


def test_a_commit_during_a_look_is_looked_for_once_more(tmp_path: Path) -> None:
    writer = Held(Workshop(tmp_path).store.sub("run"), (), lambda line: None)
    writer.hold()
    writer.write()
    assert writer.began.wait(60)
    writer.write()  # this commit came too late for the look that goes on
    writer.write()  # and this one will be seen by the next
    writer.goes.set()
    writer.close(wait=True)
    assert writer.looks == 2


class Running:
    """A process that exports. It says `said` and ends with `code`."""

    def __init__(self, code: int, said: str) -> None:
        self.returncode, self.said, self.killed = code, said, False

    def communicate(self) -> tuple[str, str]:
        return "", self.said

    def kill(self) -> None:
        self.killed = True


@pytest.mark.parametrize(
    ("code", "said", "line"),
    [
        (0, "", "adapter of step 4 written beside its checkpoint in "),
        (3, "a warning\ncapstan: the bucket is gone.\n", "could not be written, which is tried again after the next commit: the bucket is gone."),
        (-9, "", "the adapter of step 4 could not be written, which is tried again after the next commit: it was killed"),
    ],
)  # fmt: skip
def test_an_adapter_is_that_of_its_step_and_takes_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str, line: str
) -> None:
    started, logged = list[Any](), list[str]()

    @contextmanager
    def start(command: list[str], **options: Any) -> Iterator[Running]:
        started.append((command, options["env"]))
        yield Running(code, said)

    monkeypatch.setattr(checkpoint_adapters.children, "start", start)
    run = Workshop(tmp_path).store.sub("run")
    AdapterWriter(run, (), logged.append)._export(4)
    ((command, environment),) = started
    assert command[1:] == [
        *("-m", "trainer.export", run.uri, f"{run.uri}/{layout.adapter(4)}"),
        *("--format", "peft", "--step", "4"),
    ]
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("", "1")
    assert len(logged) == 1
    assert line in logged[0]


def test_a_run_that_stops_kills_the_export_and_says_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, logged = Running(-9, ""), list[str]()

    @contextmanager
    def start(*_: Any, **__: Any) -> Iterator[Running]:
        yield process

    monkeypatch.setattr(checkpoint_adapters.children, "start", start)
    writer = AdapterWriter(Workshop(tmp_path).store.sub("run"), (), logged.append)
    writer._stopping.set()
    writer._export(4)
    assert (process.killed, logged) == (True, [])
    process.killed = False
    writer.close(wait=False)
    assert process.killed


def test_a_run_that_ends_waits_for_the_last_adapter_and_one_that_is_ended_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = list[Any]()

    class Writer:
        def __init__(self, folder: Any, half: Any, log: Any) -> None:
            done.append(half)

        def write(self) -> None:
            done.append("write")

        def close(self, *, wait: bool) -> None:
            done.append(("close", wait))

    monkeypatch.setattr(checkpoint_adapters, "AdapterWriter", Writer)
    nothing: Any = None

    def resolved(adapters: bool) -> Any:
        config = SimpleNamespace(checkpoint=SimpleNamespace(adapters=adapters))
        return SimpleNamespace(config=config, method=SimpleNamespace(file_names=("adapter_model.safetensors",)))

    with adapters_beside(nothing, resolved(True), nothing, writes=True) as after_commit:
        after_commit()
    assert "adapter_model.safetensors" in done[0]
    assert "tokenizer.json" in done[0] or "tokenizer*" in done[0]
    assert done[1:] == ["write", "write", ("close", True)], "what an earlier start has left comes first"
    done.clear()
    with pytest.raises(KeyboardInterrupt), adapters_beside(nothing, resolved(True), nothing, writes=True):
        raise KeyboardInterrupt
    assert done[1:] == ["write", ("close", False)]
    done.clear()
    for writes, adapters in ((False, True), (True, False)):
        with adapters_beside(nothing, resolved(adapters), nothing, writes=writes) as after_commit:
            after_commit()
    assert done == []
