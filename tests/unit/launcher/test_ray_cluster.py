"""How many ranks find room on a cluster, and what it lacks, from the numbers alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.cluster.ray import cluster, jobs
from launcher.cluster.ray.cluster import fitting_ranks, joined_ray, local_ray, shortage
from launcher.cluster.ray.keepers import check_spares
from launcher.cluster.ray.sidecars import gpus_for_servers
from launcher.cluster.slurm import submit
from launcher.drive.local import start
from tests.unit.launcher.test_slurm_script import config as slurm_config
from trainer.config import override, parse_config
from trainer.errors import CapstanError, ConfigError

GPU_RANK = {"CPU": 4.0, "GPU": 1.0}


def test_ranks_are_counted_machine_by_machine():
    free = {"a": {"CPU": 64.0, "GPU": 8.0}, "b": {"CPU": 10.0, "GPU": 8.0}, "head": {"CPU": 64.0}}
    assert fitting_ranks(free, GPU_RANK) == 8 + 2
    assert fitting_ranks({"a": {"CPU": 2.0}}, {"CPU": 0.5}) == 4
    assert fitting_ranks(free, {**GPU_RANK, "fast": 0.0}) == 8 + 2, "nobody needs to have what is asked for 0 times"


def test_a_rank_needs_all_it_asks_for_on_one_machine():
    assert fitting_ranks({"a": {"CPU": 2.0, "GPU": 1.0}, "b": {"CPU": 2.0, "GPU": 1.0}}, GPU_RANK) == 0


def test_what_is_missing_is_said_in_numbers():
    total = {"CPU": 64.0, "GPU": 8.0, "memory": 100 * 2**30}
    each = {"CPU": 4.0, "GPU": 1.0, "memory": 16.0 * 2**30, "fast_disk": 1.0}
    assert shortage(16, each, total) == (
        "asked for 16 GPUs, the cluster has 8 and asked for 256 GiB of memory, the cluster has 100 and asked for 16 "
        "fast_disk, the cluster has 0"
    )
    assert not shortage(2, GPU_RANK, total)


def test_a_ray_that_does_not_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    def init(**_options: object) -> None:
        raise Exception("The current node timed out during startup.\nMore.")  # as Ray does itself

    monkeypatch.setattr("ray.init", init)
    said = r"^Ray did not start on this machine: The current node timed out during startup. Try again.$"
    with pytest.raises(CapstanError, match=said), local_ray(1):
        pass


def test_a_ray_of_its_own_has_a_cpu_for_each_rank_and_is_no_clusters(monkeypatch: pytest.MonkeyPatch):
    asked = list[dict[str, Any]]()

    def init(**options: Any) -> None:
        asked.append(options)
        raise Exception("enough")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 4)
    for workers in (1, 9):
        with pytest.raises(CapstanError, match="enough"), local_ray(workers):
            pass
    assert [(options["address"], options["num_cpus"]) for options in asked] == [("local", 4), ("local", 9)]


@pytest.mark.parametrize(
    ("address", "knocked"),
    [("head:6379", [("head", 6379)]), ("[fd00::1]:6379", [("fd00::1", 6379)]), ("ray://head:10001", []), ("auto", [])],
)
def test_a_cluster_is_knocked_at_where_its_address_has_a_host_and_a_port(
    monkeypatch: pytest.MonkeyPatch, address: str, knocked: list[tuple[str, int]]
):
    asked = list[tuple[str, int]]()

    def connect(place: tuple[str, int], timeout: float) -> None:
        asked.append(place)
        raise OSError("nobody listens")

    monkeypatch.setattr(cluster.socket, "create_connection", connect)
    if knocked:
        with pytest.raises(ConfigError, match=r"no Ray cluster answers at .* \(nobody listens\)"):
            cluster._knock(address)
    else:
        cluster._knock(address)
    assert asked == knocked


@pytest.mark.parametrize("address", ["http://head:8265", "https://head"])
def test_a_dashboard_takes_no_driver(address: str):
    said = rf"^cluster.ray.address: '{address}' is the address of a dashboard"
    with pytest.raises(ConfigError, match=said), joined_ray(address):
        pass


INSTALL = r" needs Ray. Install it: pip install 'capstan-llm\[ray\]'.$"


RUN = "{{run: {{name: one, store: {}}}, model: {{base: /m}}, data: {{train: [{{path: d}}]}}, train: {{steps: 2}}}}"


def test_what_needs_ray_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(cluster, "find_spec", lambda package: None if package == "ray" else package)
    run = RUN.format(tmp_path)

    def begin(setting: str) -> None:
        start(parse_config(run, [setting]), resume=False, take_over=False, live=False, log=print)

    with pytest.raises(ConfigError, match=f"^cluster.ray.address: head:6379{INSTALL}"), joined_ray("head:6379"):
        pass
    with pytest.raises(ConfigError, match=f"^A Ray on this machine{INSTALL}"), local_ray(1):
        pass
    with pytest.raises(ConfigError, match=f"^cluster.ray.address: head:6379{INSTALL}"):
        begin("cluster.ray.address=head:6379")
    with pytest.raises(ConfigError, match=f"^cluster.ray{INSTALL}"):
        begin("cluster.ray.address=local")
    assert not [*tmp_path.iterdir()]


def test_slurms_nodes_need_ray_where_they_share_this_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "find_spec", lambda package: None)

    def dry_run(*settings: str) -> None:
        run = slurm_config("cluster.slurm.gpus_per_node=8", "run.store=/runs", *settings)
        submit.submit(run, resume=False, take_over=False, after=None, dry_run=True, log=print)

    with pytest.raises(ConfigError, match=f"^cluster.slurm.launch: ray{INSTALL}"):
        dry_run()
    for elsewhere in ("launch=direct", "python=/opt/bin/python", "container=[apptainer]"):
        with pytest.raises(ConfigError, match="/models/base"):  # the next thing that is missing
            dry_run(f"cluster.slurm.{elsewhere}")


def test_spares_wait_only_where_there_are_several_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here = parse_config(RUN.format(tmp_path), ["cluster.keeper=true", "cluster.spares=1"])
    with pytest.raises(ConfigError, match=r"^cluster.spares: 1 is not possible here: all ranks are on this machine"):
        start(here, resume=False, take_over=False, live=False, log=print)
    with pytest.raises(ConfigError, match="without a cluster all ranks are on this machine"):
        jobs.submit(here, resume=False, take_over=False, dry_run=True, log=print)
    with pytest.raises(ConfigError, match="^cluster.spares: 1 is not possible without cluster.workers"):
        check_spares(here)
    check_spares(override(here, "cluster.workers=2"))


def test_slow_machines_are_replaced_only_where_others_can_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    replaces = ["retry.slow_rank=replace"]
    here = parse_config(RUN.format(tmp_path), replaces)
    with pytest.raises(ConfigError, match=r"^retry.slow_rank: replace is not possible here: all ranks are on this"):
        start(here, resume=False, take_over=False, live=False, log=print)
    with pytest.raises(ConfigError, match="without a cluster all ranks are on this machine"):
        jobs.submit(here, resume=False, take_over=False, dry_run=True, log=print)
    chained = parse_config(RUN.format(tmp_path), [*replaces, "cluster.slurm.chain=2", "cluster.workers=1"])
    with pytest.raises(ConfigError, match=r"the jobs of cluster.slurm.chain are submitted before"):
        submit.submit(chained, resume=False, take_over=False, after=None, dry_run=True, log=print)


def test_nodes_that_a_run_has_left_have_no_room_for_it(monkeypatch: pytest.MonkeyPatch):
    free = {"a": {"CPU": 8.0}, "b": {"CPU": 8.0}}
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: free)
    assert cluster.room({"CPU": 4.0}) == 4
    assert cluster.room({"CPU": 4.0}, ["b"]) == 2
    assert cluster.other_nodes(["a", "b"]) == {"ray.io/node-id": "!in(a, b)"}
    assert cluster.other_nodes([]) is None


def test_a_cluster_that_can_grow_is_asked_once_for_all_ranks_until_there_is_room(monkeypatch: pytest.MonkeyPatch):
    asked, removed, said = list[list[dict[str, float]]](), list[object](), list[str]()
    demand, rooms = SimpleNamespace(wait=lambda _seconds: False), iter((1, 1, 4))

    def group(bundles: list[dict[str, float]], **_: object) -> object:
        asked.append(bundles)
        return demand

    monkeypatch.setattr("ray.util.placement_group", group)
    monkeypatch.setattr("ray.util.remove_placement_group", removed.append)
    monkeypatch.setattr(cluster, "need", lambda _config: cluster.Need(2, 4, GPU_RANK))
    monkeypatch.setattr(cluster, "room", lambda *_: next(rooms))
    monkeypatch.setattr(cluster, "_total", lambda _without: {"CPU": 4.0, "GPU": 1.0})
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.0)
    config = parse_config(RUN.format("/runs"))
    wanted, found = cluster.wait_for_room(config, can_grow=True, log=said.append, stop=lambda: None)
    assert (wanted.most, found) == (4, 4)
    assert (asked, removed) == ([[GPU_RANK] * 4], [demand])
    (line,) = said
    assert "An autoscaler is asked for 4 times" in line


def test_a_machine_that_is_gone_is_lost_at_once_or_within_a_time(monkeypatch: pytest.MonkeyPatch):
    before = {"1": "n1/1", "2": "n2/2"}
    looks = iter([before, {"1": "n1/1"}])
    monkeypatch.setattr(cluster, "alive_nodes", lambda: next(looks))
    assert cluster.lost_nodes(before, within=60) == ["n2/2"]
    monkeypatch.setattr(cluster, "alive_nodes", lambda: before)
    assert cluster.lost_nodes(before, within=0) == []


def test_the_demand_of_a_rank_is_that_of_its_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 8.0, "CPU": 64.0})
    asked = "cluster.ray={memory_per_worker: 4, cpus_per_worker: 2, resources: {fast: 1}}"
    config = parse_config(RUN.format("/runs"), [asked])
    each = {"CPU": 2.0, "GPU": 1.0, "fast": 1.0, "memory": 4 * 2.0**30}
    assert cluster.need(config) == cluster.Need(8, 8, each)
    on_cpus = override(config, "cluster.gpus_per_worker=0", "cluster.ray.memory_per_worker=null")
    assert cluster.need(on_cpus) == cluster.Need(1, 1, {"CPU": 2.0, "fast": 1.0})
    assert cluster.need(override(config, "cluster.workers=2")).most == 2


def test_resources_of_machines_that_a_run_has_left_are_not_there_for_it(monkeypatch: pytest.MonkeyPatch):
    nodes = [{"NodeID": str(number), "Alive": number < 3, "Resources": {"CPU": 4.0}} for number in (1, 2, 3)]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    assert cluster._total(["2", "3"]) == {"CPU": 4.0}, "the third is gone already"


def test_a_cluster_of_another_version_is_said_with_both():
    error = RuntimeError("Version mismatch:\n Ray: 2.1.0\n Python: 3.10.1\nThis process:\n Ray: 2.2.0\n Python: 3.11.7")
    said = str(cluster._not_joined("head:6379", error))
    assert "has Ray 2.1.0 and Python 3.10.1, this machine Ray 2.2.0 and Python 3.11.7." in said
    assert "no Ray cluster answers at 'head:6379' (away)" in str(cluster._not_joined("head:6379", OSError("away")))


@pytest.mark.parametrize(
    ("given", "setting", "variable", "address"),
    [
        (None, None, None, None),
        (None, None, "env:1", "env:1"),
        (None, "mine:1", "env:1", "mine:1"),
        ("auto", "mine:1", "env:1", "auto"),
        (None, "local", "env:1", None),  # starts a Ray here, whatever the environment says
    ],
)
def test_the_cluster_is_the_one_that_is_nearest_to_the_command(
    given: str | None, setting: str | None, variable: str | None, address: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    config = parse_config(RUN.format("/runs"), [f"cluster.ray.address={setting}"] if setting else [])
    assert cluster.address_of(config, given) == address


def waited(
    monkeypatch: pytest.MonkeyPatch,
    rooms: list[int],
    total: dict[str, float],
    can_grow: bool,
    *settings: str,
    **how: Any,
) -> tuple[int, float, list[Any]]:
    """How many of 2 to 4 ranks are started, after how many seconds, and what an autoscaler was asked for.

    There is room for so many ranks in each second, and at last for the last number of them.
    """
    clock, asked, found = [0.0], list[Any](), iter(rooms)

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def group(bundles: list[Any], **selectors: Any) -> Any:
        asked.append(selectors)
        return SimpleNamespace(wait=lambda _: False)

    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr("ray.util.placement_group", group)
    monkeypatch.setattr("ray.util.remove_placement_group", lambda group: None)
    monkeypatch.setattr(cluster, "need", lambda _config: cluster.Need(2, 4, GPU_RANK))
    monkeypatch.setattr(cluster, "room", lambda *_: next(found, rooms[-1]))
    monkeypatch.setattr(cluster, "_total", lambda _without: dict(total))
    config = parse_config(RUN.format("/runs"), settings)
    how = {"log": lambda line: None, **how}
    _, ranks = cluster.wait_for_room(config, can_grow=can_grow, stop=lambda: None, **how)
    return ranks, clock[0], asked


LARGE = {"CPU": 64.0, "GPU": 8.0}


def test_a_run_begins_with_fewer_ranks_once_no_more_room_has_come_for_a_while(monkeypatch: pytest.MonkeyPatch):
    assert waited(monkeypatch, [9], LARGE, False) == (4, 0.0, [])
    assert waited(monkeypatch, [1, 2, 3, 3], LARGE, False) == (3, 2 + 5.0, [])
    said = list[str]()
    assert waited(monkeypatch, [2, 3, 4], LARGE, True, log=said.append) == (4, 2.0, [])
    assert said == [], "it could begin"
    waited(monkeypatch, [1, 1, 2, 4], LARGE, True, log=said.append)
    assert said == [f"waiting for room for 2 ranks: {cluster.BUSY}"]


def test_a_run_waits_for_room_only_if_there_may_be_some(monkeypatch: pytest.MonkeyPatch):
    small, patience = {"CPU": 64.0, "GPU": 1.0}, "cluster.ray.start_timeout=30"
    with pytest.raises(ConfigError, match=r"no room for 2 ranks: asked for 2 GPUs, the cluster has 1\. Lower"):
        waited(monkeypatch, [1], small, False, patience)
    said = r"no room after 30 seconds \(cluster\.ray\.start_timeout\) for 2 ranks: asked for 2 GPUs"
    with pytest.raises(ConfigError, match=said):
        waited(monkeypatch, [1], small, True, patience)
    with pytest.raises(ConfigError, match="no room for 2 ranks: the cluster's machines are busy"):
        waited(monkeypatch, [1], LARGE, False, patience)
    assert waited(monkeypatch, [1] * 20 + [4], LARGE, False, patience) == (4, 20.0, [])
    chosen = {"bundle_label_selector": [{"ray.io/node-id": "!in(a)"}] * 4}
    assert waited(monkeypatch, [1, 4], small, True, without=["a"]) == (4, 1.0, [chosen])
    served = ("objective.name=grpo", "rollout.reward=exact", "rollout.engine=serve", "rollout.serve.gpus=7")
    with pytest.raises(ConfigError, match="asked for 2 GPUs, the cluster has 1, beside the 7 GPUs of its servers"):
        waited(monkeypatch, [1], LARGE, False, *served)


def test_ranks_have_the_gpus_that_are_left_by_the_servers(monkeypatch: pytest.MonkeyPatch):
    served = ("objective.name=grpo", "rollout.reward=exact", "rollout.engine=serve", "rollout.serve.gpus=3")
    for gpus, ranks, each in ((8.0, 5, 1.0), (3.0, 1, 0.0)):
        monkeypatch.setattr("ray.cluster_resources", lambda gpus=gpus: {"GPU": gpus})
        found = cluster.need(parse_config(RUN.format("/runs"), served))
        assert (found.fewest, found.most, found.each.get("GPU", 0.0)) == (ranks, ranks, each)


def test_servers_get_gpus_beside_those_of_the_ranks_and_give_them_back(monkeypatch: pytest.MonkeyPatch):
    asked, removed, total = list[Any](), list[Any](), {"GPU": 16.0}
    there = iter([False, True])
    group = SimpleNamespace(wait=lambda _seconds: next(there, False))
    monkeypatch.setattr("ray.util.placement_group", lambda bundles, strategy: asked.append(bundles) or group)
    monkeypatch.setattr("ray.util.remove_placement_group", removed.append)
    monkeypatch.setattr("ray.cluster_resources", lambda: total)
    serve = "rollout={engine: serve, reward: exact, serve: {replicas: 2, gpus: 4}}"
    config = parse_config(RUN.format("/runs"), ["objective.name=grpo", serve, "cluster.workers=8"])
    with gpus_for_servers(config, can_grow=False, log=print, stop=lambda: None) as found:
        assert (found, asked, removed) == (group, [[{"GPU": 4.0}] * 2], [])
    assert removed == [group]
    total["GPU"] = 15.0
    refused = pytest.raises(ConfigError, match="has no room for 2 x 4 GPUs for servers and 8 for ranks: ")
    with refused, gpus_for_servers(config, can_grow=False, log=print, stop=lambda: None):
        pass
    assert removed == [group] * 2
