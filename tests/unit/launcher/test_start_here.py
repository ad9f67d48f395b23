"""Who a process of `capstan train` is: the driver, the first rank of a group, or one of its others, which wait for it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.drive import local
from trainer.config import Config, parse_config
from trainer.errors import ConfigError, DataError


def a_config(folder: Path, *overrides: str) -> Config:
    text = "run: {{name: here, store: {}}}\nmodel: {{base: /m}}\ndata: {{train: [{{path: d}}]}}\ntrain: {{steps: 2}}"
    return parse_config(text.format(folder), overrides)


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
    done, config = list[str](), a_config(tmp_path)
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
    waits = list[Any]()
    wait = local.wait_for_first_rank
    monkeypatch.setattr(local, "wait_for_first_rank", lambda config, group: waits.append(group) or wait(config, group))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    local.start(config, resume=False, take_over=False, live=False, log=lambda line: None)
    assert done == expected
    assert waits == ["group"] * silent
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    local.start(config, resume=False, take_over=False, live=False, log=lambda line: None)
    assert waits == ["group", None][: 2 * silent], "torchrun ends this rank itself"
    monkeypatch.setenv("LOCAL_RANK", "1")
    done.clear()
    local.start(config, resume=False, take_over=False, live=False, log=lambda line: None)
    assert "collect" not in done, "one process of a machine does so"


HEARD = ("resume", "take_over", "by", "group", "again", "live")


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What a start does, step by step, and how; ranks end with an error."""
    steps = list[tuple[str, dict[str, Any]]]()

    def step(name: str, result: Any = None) -> Any:
        def taken(*_: Any, **how: Any) -> Any:
            steps.append((name, {key: value for key, value in how.items() if key in HEARD}))
            if isinstance(result, Exception):
                raise result
            return result

        return taken

    @contextmanager
    def claimed(*_: Any, **how: Any) -> Iterator[str]:
        step("claimed")(**how)
        yield "owner"

    base = SimpleNamespace(versions=[("w", 5 * 10**9, "")])
    checked = SimpleNamespace(base=base, config=None)
    for name, result in (
        ("check_local_device", None),
        ("check_servers_here", None),
        ("typed_elsewhere", None),
        ("check_ray", None),
        ("check", checked),
        ("prepare", "data"),
        ("forget_given_up", None),
        ("keep_report", None),
        ("drive", None),
    ):
        monkeypatch.setattr(local, name, step(name, result))
    monkeypatch.setattr(local, "claimed", claimed)
    monkeypatch.setattr(local, "about_type", lambda *_: "bf16 is slow here")
    monkeypatch.setattr(local, "with_found", lambda config, resolved: config)
    monkeypatch.setattr(local, "keep_code", lambda log: None)
    monkeypatch.setattr(local, "preparing", lambda *_: nullcontext())
    monkeypatch.setattr(local, "sidecars_here", lambda *_: nullcontext())
    monkeypatch.setattr(local, "imported_rank", lambda gpus: step("rank", DataError("line 7")))
    monkeypatch.setattr(local, "address_of", lambda config: config.cluster.ray.address)
    monkeypatch.setattr(local, "ranks_here", lambda config: 2)
    return steps


KEPT = ("cluster.workers=2", "cluster.keeper=true")
REFUSED = [("retry.slow_rank=replace", "retry.slow_rank: replace"), ("cluster.spares=1", "cluster.spares: 1")]


def test_the_first_rank_of_a_group_checks_claims_compiles_and_leaves_a_report(
    done: list[tuple[str, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("TORCHELASTIC_RESTART_COUNT", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    how, said = {"resume": True, "take_over": True}, list[str]()
    with pytest.raises(DataError, match="line 7"):
        local._as_first_rank(a_config(tmp_path), **how, log=said.append)
    assert done == [
        ("check_local_device", {}),
        ("check_servers_here", {}),
        ("check", {**how, "again": "torchrun-x"}),
        ("claimed", {**how, "by": "capstan resume", "group": "torchrun-x", "again": "torchrun-x"}),
        ("prepare", {}),
        ("forget_given_up", {}),
        ("rank", {"resume": True}),
        ("keep_report", {}),
    ]
    assert said == ["bf16 is slow here"]
    done.clear()
    for setting, words in REFUSED:
        with pytest.raises(ConfigError, match=words):
            local._as_first_rank(a_config(tmp_path, setting, *KEPT), **how, log=said.append)
    assert done == [], "nothing is begun"


def test_a_driver_checks_before_it_claims_and_drives(
    done: list[tuple[str, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    how = {"resume": False, "take_over": True}

    def drive(*settings: str) -> list[str]:
        done.clear()
        local._as_driver(a_config(tmp_path, *settings), **how, live=True, log=said.append)
        return [name for name, _ in done]

    assert drive() == ["check_local_device", "check", "claimed", "drive"]
    assert done[1:] == [
        ("check", how),
        ("claimed", {**how, "by": "capstan train"}),
        ("drive", {"resume": False, "live": True}),
    ]
    assert [line.partition(" are read")[0] for line in said] == ["bf16 is slow here", "5.0 GB of the base"]
    for setting, words in REFUSED:
        with pytest.raises(ConfigError, match=words):
            drive(setting, *KEPT)
        assert done == [], "nothing is begun"
    said.clear()
    monkeypatch.setattr(local, "typed_elsewhere", lambda config, log: config)
    on_cluster = ["check_ray", "check", "claimed", "drive"]
    assert drive("cluster.ray.address=head:6379", "cluster.spares=1", *KEPT) == on_cluster
    assert not any("bf16" in line for line in said), "that is of this machine's processor"
    monkeypatch.setattr(local, "ranks_here", lambda config: None)
    assert drive() == ["check_local_device", *on_cluster], "more than this machine has, which Ray gives or refuses"
