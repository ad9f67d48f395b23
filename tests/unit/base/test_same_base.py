"""A run goes on, is evaluated and is exported over the base that it began with, or not at all."""

import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from launcher.doctor.doctor import check_model
from launcher.drive.sweep import laid_out
from launcher.drive.tune import check_same, train_trial
from launcher.policy.trials import SearchPlan
from launcher.start.check import check, with_found
from tests.material import Workshop, commit
from trainer.base import weight_samples
from trainer.base.base import Base
from trainer.base.describe.description import describe
from trainer.base.find.check import check_whole, hub_commit
from trainer.base.find.locate import resolve_base
from trainer.base.load.cache import cache_key
from trainer.config import dump_config, override
from trainer.errors import ConfigError
from trainer.evaluate.models import settings_of
from trainer.export.trained import resolve_trained_base, trained_config
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.plan.assemble import check_same_base
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps, read_manifest
from trainer.store import store
from trainer.store.safetensors_index import _HEADER_GUESS, read_headers
from trainer.store.store import open_store, read_json


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    workshop = Workshop(tmp_path, "speck", shard_size="4KB")
    config = workshop.config("done")
    commit(workshop.store.sub("done"), config, dataset=workshop.prepare(config).train)
    return workshop


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def one_weight(folder: Path) -> None:
    file = first_file(folder)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def one_byte_of_a_header(folder: Path) -> None:
    file = first_file(folder)
    content = file.read_bytes()
    assert content.count(b'"format":"pt"') == 1
    file.write_bytes(content.replace(b'"format":"pt"', b'"format":"tf"'))


def refusals(workshop: Workshop, *overrides: str) -> list[str]:
    """The sentences of a resume, of what opens a run for evaluations, and of exports."""
    run, config = workshop.store.sub("done"), workshop.config("done", *overrides)
    manifest, found = read_manifest(run, 4), list[str]()
    to = open_store(tempfile.mkdtemp(dir=workshop.folder))
    ways: list[Callable[[], object]] = [
        lambda: check(config, resume=True),
        lambda: resolve_trained_base(run, trained_config(run, manifest).model, manifest),
        lambda: export_adapter(run, to.sub("adapter")),
        lambda: export_merged(run, to.sub("merged")),
    ]
    for way in ways:
        try:
            way()
        except ConfigError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("change", [one_weight, one_byte_of_a_header])
def test_a_base_in_which_something_has_changed_is_refused_by_all(
    workshop: Workshop, change: Callable[[Path], None]
) -> None:
    assert refusals(workshop) == []
    change(workshop.base)
    found = refusals(workshop)
    assert len(found) == 4
    name = first_file(workshop.base).name
    said = f"is not the model that the checkpoint of step 4 was trained on: {name} is another. Put that one back"
    assert all(said in sentence for sentence in found), found


def test_the_same_base_in_another_folder_is_the_same_and_another_one_is_not(workshop: Workshop) -> None:
    moved = workshop.base.rename(workshop.folder / "moved")
    config = workshop.config("done", f"model.base={moved}")
    check(config, resume=True)
    one_weight(moved)
    with pytest.raises(ConfigError, match="is another. Put that one back, or start a run of another name"):
        check(config, resume=True)


def test_a_checkpoint_from_before_there_were_fingerprints_is_taken_as_it_is(workshop: Workshop) -> None:
    run = workshop.store.sub("done")
    manifest = read_manifest(run, 4)
    known = {key: value for key, value in manifest.base.items() if key != "weights"}
    run.put(layout.manifest(4), replace(manifest, base=known, text=None).to_json())
    one_weight(workshop.base)
    assert refusals(workshop) == []


COMMITS = ("a" * 40, "1" * 40)


