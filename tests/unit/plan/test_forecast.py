"""A plan begins with what was asked: fits or not, how long, how much; by what is known of the GPU, of the data and of
other runs.
"""

import gzip
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from rich.console import Console

from launcher.plan import planning
from launcher.plan.planning import Planned, machine_of, measured_rate, plan_run
from launcher.plan.summary import show_plan
from tests.material import Workshop
from tests.unit.repository.test_examples import LLAMA_8B
from tests.unit.run.made_records import NOW, start, step, write
from trainer.base.describe.description import describe
from trainer.base.find.locate import known_config
from trainer.base.find.media.sound import SOUND
from trainer.base.find.media.still import STILL
from trainer.base.find.media.video import VIDEO
from trainer.config import Config, dump_config, override, parse_config
from trainer.data.compile import length as lengths
from trainer.data.compile.length import EpochLength, EpochPictures, epoch_length
from trainer.data.dataset.manifest import read_manifest
from trainer.data.dataset.pictures import PICTURE
from trainer.data.format.row_format import PICTURES
from trainer.data.order.settings import Position, bins_in
from trainer.errors import ConfigError, DataError, DoesNotFit
from trainer.plan.flops import work_of
from trainer.plan.forecast import UTILISATION, PictureWork, Rate, assumed_rate, forecast, length_of
from trainer.plan.gpus import Gpu, find_gpu, read_gpu
from trainer.plan.plan import make_plan
from trainer.processes.devices import LocalGpu
from trainer.processes.ranks import World
from trainer.store.store import Store, open_store
from trainer.train.horizon import horizon_of

ROOT = Path(__file__).parents[3]
RUN = "run: {name: demo}\nmodel: {base: /models/tiny}\ndata: {train: [{path: a.jsonl}]}\ntrain: {steps: 10}\n"
H100 = read_gpu("H100", "--gpu")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("forecast"))


@pytest.mark.parametrize(
    ("text", "name", "memory"),
    [
        ("80", "", 80 * 2**30),
        ("80GiB", "", 80 * 2**30),
        ("24GB", "", 24 * 10**9),
        ("24 gb", "", 24 * 10**9),
        ("40GB", "", 40 * 10**9),  # no part of a card's name
        ("0.5", "", 2**29),
        ("40960MiB", "", 40 * 2**30),
        ("H100", "H100", 81559 * 2**20),
        ("h100", "H100", 81559 * 2**20),
        ("H100-80GB", "H100", 81559 * 2**20),
        ("NVIDIA H100 80GB HBM3", "H100", 81559 * 2**20),
        ("NVIDIA H100 PCIe", "H100 PCIe", 81559 * 2**20),
        ("A100-80GB", "A100 80GB", 80 * 2**30),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 80 * 2**30),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB", 40 * 2**30),
        ("A100", "A100 40GB", 40 * 2**30),
        ("A100-40G", "A100 40GB", 40 * 2**30),
        ("a100 80GiB", "A100 80GB", 80 * 2**30),
        ("RTX 4090", "RTX 4090", 24564 * 2**20),
        ("rtx4090", "RTX 4090", 24564 * 2**20),
        ("4090", "RTX 4090", 24564 * 2**20),
        ("L40S", "L40S", 46068 * 2**20),
        ("L40", "L40", 46068 * 2**20),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 49140 * 2**20),
    ],
)
def test_a_gpu_is_given_by_its_memory_or_by_its_name(text: str, name: str, memory: int) -> None:
    found = read_gpu(text, "--gpu")
    assert (found.name, found.memory) == (name, memory)
    assert (found.flops is None) == (not name)


@pytest.mark.parametrize(
    "text", ["nan", "inf", "0", "-3", "", "1e3", "2000000", "80 GiB GiB", "RTX", "NVIDIA", "P100", "GPU"]
)
def test_what_is_no_gpu_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_gpu(text, "--gpu")
    assert str(refused.value).startswith("--gpu: ")
    assert "\n" not in str(refused.value)


