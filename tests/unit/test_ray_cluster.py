"""How many ranks find room on a cluster, and what it lacks, from the numbers alone."""

import pytest

from launcher.cluster.ray.cluster import _bundle, fits, local_ray, shortage
from trainer.errors import CapstanError

GPU_RANK = {"CPU": 4.0, "GPU": 1.0}


def test_ranks_are_counted_machine_by_machine():
    free = {"a": {"CPU": 64.0, "GPU": 8.0}, "b": {"CPU": 10.0, "GPU": 8.0}, "head": {"CPU": 64.0}}
    assert fits(free, GPU_RANK) == 8 + 2


def test_a_rank_needs_all_it_asks_for_on_one_machine():
    assert fits({"a": {"CPU": 2.0, "GPU": 1.0}, "b": {"CPU": 2.0, "GPU": 1.0}}, GPU_RANK) == 0


def test_what_is_missing_is_said_in_numbers():
    total = {"CPU": 64.0, "GPU": 8.0, "memory": 100 * 2**30}
    each = {"CPU": 4.0, "GPU": 1.0, "memory": 16.0 * 2**30, "fast_disk": 1.0}
    assert shortage(16, each, total) == (
        "asked for 16 GPUs, the cluster has 8 and asked for 256 GiB of memory, the cluster has 100 and asked for 16 "
        "fast_disk, the cluster has 0"
    )
    assert "busy" in shortage(2, GPU_RANK, total)


def test_what_an_autoscaler_is_asked_for_is_said_in_rays_words():
    assert _bundle({"CPU": 4.0, "GPU": 1.0, "accelerator_type:H100": 0.01}) == (
        '{"CPU": 4, "GPU": 1, "accelerator_type:H100": 0.01}'
    )


def test_a_ray_that_does_not_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    def init(**_options: object) -> None:
        raise Exception("The current node timed out during startup.\nMore.")  # as Ray does itself

    monkeypatch.setattr("ray.init", init)
    said = r"^Ray did not start on this machine: The current node timed out during startup. Try again.$"
    with pytest.raises(CapstanError, match=said), local_ray(1):
        pass
