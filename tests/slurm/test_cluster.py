"""The virtual cluster itself: it is a real Slurm, stays apart from others, and ends with everything on it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.needs import need
from tests.slurm.cluster import NETWORK, PROGRAMS, Cluster, missing


def test_nodes_have_addresses_host_names_and_gpus_of_their_own(cluster: Cluster) -> None:
    show = 'echo "$(hostname) $(hostname -I) $CUDA_VISIBLE_DEVICES $SLURM_GPUS_ON_NODE"'
    seen = cluster.run("srun", "--nodes=2", "--exclude=n2", "--gpus-per-node=2", "bash", "-c", show)
    assert sorted(seen.splitlines()) == [f"n1 {NETWORK}.11  0,1 2", f"n3 {NETWORK}.13  0,1 2"]


def test_a_cluster_ends_with_everything_on_it_also_when_a_test_fails(
    cluster: Cluster, make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    """And one beside another, with the same names and addresses, does not touch it."""
    devices = os.listdir("/sys/class/net")
    pids: list[int] = []

    def fail_while_a_job_runs() -> None:
        with make_cluster(tmp_path / "other", nodes=2) as other:
            other.run("sbatch", "--nodes=2", "--output=/dev/null", "--wrap", "srun /bin/sleep 1000", cwd=tmp_path)
            other.wait_until(
                lambda: all("/bin/sleep 1000" in other.processes(node).values() for node in other.nodes),
                30,
                "the job runs on both nodes",
            )
            pids.extend([*other.processes("n1"), *other.processes("n2")])
            assert cluster.processes("n2") == {}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_a_job_runs()
    assert len(pids) >= 4  # the batch script, srun, and the task on each node
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert os.listdir("/sys/class/net") == devices
    assert set(cluster.states().values()) == {"IDLE"}


def test_a_node_that_is_powered_off_is_gone_and_comes_back(
    make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    with make_cluster(tmp_path / "cluster", nodes=1, gpus=1) as alone:
        alone.power_off("n1")
        alone.boot("n1")
        alone.wait_until(lambda: alone.states() == {"n1": "IDLE"}, 30, "n1 is back")
        assert alone.run("srun", "hostname") == "n1\n"


def test_traffic_between_nodes_is_counted(cluster: Cluster) -> None:
    before = cluster.received_bytes("n2")
    cluster.run("srun", "--nodelist=n2", "wc", "-c", input="x" * 1_000_000)
    assert 1_000_000 < cluster.received_bytes("n2") - before < 1_500_000


def test_a_machine_that_cannot_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert missing() == f"a virtual Slurm cluster needs root, {', '.join(PROGRAMS)} (.ci/run installs the programs)"


def test_what_this_machine_lacks_skips_a_test_and_in_ci_fails_it() -> None:
    need(None)
    with pytest.raises(pytest.skip.Exception, match="it needs root"):
        need("it needs root", {})
    with pytest.raises(pytest.fail.Exception, match="it needs root"):
        need("it needs root", {"CI": "true"})