def hub_cache(workshop: Workshop, cache: Path, commit: str) -> None:
    """The base as huggingface_hub keeps it: the branch `main` is at `commit`."""
    folder = cache / "models--me--tiny"
    for name in ("refs", "blobs", f"snapshots/{commit}"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text(commit)
    for number, file in enumerate(workshop.base.iterdir()):
        # Git has small files itself, by a hash of its own.
        large = file.suffix == ".safetensors" and file != first_file(workshop.base)
        blob = folder / "blobs" / (f"{number:064x}" if large else f"{number:040x}")
        blob.write_bytes(file.read_bytes())
        (folder / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob.name}")


@pytest.fixture
def hub(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a Hub that is out of reach, with the base at the first commit."""
    cache = workshop.folder / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub_cache(workshop, cache, COMMITS[0])
    return cache


def test_a_run_stays_at_the_commit_of_the_hub_that_it_began_with(workshop: Workshop, hub: Path) -> None:
    first, second = COMMITS
    given = workshop.config("hub", "model.base=me/tiny")
    config = with_found(given, check(given, resume=False))
    assert config.model.revision == first
    commit(workshop.store.sub("hub"), config, dataset=workshop.prepare(config).train)
    facts = read_manifest(workshop.store.sub("hub"), 4).base
    assert (facts["commit"], all(len(known) == 64 for known in facts["hashes"].values())) == (first, True)

    hub_cache(workshop, hub, second)  # the branch moves
    assert with_found(config, check(config, resume=True)).model.revision == first
    run = workshop.store.sub("hub")
    for unpinned in (
        False,
        True,
    ):  # as a run that an earlier version began, or a rank of torchrun's that is not the first
        if unpinned:
            run.put(layout.CONFIG, dump_config(given).encode())
            run.put(layout.manifest(4), replace(read_manifest(run, 4), base=facts | {"revision": None}).to_json())
        trained = trained_config(run, read_manifest(run, 4)).model
        assert hub_commit(resolve_trained_base(run, trained, read_manifest(run, 4)).directory) == first
    alone, none = settings_of(run, None, [], base_alone=True)
    assert (alone.model.revision, none) == (first, None)
    said = f"model.base: me/tiny is at commit {second} of the Hub, .* Set model.revision={first}, or start"
    with pytest.raises(ConfigError, match=said):
        check(override(config, "model.revision=main"), resume=True)
    said = (
        f"model.revision: '{second}' would be another model than the checkpoint of step 4, which was trained with"
        f" '{first}'"
    )
    with pytest.raises(ConfigError, match=said):
        settings_of(run, None, [f"model.revision='{second}'"], base_alone=False)

    shutil.rmtree(hub / "models--me--tiny/snapshots" / first)  # neither the Hub nor the cache has it any more
    manifest, to = read_manifest(run, 4), open_store(str(workshop.folder / "out"))
    ways: list[Callable[[], object]] = [
        lambda: check(config, resume=True),
        lambda: resolve_trained_base(run, config.model, manifest),
        lambda: export_adapter(run, to.sub("adapter")),
        lambda: export_merged(run, to.sub("merged")),
    ]
    for way in ways:
        with pytest.raises(ConfigError, match=f"the Hub did not give it at model.revision={first} ") as refused:
            way()
        assert "\n" not in str(refused.value)


def test_trials_of_a_sweep_have_the_base_that_it_began_with(workshop: Workshop, hub: Path) -> None:
    first, second = COMMITS
    tried = "sweep.settings={optim.lr: {grid: [1.0e-3, 1.0e-4]}}"
    config, plan = laid_out(workshop.config("hub", "model.base=me/tiny", tried), resume=False)
    hub_cache(workshop, hub, second)
    kept = SearchPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert [kept.config_of(config, trial).model.revision for trial in kept.trials] == [first, first]

    config, plan = laid_out(workshop.config("local", tried), resume=False)
    folder = workshop.store.sub("local")
    folder.put(layout.CONFIG, dump_config(config).encode())
    folder.put(layout.SWEEP, json.dumps(plan.to_json()).encode())
    own = plan.config_of(config, plan.trials[1])
    check_same(own, plan.base_of(own))
    one_weight(workshop.base)
    assert laid_out(config, resume=True)[1].base_of(own) == plan.base_of(own), "a resume has not forgotten it"
    with pytest.raises(
        ConfigError, match="is not the model that this sweep began with: its weights have changed since"
    ):
        train_trial(own, plan.base_of(own))
    assert not committed_steps(workshop.store.sub("local-2"))


def test_a_quantized_base_of_the_same_shapes_sizes_and_times_is_never_taken_for_another(workshop: Workshop) -> None:
    config = workshop.config("done", "quant.cache=true")
    before, file = cache_key(resolve_base(config.model), config), first_file(workshop.base)
    facts = file.stat()
    one_weight(workshop.base)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert cache_key(resolve_base(config.model), config) != before


def test_a_quantized_base_is_none_of_other_objects_of_a_bucket(workshop: Workshop) -> None:
    config, base = workshop.config("done", "quant.cache=true"), resolve_base(workshop.config("done").model)
    keys = {
        cache_key(replace(base, name="s3://bucket/base", told_versions=[("a.safetensors", 5, version)]), config)
        for version in ("v1", "v2")
    }
    assert len(keys) == 2


def test_a_quantized_base_is_none_of_other_settings_that_decide_its_bytes(workshop: Workshop) -> None:
    base = resolve_base(workshop.config("done").model)
    plain = ["quant.type=nf4", "quant.double=false"]
    others = [
        ["quant.type=fp4", "quant.double=false"],
        ["quant.type=nf4", "quant.double=true"],
        [*plain, "quant.block_size=128"],
        [*plain, "model.dtype=bf16" if workshop.config("done").model.dtype == "fp32" else "model.dtype=fp32"],
        [*plain, "model.layers=1"],
    ]
    keys = [cache_key(base, workshop.config("done", "quant.cache=true", *given)) for given in (plain, *others)]
    assert len(set(keys)) == len(keys)
    assert (
        cache_key(base, workshop.config("done", "quant.cache=true", *plain, "tuning.rank=3", "train.steps=3"))
        == keys[0]
    )


def test_nodes_whose_copies_of_the_base_differ_do_not_train_together(workshop: Workshop) -> None:
    mine = resolve_base(workshop.config("done").model)

    class Nodes:
        """This rank is the first of a second node; those behind it are others of the two."""

        local_rank = 0

        def __init__(self, first: dict[str, str]) -> None:
            self.first = first

        def together(self, action: Callable[[], Any]) -> list[Any]:
            return [("node-1", self.first), ("node-1", None), action(), (action()[0], None)]

    alike: Any = Nodes(mine.samples)
    check_same_base(mine, alike)
    other: Any = Nodes(mine.samples | {first_file(workshop.base).name: "0" * 16})
    with pytest.raises(ConfigError, match="has other weights on .* than on node-1. Copy one of them to every machine"):
        check_same_base(mine, other)


def sparse_base(folder: Path, files: int, tensors: int, bytes_each: int, last: int | None = None) -> Base:
    """Files of zeros that take no room. The last tensor of a file may have a size of its own."""
    folder.mkdir()
    weight_map = dict[str, str]()
    for number in range(files):
        key, names = f"model-{number:05d}.safetensors", [f"layers.{number}.{k}.weight" for k in range(tensors)]
        ends = [*(k * bytes_each for k in range(tensors)), (tensors - 1) * bytes_each + (last or bytes_each)]
        entries = {
            name: {"dtype": "BF16", "shape": [(end - begin) // 2], "data_offsets": [begin, end]}
            for name, (begin, end) in zip(names, pairwise(ends), strict=True)
        }
        header = json.dumps(entries).encode()
        with (folder / key).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + ends[-1])
        weight_map |= dict.fromkeys(names, key)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return opened(folder)


def opened(folder: Path) -> Base:
    return Base(str(folder), folder, open_store(str(folder)), {}, describe({"model_type": "llama"}))


def test_the_samples_of_a_base_of_405b_cost_little_and_show_a_weight_where_they_look_and_there_alone(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "base"
    base = sparse_base(folder, files=191, tensors=6, bytes_each=700_000_000)
    begin = time.process_time()  # the machine may be busy with others
    before = base.samples
    assert time.process_time() - begin < 1
    assert base.store.range_bytes < 16e6 + 191 * _HEADER_GUESS

    headers = read_headers(base.store)
    places = list(weight_samples._places(headers))
    assert {place.key for place in places} == {*headers}
    assert (len(places), sum(place.end - place.begin for place in places)) == (1024, 2**23)
    known = hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16]
    assert known == "18917f74b817b654", "runs of earlier versions know their base by these bytes"
    looked = places[len(places) // 2]
    between = next(at for at in range(looked.end, looked.end + 10**6, 512) if not covered(places, looked.key, at))
    for at, seen in ((looked.begin, True), (between, False)):
        with (folder / looked.key).open("r+b") as file:
            file.seek(at)
            file.write(b"\x01")
        changed = {key for key, value in opened(folder).samples.items() if value != before[key]}
        assert changed == ({looked.key} if seen else set())
        with (folder / looked.key).open("r+b") as file:
            file.seek(at)
            file.write(b"\x00")


def covered(places: list[weight_samples._Range], key: str, at: int) -> bool:
    return any(place.key == key and place.begin <= at < place.end for place in places)


def test_of_a_small_base_every_weight_is_looked_at(tmp_path: Path) -> None:
    base = sparse_base(tmp_path / "base", files=2, tensors=3, bytes_each=1000)
    assert sum(place.end - place.begin for place in weight_samples._places(base.headers)) == 6000
    largest = sparse_base(tmp_path / "largest", files=1, tensors=2, bytes_each=2**22)
    assert len(list(weight_samples._places(largest.headers))) == 1, "a file as a whole, and no sample of its tensors"


def test_a_sample_ends_with_its_tensor(tmp_path: Path) -> None:
    base = sparse_base(tmp_path / "base", files=1, tensors=2, bytes_each=9_000_000, last=1000)
    (header,) = base.headers.values()
    large, small = sorted(weight_samples._places(base.headers), key=lambda place: place.begin)
    assert (small.begin, small.end) == (header.size - 1000, header.size)
    assert large.end - large.begin == 2**22
    assert large.end <= small.begin
    assert base.samples.keys() == {"model-00000.safetensors"}


def test_every_byte_is_hashed_where_that_is_asked_for(tmp_path: Path) -> None:
    base = sparse_base(tmp_path / "base", files=2, tensors=2, bytes_each=5_000_000)
    assert sum(end - begin for _, begin, end in weight_samples._places(base.headers)) == 2**23, (
        "few tensors, long ranges"
    )
    before = weight_samples.hash_whole(base.store, base.headers)
    with (tmp_path / "base/model-00001.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    after = weight_samples.hash_whole(base.store, base.headers)
    assert {key for key in before if before[key] != after[key]} == {"model-00001.safetensors"}


def test_what_is_hashed_so_far_is_told_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = sparse_base(tmp_path / "base", files=1, tensors=1, bytes_each=1000)
    (size,) = (header.size for header in base.headers.values())
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(store, "PART_BYTES", 400)
    found = weight_samples.hash_whole(base.store, base.headers, lambda done, total: told.append((done, total)))
    assert found == {key: hashlib.sha256((tmp_path / "base" / key).read_bytes()).hexdigest() for key in base.headers}
    assert told == [*((done, size) for done in range(400, size, 400)), (size, size)]


def test_a_base_that_was_read_whole_is_compared_whole_from_then_on(workshop: Workshop) -> None:
    run, config = workshop.store.sub("done"), workshop.config("done")
    assert "for the first time" in check_whole(resolve_base(config.model), run)
    assert check_whole(resolve_base(config.model), run) == "every byte is as when it was first read whole"
    name = first_file(workshop.base).name
    one_weight(workshop.base)
    with pytest.raises(ConfigError, match=f"is not what it was: {name} has the SHA-256"):
        check_whole(resolve_base(config.model), run)
    found = check_model(config)
    assert (found.state, name in found.found) == ("missing", True)


def test_what_is_known_of_whole_files_is_what_the_hub_says_or_else_the_run(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, base = workshop.store.sub("done"), resolve_base(workshop.config("done").model)
    check_whole(base, run)
    right: dict[str, str] = read_json(run, layout.BASE_HASHES)
    first = next(iter(right))
    for kept in (b"{", b"[]", json.dumps({first: right[first]}).encode()):
        run.put(layout.BASE_HASHES, kept)
        assert "for the first time" in check_whole(base, run)
        assert read_json(run, layout.BASE_HASHES) == right
    wrong = dict.fromkeys(right, "0" * 64)
    for folder in (run, workshop.store.sub("new")):
        folder.put(layout.BASE_HASHES, json.dumps(wrong).encode())
    assert check_whole(base, workshop.store.sub("new")) == "every byte was read", "it may still get another base"
    monkeypatch.setattr("trainer.base.find.check.hub_hashes", lambda _: right)
    assert check_whole(base, run) == "every byte is as on the Hub"
