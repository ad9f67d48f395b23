"""A checkpoint knows no world size, is refused where it does not belong, and a damaged one is passed over."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import saving
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.config import dump_config
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps, read_manifest, write_doubt
from trainer.store.store import Store

SAVED = [2, 3]  # steps, beside the loop's own save of the first


class Saved:
    """A run of two ranks with LoRA rank `rank`, saved after steps 2 and 3, and its states at the end."""

    def __init__(self, workshop: Workshop, folder: Path, rank: int) -> None:
        self.workshop, self.name = workshop, f"saved-{rank}"
        # Two optimizer groups with different learning rates.
        self.overrides = (f"tuning.rank={rank}", "optim.lora_plus_ratio=4", "checkpoint.every_steps=0")
        folder.mkdir()
        self.arguments = self.of(self.name)
        self.updates = launch(2, saving.train_and_save, *self.arguments, SAVED, str(folder))
        self.states = whole(folder)

    def of(self, name: str, *more: str) -> tuple[str, str]:
        config = self.workshop.config(name, *self.overrides, *more)
        return dump_config(config), self.workshop.prepare(config).train

    def copy(self, name: str) -> Store:
        root = self.workshop.folder / "store"
        shutil.copytree(root / self.name, root / name)
        return self.workshop.store.sub(name)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """The ranks' intervals of each state, put together."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in folder.glob("*.safetensors"):
        for key, value in load_file(file).items():
            name, _, begin = key.rpartition("|")
            pieces.setdefault(name, []).append((int(begin), value))
    assert pieces
    return {
        name: torch.cat([value for _, value in sorted(parts, key=lambda part: part[0])])
        for name, parts in pieces.items()
    }


