"""Compiling over the machines of a cluster gives what one machine gives, also when one of them is lost."""

import json
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster.ray import data as cluster_data
from launcher.cluster.ray.cluster import joined_ray
from launcher.cluster.ray.data import map_on_cluster
from tests.compiled import compile_dataset
from tests.material import Workshop, byte_tokenizer
from tests.ray.cluster import Driver, ray_cluster, write
from tests.ray.tasks import die, idle, returned, where
from trainer.config import Data
from trainer.data.compile.compile import Progress
from trainer.data.dataset.manifest import DatasetManifest
from trainer.data.source.files import expand
from trainer.data.source.reading import batches
from trainer.data.source.rows import Batch, Lines
from trainer.errors import DataError
from trainer.store.store import open_store

ENOUGH = 2**20
"""Bytes of rows that the processes of a cluster compile here, as a sixteenth of what a run needs for that tells as
much.
"""


def texts(folder: Path, rows: int) -> Data:
    path = folder / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"row {number} " * (number % 50 + 1)}) + "\n" for number in range(rows))
    )
    return Data.model_validate({"train": [{"path": str(path)}], "format": "text", "sequence_length": 256})


def build(
    data: Data, folder: Path, mapper: Any = None, progress: Callable[[Progress], None] = lambda now: None
) -> DatasetManifest:
    files = expand(data.train, "data.train")
    store = open_store(str(folder))
    return compile_dataset(data, files, byte_tokenizer(), store, "f" * 20, mapper=mapper, progress=progress).manifest


@pytest.mark.long
def test_all_machines_compile_and_one_of_them_may_be_lost(tmp_path: Path) -> None:
    data = texts(tmp_path, 20_000)
    alone = build(data, tmp_path / "alone")
    with ray_cluster(2, cpus=1) as cluster, joined_ray(str(cluster.address)):
        (file,) = expand(data.train, "data.train")
        work = ((batch, None) for batch in cycle(batches(file)))
        seen = set[str]()
        for machine, _ in map_on_cluster(print, idle, work, partial(returned, where)):
            seen.add(machine)
            if len(seen) == 2:  # one of them may be slow to begin
                break

        machines = cluster.list_all_nodes()

        def lose_a_machine(now: Progress) -> None:
            if now.bytes_done and len(machines) == 3:
                cluster.remove_node(machines.pop(), allow_graceful=False)

        assert build(data, tmp_path / "cluster", partial(map_on_cluster, print, idle), lose_a_machine) == alone
        assert len(machines) == 2


@pytest.mark.long
def test_rows_that_kill_every_process_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_data, "_RETRIES", 1)
    batch = Batch("rows.jsonl", 129, Lines([b"{}"], begins=False), 2)
    with (
        ray_cluster(1) as cluster,
        joined_ray(str(cluster.address)),
        pytest.raises(DataError, match=r"rows.jsonl: the rows from 129 on .* died 2 times"),
    ):
        list(map_on_cluster(print, idle, [(batch, None)], partial(returned, die)))


@pytest.mark.long
def test_data_build_compiles_on_the_cluster_of_the_run(workshop: Workshop, tmp_path: Path) -> None:
    row = json.dumps({"prompt": "p " * 30, "completion": "c " * 30})
    many = tmp_path / "many.jsonl"
    many.write_text(f"{row}\n" * (ENOUGH // len(row) + 1))
    less = f"from trainer.data.compile import pool; pool.BYTES_FOR_PROCESSES = {ENOUGH}"
    with ray_cluster(1) as cluster:
        settings = (f"data.train=[{{path: {many}}}]", f"cluster.ray.address={cluster.address}")
        config = write(tmp_path, workshop, "build", *settings)
        with Driver(tmp_path, "data", "build", config, "--json", before=less) as driver:
            assert driver.end() == 0, driver.log.read_text()
            assert "compiling on the 2 CPUs of the Ray cluster" in driver.log.read_text()
            assert json.loads(driver.last_line("{"))["train"]["documents"] == many.read_text().count("\n")