def test_a_gpu_that_is_nearly_named_is_suggested_and_a_lesser_card_is_no_other() -> None:
    with pytest.raises(
        ConfigError, match=r"'H10O' is no GPU that is known here\. Did you mean H100\? Give its memory, such as"
    ):
        read_gpu("H10O", "--gpu")
    assert find_gpu("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert find_gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_an_epoch_is_estimated_by_the_files_until_it_is_compiled(shop: Workshop) -> None:
    config = shop.config("plain")
    size = shop.data.stat().st_size
    guessed = epoch_length(config, shop.base, shop.store)
    assert guessed == EpochLength(round(size / 4), -(-size // 4 // 64), file_bytes=size)
    held = epoch_length(override(config, "data.held_out=0.5"), shop.base, shop.store)
    assert held is not None
    assert held.tokens == round(size / 8)
    counted = epoch_length(override(config, "data.held_out=30"), shop.base, shop.store)
    assert counted is not None
    assert counted.tokens == pytest.approx(size / 8, rel=0.02), "30 of 60 rows"
    for taken, tokens in (("take: 0.25", size / 16), ("take: 15", size / 16), ("take: 600", size / 4)):
        some = epoch_length(override(config, f"data.train=[{{path: {shop.data}, {taken}}}]"), shop.base, shop.store)
        assert some is not None
        assert some.tokens == pytest.approx(tokens, rel=0.02), taken
    packed = shop.folder / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(shop.data.read_bytes()))
    more = epoch_length(override(config, f"data.train=[{{path: {packed}}}]"), shop.base, shop.store)
    assert more is not None
    assert (more.tokens, more.file_bytes) == (round(3 * packed.stat().st_size / 4), packed.stat().st_size)
    some = epoch_length(override(config, f"data.train=[{{path: {packed}, take: 15}}]"), shop.base, shop.store)
    assert some is not None
    assert some.tokens == pytest.approx(more.tokens / 4, rel=0.02), "15 of 60 rows"
    alone = epoch_length(override(config, "data.packing=false"), shop.base, shop.store)
    assert alone is not None
    assert alone.rows is None, "nobody knows how many rows the file has"

    datasets = shop.prepare(config)
    tokens = read_manifest(shop.store, datasets.train).tokens
    compiled = epoch_length(config, shop.base, shop.store)
    assert compiled == EpochLength(tokens, -(-tokens // 64), compiled=True)
    reserving = epoch_length(override(config, "tuning={method: prompt, virtual_tokens: 16}"), shop.base, shop.store)
    assert reserving is not None
    assert reserving.compiled
    assert reserving.rows == -(-(tokens + 16 * read_manifest(shop.store, datasets.train).documents) // 80)
    twice = override(config, f"data.train=[{{path: {shop.data}, weight: 2}}]")
    weighted = epoch_length(twice, shop.base, shop.store)
    assert weighted is not None
    assert weighted.tokens == 2 * tokens
    single = epoch_length(override(twice, "data.packing=false"), shop.base, shop.store)
    assert single is not None
    assert single.rows == 2 * read_manifest(shop.store, datasets.train).documents
    assert epoch_length(override(config, "data.train=[{path: gone.jsonl}]"), shop.base, shop.store) is None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lengths, "find_train", lambda config: pytest.fail("a plan downloads nothing"))
        assert epoch_length(override(config, "data.train=[{path: hf://nobody/nothing}]"), shop.base, shop.store) is None

    counted = shop.prepare(override(config, "train.epochs=1.5"))
    part = override(config, "train.epochs=1.5")
    known = epoch_length(part, shop.base, shop.store)
    assert known is not None
    assert list(known.bins) == list(map(bins_in, counted.epochs))
    length = length_of(part, known)
    assert (length.steps, length.epochs, length.counted) == (
        horizon_of(part.train, counted.epochs, 0, Position()).steps,
        1.5,
        True,
    )
    assert length.tokens == round(1.5 * tokens)


def test_the_files_of_an_epoch_are_counted_by_their_kinds_from_small_to_large(monkeypatch: pytest.MonkeyPatch) -> None:

    def found(*of: tuple[int, int], weights: Sequence[float] = (1.0,)) -> list[EpochPictures]:
        """The first source has these files, in documents of 200 tokens together. Each other one has 300 tokens."""
        entries = np.zeros(len(of), PICTURE)
        for number, (modality, tokens) in enumerate(of):
            entries[number]["modality"], entries[number]["tokens"] = modality, tokens
            entries[number]["height"], entries[number]["width"] = 10 * tokens, 20 * tokens

        def read(numbers: Any) -> Any:
            own = entries[: 0 if numbers[0] else None]
            values, tokens = (
                own.view(np.uint8).reshape(len(own), PICTURE.itemsize),
                np.zeros(300 if numbers[0] else 200),
            )
            return SimpleNamespace(columns={PICTURES: [values]}, parts=[tokens])

        data = SimpleNamespace(
            blocks=np.arange(len(weights) + 1),
            offsets=np.cumsum([0, 200, *[300] * (len(weights) - 1)]),
            block_sources=np.arange(len(weights)),
            read=read,
        )
        monkeypatch.setattr("trainer.data.dataset.dataset.open_chapter", lambda store, key, chapter: data)
        return list(lengths._pictures(open_store("memory://pictures"), "key", weights))

    stills = [(STILL.number, tokens) for tokens in (5, 1, 8, 3, 2, 7, 4, 6)]
    sounds, videos = [(SOUND.number, 9), (SOUND.number, 3)], [(VIDEO.number, 99)]
    sizes = ((20, 40), (40, 80), (60, 120), (80, 160))
    pictures, *others = found(*sounds, *stills, *videos)
    assert pictures == EpochPictures(36 / 200, 4.5, sizes, STILL.number)
    assert [(one.modality, one.tokens, one.share) for one in others] == sorted(
        [(SOUND.number, 6, 12 / 200), (VIDEO.number, 99, 99 / 200)]
    )
    # Half of the pictures are visited, and text four times.
    (mixed,) = found(*stills, weights=(0.5, 4.0, 0.0))
    assert mixed == EpochPictures(18 / 1300, 4.5, sizes, STILL.number)


def test_a_plan_loads_no_library_of_numbers_whatever_it_looks_at(tmp_path: Path) -> None:
    """These take longer to load than the plan takes: rows of a text, what is compiled of them and runs of the store
    need none.
    """
    shop = Workshop(tmp_path)
    texts = shop.config("plain", "data.format=auto", "data.sequence_length=48", "train.steps=null", "train.epochs=2")
    tables = override(texts, f"data.train=[{{path: {tmp_path}/rows.parquet}}]")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"prompt": "a", "completion": "b"}] * 9), f"{tmp_path}/rows.parquet"
    )
    plan_run(texts, None, None)  # the architecture is read

    def loaded(config: Config) -> tuple[bool, set[str]]:
        """Whether the plan counts what is compiled, and the libraries that it has imported."""
        (tmp_path / "run.yaml").write_text(dump_config(config))
        command = [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "launcher.cli",
            "plan",
            str(tmp_path / "run.yaml"),
            "--json",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        return json.loads(done.stdout)["length"]["compiled"], imported & {"numpy", "pyarrow", "torch", "transformers"}

    assert loaded(texts) == (False, set())
    assert loaded(tables) == (False, {"numpy", "pyarrow"}), "which a Parquet file needs"
    shop.prepare(texts)
    ran(shop, texts, device="cpu")
    assert loaded(override(texts, "cluster.gpus_per_worker=0")) == (True, set())


def test_steps_follow_from_epochs_and_epochs_from_steps() -> None:
    epoch = EpochLength(tokens=400_000, rows=1000)
    config = parse_config(RUN, ["train.global_batch=16"])
    of_steps = length_of(config, epoch)
    assert (of_steps.steps, of_steps.epochs, of_steps.counted) == (10, 10 / 63, True)
    of_epochs = length_of(override(config, "train.epochs=2.5"), epoch)
    assert (of_epochs.steps, of_epochs.tokens, of_epochs.counted) == (63 + 63 + 32, 1_000_000, False)
    assert length_of(override(config, "train.epochs=2.5"), None).steps is None
    # A tenth of 1,600 rows is 10 steps, though 0.1 of a computer is a little more than a tenth.
    tenth = length_of(override(config, "train.epochs=0.1"), EpochLength(tokens=400_000, rows=1600))
    assert (tenth.steps, tenth.tokens) == (10, 40_000)


def test_time_is_the_operations_of_a_step_over_the_peak_that_is_assumed_and_cost_follows() -> None:
    """Six operations a token and weight with the forward pass repeated, four of the head and of down-projections,
    which nobody repeats, and eight of LoRA's own.
    """
    config = parse_config(RUN, ["data.sequence_length=4096", "train.global_batch=16", "track.price_per_gpu_hour=2.5"])
    base = describe(LLAMA_8B, None)
    products = 6 * 6_979_321_856 - 2 * 32 * 4096 * 14336 + 4 * 128256 * 4096 + 8 * 41_943_040
    attention = 4 * 4 * 4096 * 32 * 4096 / 2  # all pairs that a causal mask leaves
    rate = assumed_rate(config, base.architecture, H100, recomputed=1)
    assert rate is not None
    assert rate.tokens_per_second == pytest.approx(0.3 * 989e12 / (products + attention), rel=0.001)
    assert UTILISATION == 0.3
    times = []
    for ranks in (1, 8):
        plan = make_plan(config, base, ranks, ranks, None)
        found = forecast(config, plan.batch, length_of(config, None), rate)
        assert found is not None
        assert found.seconds == pytest.approx(10 * 16 * 4096 / rate.tokens_per_second / ranks)
        assert found.cost == pytest.approx(2.5 * found.seconds * ranks / 3600)
        times.append(found.seconds)
    assert times[0] == pytest.approx(8 * times[1])
    spared = forecast(config, make_plan(config, base, 8, 8, None).batch, length_of(config, None), rate, waiting=8)
    assert spared is not None
    assert (spared.seconds, spared.cost) == (times[1], pytest.approx(2.5 * times[1] * 16 / 3600))
    # 12 ranks take 16 rows in two turns, as 8 ranks do.
    uneven = forecast(config, make_plan(config, base, 12, 12, None).batch, length_of(config, None), rate)
    assert uneven is not None
    assert uneven.seconds == pytest.approx(times[1])
    # Nor do two ranks a row, or two rows at a time, change what a GPU computes in a second.
    for changed, share in (("sharding.sequence_parallel=2", 2), ("train.micro_batch=2", 1)):
        other = override(config, changed)
        same = assumed_rate(other, base.architecture, H100, recomputed=1)
        assert same is not None
        assert same.tokens_per_second == pytest.approx(rate.tokens_per_second)
        assert same.seconds_a_row == pytest.approx(rate.seconds_a_row / share)
        alike = forecast(other, make_plan(other, base, 8, 8, None).batch, length_of(other, None), same)
        assert alike is not None
        assert alike.seconds == pytest.approx(times[1])
        seen = PictureWork(((8, 8),), share=0.5, tokens=64, operations=1e11, seconds=0.0, cores=1)
        more = assumed_rate(other, base.architecture, H100, recomputed=1, pictures=seen)
        assert more is not None
        extra = 4096 * 0.5 * 1e11 / (0.3 * 989e12)
        assert more.seconds_a_row - same.seconds_a_row == pytest.approx(extra), "each rank sees all pictures of a row"
    full = override(config, "tuning.method=full", "quant.type=none")
    slower = assumed_rate(full, base.architecture, H100, recomputed=1)
    assert slower is not None
    assert rate.tokens_per_second / slower.tokens_per_second == pytest.approx(8 / 5.46, rel=0.05)
    kept = assumed_rate(config, base.architecture, H100, recomputed=0)
    assert kept is not None
    assert kept.tokens_per_second / rate.tokens_per_second == pytest.approx(5.46 / 4, rel=0.05)
    assert assumed_rate(override(config, "model.dtype=fp32"), base.architecture, H100, recomputed=1) is None
    on_cpus = override(config, "cluster.gpus_per_worker=0")
    free = forecast(on_cpus, make_plan(on_cpus, base, 8, 8, None).batch, length_of(on_cpus, None), rate)
    assert free is not None
    assert (free.seconds, free.gpu_hours, free.cost) == (times[1], None, None), "CPUs are no GPU hours"
    assert assumed_rate(config, base.architecture, Gpu("", 80 * 2**30), recomputed=1) is None


def test_experts_in_few_bits_take_the_time_of_what_decoding_them_moves() -> None:
    """All of them a micro-batch, whatever its tokens: codes and scales are read, and values of 16 bits written."""
    found = known_config("Qwen/Qwen3-30B-A3B")
    assert found is not None
    model = describe(found, None).architecture
    plain, packed = (
        parse_config(RUN, ["data.sequence_length=4096", "train.global_batch=16", f"quant.type={name}"])
        for name in ("none", "nf4")
    )
    for recomputed in (0.0, 1.0):
        before, after = (assumed_rate(config, model, H100, recomputed) for config in (plain, packed))
        assert before is not None
        assert after is not None
        moved = (2 + recomputed) * (0.5625 + 2) * 48 * 128 * 3 * 2048 * 768 / (0.9 * 3350e9)
        assert after.seconds_a_row - before.seconds_a_row == pytest.approx(moved)


@pytest.mark.parametrize(
    ("tokens", "rows", "shared", "recomputed"),
    [(32768, 1, 1, 0.0), (32768, 2, 2, 1.0), (512, 1, 1, 0.0), (256, 2, 1, 1.0)],
)
def test_experts_take_the_time_of_their_products_or_of_reading_them_and_of_what_their_kernels_move(
    tokens: int, rows: int, shared: int, recomputed: float
) -> None:
    """Beside that, the rest of the model takes what it would take alone."""
    found = known_config("Qwen/Qwen3-30B-A3B")
    assert found is not None
    model = describe(found, None).architecture
    rest = replace(model, parameters=tuple(part for part in model.parameters if part.kind != "experts"))
    settings = (f"data.sequence_length={tokens}", f"train.micro_batch={rows}", f"sharding.sequence_parallel={shared}")
    config = parse_config(RUN, ["quant.type=none", *settings])
    rate = assumed_rate(config, model, H100, recomputed)
    assert rate is not None
    passes, speed = 2 + recomputed, 0.9 * 3350e9
    weights = 48 * 128 * 3 * 2048 * 768  # of which a token visits those of 8 of 128 experts
    operations = 2 * passes * weights * 8 / 128 * tokens * rows / shared
    products = max(operations / (0.65 * 989e12), passes * 2 * weights / speed)
    # Of each expert that a token visits: three inner widths, and a hidden state in and out.
    forward, backward = (48 * 8 * (of_inner * 3 * 768 + 2 * 2048) for of_inner in (1, 5 / 3))
    experts = products / rows + 2 * ((1 + recomputed) * forward + backward) * tokens / shared / speed
    # A layer without experts would not repeat the last product of attention.
    of_rest = work_of(config, rest, recomputed, "H100").of_row(tokens) + recomputed * 2 * 48 * 2048 * 4096 * tokens
    seconds = of_rest / (0.3 * 989e12) / shared + experts
    assert rate.seconds_a_row == pytest.approx(seconds)
    assert f". Experts take {experts / seconds:.0%} of the time, by their bytes and products" in rate.basis


def ran(shop: Workshop, config: Config, *, device: str, steps: int = 20, name: str = "before", at: float = NOW) -> None:
    """A run of `steps` steps of two seconds on two ranks."""
    run = shop.store.sub(name)
    run.put("config.yaml", dump_config(config).encode())
    write(run, 1, {**start(1, world_size=2), "device": device}, *(step(n, 2.0, at + n) for n in range(1, steps + 1)))


def test_a_run_of_the_store_that_did_the_same_work_is_a_measurement(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shop.config("next", "train.global_batch=8")
    store = open_store(str(shop.folder / "measured"))
    there = Workshop.__new__(Workshop)
    there.store = store
    card = "cuda:0 (NVIDIA H100 80GB HBM3)"
    assert measured_rate(store, config, H100) is None
    ran(there, config, device=card)
    rate = measured_rate(store, config, H100)
    assert rate is not None
    # Four rows a rank and step of two seconds; of 1000 tokens in two seconds each rank has half.
    assert (rate.seconds_a_row, rate.tokens_per_second, rate.run) == (0.5, 250.0, "before")
    assert "the run before of this store trained 250 tokens/s a rank, on 2 (NVIDIA H100 80GB HBM3)" in rate.basis
    assert measured_rate(store, config, None) == rate
    monkeypatch.chdir(shop.folder)
    assert measured_rate(store, override(config, "model.base=base"), H100) == rate

    for other in (
        *("data.sequence_length=128", "tuning.method=dora", "train.micro_batch=2", "model.layers=1"),
        *("model.dtype=fp32", "quant.type=fp4", "tuning.targets=[q_proj]", "train.activation_checkpointing=all"),
    ):
        assert measured_rate(store, override(config, other), H100) is None, other
    assert (
        measured_rate(store, override(config, "train.global_batch=64", "train.steps=9", "optim.lr=1e-3"), H100) == rate
    )
    assert measured_rate(store, config, read_gpu("A100", "--gpu")) is None
    assert measured_rate(store, override(config, "cluster.gpus_per_worker=0"), None) is None

    ran(there, config, device="cpu", name="later", at=NOW + 1000)
    assert measured_rate(store, config, None) == rate, "it was on CPUs"
    on_cpu = measured_rate(store, override(config, "cluster.gpus_per_worker=0"), None)
    assert on_cpu is not None
    assert "(CPUs)" in on_cpu.basis
    ran(there, config, device=card, name="short", steps=11, at=NOW + 2000)
    assert measured_rate(store, config, H100) == rate, "too few steps"
    ran(there, config, device=card, name="newest", at=NOW + 3000)
    newest = measured_rate(store, config, H100)
    assert newest is not None
    assert newest.run == "newest"

    together = override(config, "sharding.sequence_parallel=2")
    there.store = open_store(str(shop.folder / "together"))
    ran(there, together, device=card)
    shared = measured_rate(there.store, together, H100)
    assert shared is not None
    assert shared.seconds_a_row == 0.25, "two ranks share a row, so a step of eight rows is eight rows long"


def test_a_store_that_does_not_answer_is_asked_once(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request waits for some seconds; the plan does without what it would find."""
    asked = list[str]()

    def listen(name: str) -> None:
        plain = getattr(Store, name)
        monkeypatch.setattr(Store, name, lambda store, *key: asked.append(f"{name} {store.uri}") or plain(store, *key))

    for name in ("exists", "get", "children"):
        listen(name)

    def requests(*overrides: str) -> set[str]:
        asked.clear()
        config = shop.config("demo", "cluster.gpus_per_worker=0", *overrides)
        assert not plan_run(config, None, None).length.compiled
        return {request.split()[0] for request in asked if config.run.store in request}

    assert requests(f"run.store={shop.folder}/empty") == {"exists", "get", "children"}
    monkeypatch.setattr(planning, "_STORE_SECONDS", 0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert requests("run.store=s3://bucket/runs") == {"exists"}


def shown(planned: Planned, config: Config) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(show_plan(planned, config))
    return out.getvalue()


@pytest.fixture
def config(shop: Workshop) -> Config:
    return shop.config(
        "shown", "run.store=memory://", "model.dtype=bf16", "train.steps=1000", "track.price_per_gpu_hour=2"
    )


def test_machines_that_wait_are_asked_for_and_paid(config: Config) -> None:
    two = override(config, "cluster.workers=3", "cluster.slurm={nodes: 2, gpus_per_node: 2}", "cluster.keeper=true")
    without, planned = (plan_run(override(two, f"cluster.spares={spares}"), "H100", 2) for spares in (0, 1))
    assert without.forecast
    assert planned.forecast
    assert planned.forecast.cost == pytest.approx(5 / 3 * (without.forecast.cost or 0)), "three GPUs and two that wait"
    assert planned.forecast.seconds == without.forecast.seconds
    said = "spares: the run asks for 3 machines with 2 GPUs each, 2 for its ranks and 1 that wait (cluster.spares)"
    assert f"{said}. GPU hours and cost count them" in planned.plan.notes
    assert not any("spares" in note for note in without.plan.notes)


def test_the_first_lines_say_whether_it_fits_and_what_it_takes(config: Config) -> None:
    text = shown(plan_run(config, "H100", None), config)
    first = text.splitlines()[:7]
    assert [line.split()[0] for line in first] == ["memory", "counted", "length", "data", "time", "cost", "basis"]
    assert "(activations, logits, gathered layers); 768.0 MiB allowed for the device" in first[1]
    assert "fits: " in first[0]
    assert "of 79.6 GiB on its GPU (H100, as asked for)" in first[0]
    assert "1,000 steps of 4 rows of 64 tokens" in first[2]
    assert "4 bytes a token; `capstan data build` counts them" in first[3]
    assert "evaluations, commits and waits for the network" in " ".join(text.split())
    measured = plan_run(config, "H100", None)
    assert measured.forecast
    by_a_run = replace(measured, forecast=replace(measured.forecast, run="other"))
    assert "without loading, evaluations and commits" in " ".join(shown(by_a_run, config).split())
    assert "waits for the network" not in shown(by_a_run, config)
    assert "at 2 a GPU hour (track.price_per_gpu_hour)" in first[5]
    assert "30% of the 989 that the data sheet of H100 says for bf16. The share is assumed, not measured" in text

    unclear = replace(
        plan_run(config, "H100", None), plan=replace(plan_run(config, "H100", None).plan, unrecognised=["it has more"])
    )
    assert "not known whether it fits: " in shown(unclear, config)
    assert unclear.to_json()["fits"] is None

    small = plan_run(config, "0.5GB", None)
    assert "does not fit: " in shown(small, config)
    assert "of 476.8 MiB on its GPU (as asked for)" in shown(small, config)
    with pytest.raises(DoesNotFit, match="memory: "):
        small.check()
    with pytest.raises(DataError, match="memory: "):
        replace(small, data_missing=True).check()
    with pytest.raises(ConfigError, match="memory: "):
        replace(small, data_missing=True, plan=replace(small.plan, mismatches=["a setting is wrong"])).check()
    assert "no estimate, as only the GPU's memory is known" in shown(small, config)
    assert small.to_json()["fits"] is False


def test_the_gpu_is_that_of_the_job_or_of_this_machine_where_none_is_named(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(gpu: str | None = None, *overrides: str) -> Planned:
        return plan_run(override(config, *overrides), gpu, None)

    local = [LocalGpu("NVIDIA L40S", 46068 * 2**20), LocalGpu("NVIDIA L40S", 45000 * 2**20)]
    monkeypatch.setattr(planning, "described_gpus", lambda: local)
    monkeypatch.setattr(planning, "why_slow", lambda *_: None)
    here = plan()
    assert (here.gpu, here.whose) == (Gpu("NVIDIA L40S", 45000 * 2**20, 362e12, 864e9), "this machine")
    assert here.plan.batch.world_size == 2, "a rank for each GPU, as train makes them"
    served = override(config, "objective.name=grpo", "rollout.engine=serve")
    assert machine_of(served, None, None).world_size == 1, "the other GPU serves"
    of_nodes = override(served, "cluster.slurm={nodes: 2, gpus_per_node: 4}", "rollout.serve={replicas: 2, gpus: 1}")
    assert machine_of(of_nodes, None, None)[:2] == (6, 4), "two of the job's eight serve"
    few = override(config, "cluster.workers=2", "cluster.slurm.gpus_per_node=8")
    assert machine_of(few, None, None)[:2] == (2, 2)
    assert "on each of 2 GPUs (NVIDIA L40S, of this machine)" in shown(here, config)
    assert plan("H100").plan.batch.world_size == 1
    assert plan(None, "cluster.gpus_per_worker=0").gpu is None
    job = plan(None, "cluster.slurm.nodes=2", "cluster.slurm.gpus_per_node=8", "cluster.slurm.gpu_type=h100")
    assert (job.gpu, job.whose, job.plan.batch.world_size) == (H100, "cluster.slurm.gpu_type", 16)
    assert plan(None, "cluster.slurm.gpus_per_node=8").gpu is None, "this machine is no node of the job"
    monkeypatch.setattr(planning, "described_gpus", list)
    nowhere = plan()
    assert nowhere.fits is None
    assert "which GPU is not known: --gpu H100 or --gpu 24GB compares" in shown(nowhere, config)
    assert {"gpu": None, "estimate": None}.items() <= nowhere.to_json().items()


def test_json_has_the_numbers_that_are_shown(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = Rate(seconds_a_row=0.25, tokens_per_second=256.0, basis="measured: a run", run="before")
    monkeypatch.setattr(planning, "measured_rate", lambda *_: rate)
    tree: dict[str, Any] = plan_run(config, "A100-80GB", None).to_json()
    assert (tree["fits"], tree["gpu"]["name"], tree["gpu"]["whose"]) == (True, "A100 80GB", "given")
    assert tree["length"]["steps"] == 1000
    expected = {"step_seconds": 1.0, "seconds": 1000.0, "run": "before", "basis": "measured: a run"}
    assert expected.items() <= tree["estimate"].items()
    assert tree["estimate"]["cost"] == pytest.approx(2 * 1000 / 3600)
    assert {"parameters", "batch", "memory_per_gpu", "shortfalls"} <= tree.keys()


def test_a_rank_on_cpus_has_its_share_of_half_of_what_is_left_as_ranks_find_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 12 * 2**30
    monkeypatch.setattr(planning, "host_memory_left", lambda: left)
    monkeypatch.setattr("trainer.processes.ranks.host_memory_left", lambda: left)
    on_cpus = override(config, "cluster.gpus_per_worker=0", "cluster.workers=3")
    world = World(0, 3, 3, 0, torch.device("cpu"))
    monkeypatch.setattr(World, "gather", lambda self, *numbers: [numbers] * 3)
    assert machine_of(on_cpus, None, None).host_memory == world.least_host_memory() == 2 * 2**30


def test_layers_are_computed_again_as_the_run_will_decide_or_it_is_said_that_it_will(config: Config) -> None:
    layers = plan_run(config, "H100", None).plan.layers
    on_cpus = plan_run(override(config, "cluster.gpus_per_worker=0"), None, None)
    unknown = plan_run(config, None, None)
    assert on_cpus.plan.recomputed_layers == 0, "a small base, and this machine has room"
    assert not [note for note in on_cpus.plan.notes if "computed again" in note]
    assert unknown.plan.recomputed_layers == layers
    assert "auto counts all layers as computed again here" in unknown.plan.notes[0]
