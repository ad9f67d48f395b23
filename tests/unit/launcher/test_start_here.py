"""Who a process of `capstan train` is: the driver, the first rank of a group, or one of its others, which wait for it."""

from pathlib import Path

import pytest

from launcher.drive import local
from tests.material import Workshop


@pytest.mark.parametrize(
    ("rank", "silent", "expected"),
    [
        (False, False, ["driver"]),
        (True, False, ["collect", "first rank"]),
        (True, True, ["collect", "wait", "rank"]),
    ],
)
def test_a_process_does_the_work_of_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: bool, silent: bool, expected: list[str]
) -> None:
    done, config = list[str](), Workshop(tmp_path).config("here")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(local, "end_with_agent", lambda: None)
    monkeypatch.setattr(local, "slurm_rank", lambda environment: {})
    monkeypatch.setattr(local, "is_rank", lambda: rank)
    monkeypatch.setattr(local, "is_silent_rank", lambda: silent)
    monkeypatch.setattr(local, "group_name", lambda environment: "group")
    monkeypatch.setattr(local, "imported_rank", lambda config: lambda *_, **__: done.append("rank"))
    for name, word in (
        ("collect_leftovers", "collect"),
        ("wait_for_first_rank", "wait"),
        ("_as_first_rank", "first rank"),
        ("_as_driver", "driver"),
    ):
        monkeypatch.setattr(local, name, lambda *_, word=word, **__: done.append(word))
    local.start(config, resume=False, take_over=False, live=False, log=lambda line: None)
    assert done == expected