def assert_bitwise_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(
    scope="module", params=[3, pytest.param(7, marks=pytest.mark.long)], ids=lambda rank: f"lora-rank-{rank}"
)
def saved(request: pytest.FixtureRequest, workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(workshop, tmp_path_factory.mktemp("saved") / "states", request.param)


@pytest.fixture(scope="module")
def small(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(workshop, tmp_path_factory.mktemp("small") / "states", 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(4, marks=pytest.mark.long)])
def test_every_optimizer_tensor_comes_back_bit_for_bit(saved: Saved, tmp_path: Path, world_size: int) -> None:
    results = launch(world_size, saving.restore, *saved.arguments, str(tmp_path))
    assert all(result["step"] == 3 and result["updates"] == 3 for result in results), results
    assert all(result["half"] for result in results), "16-bit weights are not the masters'"
    assert_bitwise_equal(whole(tmp_path), saved.states)
    assert any(state.any() for name, state in saved.states.items() if name.endswith("|exp_avg_sq"))


def test_a_manifest_names_the_optimizers_groups_with_their_hyperparameters(small: Saved) -> None:
    groups = read_manifest(small.workshop.store.sub(small.name), 3).groups
    assert {name: group["lr_ratio"] for name, group in groups.items()} == {"lora_A": 1.0, "lora_B": 4.0}
    assert groups["lora_B"].keys() == {"lr_ratio", "betas", "eps", "weight_decay"}


def test_a_changed_hyperparameter_counts_from_the_resume_on_and_is_told(small: Saved, tmp_path: Path) -> None:
    (result,) = launch(
        1, saving.restore, *small.of(small.name, "optim.lora_plus_ratio=2", "optim.eps=1e-6"), str(tmp_path)
    )
    assert result["outcome"] == "finished"
    assert result["log"] == [
        "optimizer group lora_A: eps is 1e-06 from now on; the checkpoint was saved with 1e-08",
        "optimizer group lora_B: lr_ratio is 2.0 from now on; the checkpoint was saved with 4.0",
        "optimizer group lora_B: eps is 1e-06 from now on; the checkpoint was saved with 1e-08",
    ]


def test_a_shard_holds_what_learns_and_nothing_else(saved: Saved) -> None:
    run = saved.workshop.store.sub(saved.name)
    manifest = read_manifest(run, 3)
    states = sum(state.numel() for state in saved.states.values()) * 4
    headers = 2 * 40_000
    assert states < manifest.size < states + headers
    assert all("lora_" in name for name in manifest.shapes)


def flip_a_byte(run: Store, key: str) -> None:
    data = bytearray(run.get(key))
    data[-5] ^= 0x10
    run.put(key, bytes(data))


def truncate(run: Store, key: str) -> None:
    run.put(key, run.get(key)[:-100])


# Without its manifest there is no checkpoint to pass over, so only a shard can be missing.
@pytest.mark.parametrize(
    ("what", "damage"),
    [
        ("shard", flip_a_byte),
        ("shard", truncate),
        ("shard", Store.delete),
        ("manifest", flip_a_byte),
        ("manifest", truncate),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_on_all_ranks(small: Saved, tmp_path: Path, what: str, damage: Any) -> None:
    name = f"damaged-{what}-{damage.__name__}"
    run = small.copy(name)
    key = layout.manifest(3) if what == "manifest" else read_manifest(run, 3).shards[1].key
    damage(run, key)
    results = launch(2, saving.restore, *small.of(name), str(tmp_path))
    assert [(result["outcome"], result["step"], result["updates"]) for result in results] == [("finished", 2, 2)] * 2
    lines = [line for result in results for line in result["log"]]
    assert any("skipped" in line and key in line for line in lines), lines
    assert whole(tmp_path).keys() == small.states.keys()


@pytest.mark.parametrize(("doubted", "restored"), [([], 3), ([3], 2), ([3, 2, 1], 3)])
def test_a_checkpoint_in_doubt_is_passed_over_if_there_is_one_without(
    small: Saved, tmp_path: Path, doubted: list[int], restored: int
) -> None:
    name = "doubted-" + "-".join(map(str, doubted))
    run = small.copy(name)
    for step in doubted:
        write_doubt(run, [step], read_manifest(run, step).generation, "rank 1 computes another gradient")
    results = launch(2, saving.restore, *small.of(name), str(tmp_path))
    assert [(result["outcome"], result["step"]) for result in results] == [("finished", restored)] * 2
    lines = [line for result in results for line in result["log"]]
    for step in doubted:
        assert any(f"checkpoint of step {step} passed over, because it is in doubt: rank 1" in line for line in lines)
    assert any("there is no checkpoint without doubt, so that of step 3 is" in line for line in lines) == (
        doubted == [3, 2, 1]
    )


@pytest.mark.parametrize(("doubted", "step"), [(True, 2), (False, 3)])
def test_an_update_in_memory_is_newer_than_a_checkpoint_in_doubt(small: Saved, doubted: bool, step: int) -> None:
    """The update before those in doubt is kept, so the start need not go back to an older checkpoint."""
    name = f"memory-{doubted}"
    found = {"step": step, "same": [step], "memory": doubted}
    assert launch(2, saving.restore_beside_memory, *small.of(name), doubted) == [found] * 2
    assert committed_steps(small.workshop.store.sub(name))[0] == (1 if doubted else 3), "step 3 comes again"


@pytest.mark.parametrize("shard", [0, 1])
def test_a_flipped_bit_is_found_in_each_shard_by_ranks_of_another_number(
    small: Saved, tmp_path: Path, shard: int
) -> None:
    name = f"flipped-{shard}"
    run = small.copy(name)
    key = read_manifest(run, 3).shards[shard].key
    flip_a_byte(run, key)
    results = launch(3, saving.restore, *small.of(name), str(tmp_path))
    assert [result["step"] for result in results] == [2, 2, 2]
    assert all(f"{key} does not match its sha256" in result["log"][0] for result in results)


def test_a_manifest_of_a_newer_version_is_an_error_on_all_ranks_and_never_passed_over(
    small: Saved, tmp_path: Path
) -> None:
    run = small.copy("newer")
    tree = json.loads(run.get(layout.manifest(3)))
    run.put(layout.manifest(3), json.dumps({**tree, "format": 99}).encode())
    results = launch(2, saving.restore, *small.of("newer"), str(tmp_path))
    assert [(result["outcome"], result["exit_code"]) for result in results] == [("StorageError", 6)] * 2
    assert "is of format 99; this version reads format 3. Use the version that wrote it." in results[1]["message"]


def test_a_run_goes_on_past_a_damaged_checkpoint_and_commits_its_step_again(small: Saved, tmp_path: Path) -> None:
    run = small.copy("again")
    flip_a_byte(run, read_manifest(run, 3).shards[1].key)
    for outcome in launch(2, saving.restore_and_train, *small.of("again"), 3):
        assert (outcome["outcome"], outcome["message"]) == ("finished", "")
    launch(1, saving.restore, *small.of("again"), str(tmp_path))
    assert_bitwise_equal(whole(tmp_path), small.states)
    assert len([entry for entry in run.list(layout.checkpoint(3)) if "manifest.damaged" in entry.key]) == 1


@pytest.mark.parametrize("what", ["shards", "manifests"])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(small: Saved, tmp_path: Path, what: str) -> None:
    name = f"all-damaged-{what}"
    run = small.copy(name)
    for step in committed_steps(run):
        flip_a_byte(run, read_manifest(run, step).shards[0].key if what == "shards" else layout.manifest(step))
    results = launch(2, saving.restore_and_train, *small.of(name), 3)
    assert [(result["outcome"], result["exit_code"]) for result in results] == [("StorageError", 6)] * 2
    assert f"no checkpoint of {run.uri} is whole" in results[0]["message"]


@pytest.mark.parametrize(
    ("setting", "base", "words"),
    [
        ("tuning.rank=5", "ours", ("adapter rank", "2", "5")),
        ("tuning.alpha=7", "ours", ("adapter alpha", "16", "7")),
        ("tuning.rank=2", "another", ("base fingerprint", "ours", "another")),
    ],
)
def test_a_checkpoint_of_another_adapter_or_base_is_refused_with_both_values(
    small: Saved, tmp_path: Path, setting: str, base: str, words: tuple[str, ...]
) -> None:
    results = launch(2, saving.restore, *small.of(small.name, setting), str(tmp_path), base)
    assert [(result["outcome"], result["exit_code"]) for result in results] == [("ConfigError", 2)] * 2
    assert all(word in results[0]["message"] for word in words), results[0]["message"]


def test_a_generation_that_was_overtaken_must_not_commit(small: Saved) -> None:
    run = small.workshop.store.sub("overtaken")
    for generation in (1, 2):
        run.put(layout.metrics(generation), b"")
    outcomes = launch(2, saving.save_as_generation, *small.of("overtaken"), 1)
    assert [(outcome["outcome"], outcome["exit_code"]) for outcome in outcomes] == [("Superseded", 6)] * 2
    assert "generation 2 of this run has started; generation 1 must not commit" in outcomes[0]["message"]
    assert committed_steps(run) == []
    assert launch(2, saving.save_as_generation, *small.of("overtaken"), 2)[0]["outcome"] == "finished"
    assert committed_steps(run) == [1]


def test_a_manifest_is_plain_json_whose_shards_hold_what_the_rule_says(small: Saved) -> None:
    """The rule of docs/checkpoint-format.md, applied by hand."""
    run = small.workshop.store.sub(small.name)
    body = json.loads(run.get(layout.manifest(3)))["body"]
    for name, shape in body["shapes"].items():
        numel = torch.Size(shape).numel()
        length = -(-numel // len(body["shards"]))
        for rank, shard in enumerate(body["shards"]):
            tensors = load_file(run.uri.removeprefix("file://") + "/" + shard["key"])
            begin, end = min(numel, rank * length), min(numel, (rank + 1) * length)
            assert tensors[f"{name}|master"].numel() == end - begin
