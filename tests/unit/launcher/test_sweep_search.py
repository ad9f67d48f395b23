"""What the process that owns a sweep asks its store and its cluster while Ray Tune runs the trials."""

from pathlib import Path
from typing import Any

import pytest

from launcher.drive import sweep
from launcher.policy.trials import Candidate, planned
from launcher.view.sweep import BY, EARLY
from tests.unit.launcher.test_sweep import LR, config, write_run
from trainer.run import layout
from trainer.run.owner import newest_number, take
from trainer.run.requests import read_stop, request_stop
from trainer.store.store import open_store


def _search(tmp_path: Path, settings: dict[str, Any], **sections: Any) -> sweep._Search:
    whole = config(settings, run={"name": "s", "store": str(tmp_path)}, **sections)
    folder = open_store(str(tmp_path / "s"))
    return sweep._Search(whole, planned(whole), take(folder, BY, newest_number(folder)))


def test_what_trials_share_is_asked_for_until_it_is_there_and_then_no_more(tmp_path: Path) -> None:
    search, store = _search(tmp_path, {"settings": {"optim.lr": LR}, "samples": 2}), open_store(str(tmp_path))
    assert not search._is_made("data/one/manifest.json")
    store.put("data/one/manifest.json", b"{}")
    assert search._is_made("data/one/manifest.json")
    assert not search._is_made("data/two/manifest.json")
    store.delete("data/one/manifest.json")
    assert search._is_made("data/one/manifest.json"), "it is not asked for again"


def test_trials_share_the_manifests_of_their_data_and_of_their_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list[str]()
    monkeypatch.setattr(sweep, "resolve_base", lambda model: found.append(model.base) or model.base)
    monkeypatch.setattr(sweep, "locate", lambda config, base: {"train": f"{base}-{config.tuning.rank}"})
    monkeypatch.setattr(sweep, "cache_key", lambda base, config: f"bases/{base}")
    tried = {"model.base": {"grid": ["a", "b"]}, "tuning.rank": {"grid": [4, 8]}}
    search = _search(tmp_path, {"settings": tried}, quant={"type": "nf4", "cache": True})
    write_run(open_store(str(tmp_path / "s-4")), (40, 2.0), end="finished")
    candidates = [search._candidate(number) for number in (1, 2, 3, 4)]
    assert [one.done for one in candidates] == [False, False, False, True]
    data = [f"{layout.dataset(name)}manifest.json" for name in ("a-4", "a-8", "b-4")]
    bases = [f"bases/{name}/{sweep.BASE_MANIFEST}" for name in "aab"]
    assert [one.makes for one in candidates] == [*map(frozenset, zip(data, bases, strict=True)), frozenset()]
    assert found == ["a", "b"], "each base is looked at once"
    search = _search(tmp_path, {"settings": tried}, quant={"type": "nf4", "cache": False})
    assert search._candidate(1).makes == {data[0]}


@pytest.mark.parametrize(("concurrent", "workers", "room"), [(None, 2, 3), (2, 2, 2), (9, 2, 3), (None, 9, 1)])
def test_as_many_trials_train_at_once_as_the_living_nodes_have_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concurrent: int | None, workers: int, room: int
) -> None:
    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": {"GPU": 4.0, "CPU": 64.0}},
        {"NodeID": "b", "Alive": True, "Resources": {"GPU": 8.0, "CPU": 3.0}},
        {"NodeID": "c", "Alive": False, "Resources": {"GPU": 64.0, "CPU": 64.0}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 12.0})
    cluster = {"workers": workers, "gpus_per_worker": 1, "ray": {"cpus_per_worker": 1}}
    settings = {"settings": {"optim.lr": LR}, **({"concurrent": concurrent} if concurrent else {})}
    assert _search(tmp_path, settings, cluster=cluster)._room(1) == room


def test_who_asks_the_sweep_to_stop_asks_the_trials_that_train(tmp_path: Path) -> None:
    search, runs = _search(tmp_path, {"settings": {"optim.lr": LR}, "samples": 4}), open_store(str(tmp_path))
    running = [Candidate(1), Candidate(2), Candidate(3, done=True)]
    search._early = {2: "early, as others were better at step 10"}
    search._look(running)
    assert read_stop(runs.sub("s-2")) == (EARLY, "early, as others were better at step 10")
    assert not runs.sub("s-1").exists(layout.STOP)
    assert not search._closed
    request_stop(runs.sub("s"), by="somebody")
    first = runs.sub("s-2").get(layout.STOP)
    search._look(running)
    assert read_stop(runs.sub("s-1")) == (BY, "with its sweep")
    assert runs.sub("s-2").get(layout.STOP) == first, "it has been asked already"
    assert not runs.sub("s-3").exists(layout.STOP), "it has ended"
    assert search._closed, "no further trial starts"


def test_a_sweep_that_another_start_has_taken_asks_nobody_and_starts_no_trial(tmp_path: Path) -> None:
    search, runs = _search(tmp_path, {"settings": {"optim.lr": LR}, "samples": 1}), open_store(str(tmp_path))
    take(runs.sub("s"), "capstan resume", newest_number(runs.sub("s")))
    request_stop(runs.sub("s"), by="somebody")
    search._look([Candidate(1)])
    assert search._closed
    assert not runs.sub("s-1").exists(layout.STOP)
