"""What a stranger would add, in a copy of the packages: each is one new file or folder, and nothing is edited."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.material import make_base, make_data, make_pairs
from tests.stored import edit_config

# The tests that go over whatever there is, or compare it with what is said of it elsewhere.
LISTING = (
    "tests/unit/config",
    *(
        f"tests/unit/repository/test_{name}.py"
        for name in ("architecture_page", "contracts", "examples", "imports", "pages")
    ),
    "tests/unit/tuning",
    "tests/unit/launcher/test_shell.py",
    "tests/unit/launcher/test_words.py",
    "tests/unit/plan/test_objective.py",
    "tests/dist/test_restore.py",
)
ROOT = Path(__file__).parents[3]
TOYS = ROOT / "tests/toys"


def run(copy: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return done.stdout


def _made(folder: str, names: list[str]) -> set[str]:
    """What is no part of the repository: caches, and what `make` and runs have written at its root."""
    at_root = {"build", "runs", "smoke"} if Path(folder) == ROOT else set[str]()
    caches = {"__pycache__", ".venv", ".git", ".servers", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    return (caches | at_root) & set(names)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages with what Python has compiled of them, which is valid for files of the same time, and the additions
    among their files.
    """
    copy = tmp_path_factory.mktemp("stranger")
    for package in ("trainer", "launcher", "ds_configs"):
        shutil.copytree(ROOT / package, copy / package)
    there = {path for path in (TOYS / "added").rglob("*.py") if (copy / path.relative_to(TOYS / "added")).exists()}
    assert there == set(), "an addition is a new file"
    shutil.copytree(TOYS / "added", copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def found(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return json.loads(run(copy, str(TOYS / "stranger.py"), str(tmp_path_factory.mktemp("base"))))


def test_a_method_has_a_setting_of_its_own(found: dict[str, Any]) -> None:
    assert found["method"]["identity"] == {"method": "loha", "rank": 16, "alpha": 32.0, "spread": 0.2}
    assert found["method"]["refused"] == "tuning.spread: has no effect with tuning.method: lora. Remove it."
    assert "Did you mean 'spread'?" in found["method"]["mistyped"]


def test_an_objective_over_pairs_is_a_formula_with_its_settings(found: dict[str, Any]) -> None:
    assert found["objective"]["identity"] == {"name": "gap", "gap": 3.0}
    assert found["objective"]["loss"] == 0.0  # tokens are exp(3) times as likely, as the setting asks
    assert found["objective"]["refused"] == "objective.gap: has no effect with objective.name: orpo. Remove it."


def test_a_stored_format_is_read_and_listed(found: dict[str, Any]) -> None:
    assert found["stored"]["values"] == [3.0, -4.0]
    assert ", halves," in found["stored"]["refused"].partition("Readable are ")[2]


def test_a_format_of_rows_is_recognised_and_named(found: dict[str, Any]) -> None:
    assert found["rows"] == {
        "form": "riddle (riddle, solution)",
        "row": {
            "messages": [{"role": "user", "content": "What has hands?"}, {"role": "assistant", "content": "A clock."}]
        },
        "fields": {"solution": "answer"},
    }


def test_a_way_to_hold_weights_is_a_setting_and_an_export(found: dict[str, Any]) -> None:
    assert found["held"] == {
        "sizes": {"weight": 24, "scales": 12},
        "refused": "quant.double: true has no effect with quant.type: rows8. Remove it, or set quant.type: nf4.",
        "mistyped": (
            "quant.type: 'row8' is not allowed. Allowed are fp4, int8, nf4, none, rows8, stored. Did you mean rows8?"
        ),
        "exported": "base and adapter, merged, in rows8",
    }


def test_the_schema_and_the_page_of_settings_list_what_is_new(found: dict[str, Any]) -> None:
    assert found["listed"] == ["spread", "loha", "diary", "gap", "riddle", "largest_every", "rows8"]


def test_a_verb_runs_and_is_in_the_help(copy: Path, found: dict[str, Any]) -> None:
    assert run(copy, "-m", "launcher.cli", "greet", "--loud") == "HELLO\n"
    assert found["verbs"][0] == "doctor"
    assert "greet" in found["verbs"]
    assert "Ways to say hello." in run(copy, "-m", "launcher.cli", "greetings", "-h")


def test_a_figure_is_on_reports_and_on_the_board_and_grows_there(copy: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from launcher.board.pages import Pages\n"
        "from launcher.report.report import read_report\n"
        "from trainer.store.store import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "store.put('demo/config.yaml', b'run: {name: demo}\\nmodel: {base: b}\\n')\n"
        "steps = [json.dumps({'kind': 'step', 'step': at, 'loss': 1 / at, 'time': 1.7e9 + at}) for at in (1, 2, 3)]\n"
        "store.put('demo/metrics/000001.jsonl', '\\n'.join([*steps, '']).encode())\n"
        "report = read_report([store.sub('demo')])\n"
        "parts = Pages([store], read_only=True)._parts(store.sub('demo'))\n"
        "figures = report.figures['runs'][0]['over_steps']['jumps']\n"
        "print(json.dumps([figures, *(text.count('Jumps of the loss') for text in (report.page(), parts['measures']))]))\n"
    )
    figures, *shown = json.loads(run(copy, "-c", code, str(tmp_path / "runs")))
    assert figures == {"jump": [[2, -0.5], [3, pytest.approx(-1 / 6)]]}
    assert shown == [2, 2], "the title and the words of a screen reader"


class Run(NamedTuple):
    """A run of three steps in the copy, by the arguments of its command."""

    folder: Path
    train: tuple[str, ...]

    def read(self) -> tuple[str, list[float]]:
        """Its manifest, and the loss of each step."""
        written = self.folder / "runs/first"
        manifest = (written / "checkpoints/step-000000003/manifest.json").read_text()
        return manifest, [record["loss"] for record in records_of(written, "step")]


def run_of(folder: Path, base: Path, data: Path, *more: str) -> Run:
    config = folder / "run.yaml"
    config.write_text(
        f"run: {{name: first, store: {folder / 'runs'}}}\nmodel: {{base: {base}, dtype: fp32}}\nquant: {{type:"
        f" none}}\ndata: {{train: [{{path: {data}}}], sequence_length: 128}}\ntrain: {{steps: 3, global_batch:"
        " 2}\ncluster: {workers: 1}\n"
    )
    return Run(folder, ("train", str(config), *more))


def records_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [line for file in (folder / "metrics").rglob("*.jsonl") for line in file.read_text().splitlines()]
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def capstan(copy: Path, *commands: tuple[str, ...]) -> str:
    return run(copy, str(TOYS / "commands.py"), json.dumps(commands))


@pytest.mark.long
def test_a_method_trains_over_the_format_of_a_base_on_the_format_of_rows(copy: Path, tmp_path: Path) -> None:
    rows = tmp_path / "riddles.jsonl"
    rows.write_text(
        "".join(json.dumps({"riddle": f"What is {n}?", "solution": f"It is {n}."}) + "\n" for n in range(40))
    )
    ours = ("tuning.method=loha", "tuning.spread=0.2", "data.template=chatml", "track.trackers=[diary]")
    runs = list[Run]()
    for name in ("plain", "halves"):
        base = make_base(tmp_path / name / "base", "qwen2", torch.float32)
        if name == "halves":
            for file in base.glob("*.safetensors"):
                save_file({key: weight / 2 for key, weight in load_file(file).items()}, file, {"format": "pt"})
            edit_config(base, quantization_config={"quant_method": "halves"})
        runs.append(run_of(tmp_path / name, base, rows, *ours))
    config = runs[-1].train[1]
    said = capstan(copy, *(one.train for one in runs), ("plan", config, *ours, "--gpu", "24GB"))
    (plain, expected), (halves, losses) = (one.read() for one in runs)
    assert '"loha"' in plain
    assert '"loha"' in halves
    assert len(losses) == 3
    assert losses == expected
    assert "fits" in said
    *steps, outcome = (runs[-1].folder / "runs/first/diary.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in steps] == ["step 1", "step 2", "step 3"]
    assert "train/loss" in steps[0]
    assert outcome == "finished"


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_what_lists_methods_formats_verbs_and_settings_passes_unedited_in_a_copy_of_the_repository(
    tmp_path: Path,
) -> None:
    """And what every method is proven by proves the one that was added: restored, PEFT's gradients and merge, and the
    export over 4 bits, which PEFT does not have for it."""
    everything = tmp_path / "repository"
    shutil.copytree(ROOT, everything, ignore=_made)
    shutil.copytree(TOYS / "added", everything, dirs_exist_ok=True, ignore=_made)
    (everything / ".venv").symlink_to(ROOT / ".venv")
    options = ("-q", "-p", "no:cacheprovider", "-m", "not long", f"--deselect={Path(__file__).relative_to(ROOT)}")
    run(everything, "-m", "pytest", *options, *LISTING)
    proven = run(everything, "-m", "pytest", *options, "tests/dist/test_linear_adapters.py", "-k", "loha")
    assert " passed" in proven


def test_a_kind_of_rows_with_columns_goes_from_its_rows_to_the_loss_of_its_objective(
    copy: Path, tmp_path: Path
) -> None:
    """A value of each document, of each token and of each target is stored, packed and given to the objective."""
    data, words = tmp_path / "rated.jsonl", "the shop is open until six and on sundays from ten to noon".split()
    rated = [{"text": " ".join(words[: 1 + n % len(words)]), "rating": n / 4} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rated, {"text": "no", "rating": "good"}]))
    ours = (
        "objective.name=rated",
        "data.on_bad_row=skip",
        "train.global_batch=1",
        "train.epochs=1",
        "train.steps=null",
    )
    capstan(copy, run_of(tmp_path, make_base(tmp_path / "base"), data, *ours).train)
    (manifest,) = [json.loads(file.read_text()) for file in (tmp_path / "runs/data").glob("*/manifest.json")]
    (shard,) = manifest["shards"]
    per = {name: column["per"] for name, column in shard["columns"].items()}
    assert per == {"rating": "document", "place": "token", "share": "target"}
    assert manifest["counters"]["bad_rows"] == 1
    steps = records_of(tmp_path / "runs/first", "step")
    assert len(steps) > 1
    # A text of so many bytes ends with a token, and may begin with one.
    sizes = [len(str(row["text"])) for row in rated]
    targets = [size + (manifest["tokens"] - sum(sizes)) // len(rated) - 1 for size in sizes]
    assert sum(targets) == manifest["targets"] == sum(record["targets"] for record in steps)

    def total(name: str) -> float:
        return sum(record[name] * record["targets"] for record in steps)

    assert total("rating") == pytest.approx(
        sum(float(row["rating"]) * count for row, count in zip(rated, targets, strict=True))
    )
    assert total("place") == pytest.approx(sum(count * (count + 1) / 2 for count in targets))
    assert total("share") == pytest.approx(sum(count * (count + 1) / 4 for count in targets))
    assert 0 < total("loss") < 7 * total("rating"), "a document of rating 0 weighs nothing"


@pytest.mark.long
def test_an_objective_over_pairs_trains(copy: Path, tmp_path: Path) -> None:
    ours = ("objective.name=gap", "objective.gap=3")
    gap = run_of(tmp_path, make_base(tmp_path / "base"), make_pairs(tmp_path / "pairs.jsonl"), *ours)
    capstan(copy, gap.train)
    manifest, losses = gap.read()
    assert '"gap"' in manifest
    assert len(set(losses)) == 3


@pytest.mark.long
def test_an_action_every_other_step_has_its_record_wherever_a_run_is_looked_at(copy: Path, tmp_path: Path) -> None:
    """Before the first step, every second one and at the end; in the records, the log, TensorBoard, `status` and
    `report`. W&B, MLflow and Trackio get the points of TensorBoard (tests/unit/run/test_measured.py).
    """
    started = run_of(tmp_path, make_base(tmp_path / "base"), make_data(tmp_path / "rows.jsonl"))
    capstan(copy, (*started.train, "train.largest_every=2"))
    folder = tmp_path / "runs/first"
    measured = records_of(folder, "measured")
    assert [(record["by"], record["step"]) for record in measured] == [("largest", step) for step in (0, 2, 3)]
    assert measured[0]["value"] != measured[-1]["value"]
    newest = f"value {measured[-1]['value']:.4g}"
    (log,) = (folder / "logs").rglob("rank-00000.*")
    assert f"step 3: largest {newest}" in log.read_text()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("largest/value")] == [0, 2, 3]
    page = tmp_path / "report.html"
    shown = capstan(copy, ("status", str(folder)), ("report", str(folder), "--output", str(page)))
    assert re.search(rf"^largest +{newest} *$", shown, re.MULTILINE)
    assert "Largest: value" in page.read_text()


@pytest.mark.long
def test_a_base_is_held_so_trained_planned_proven_and_exported(copy: Path, tmp_path: Path) -> None:
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": f"The number {n} follows {n - 1}."}) + "\n" for n in range(40)))
    held = ("quant.type=rows8", "quant.cache=true")
    llama, mixture = (
        run_of(tmp_path / kind, make_base(tmp_path / kind / "base", kind, torch.float32), rows, *held)
        for kind in ("llama", "qwen3-moe")
    )
    folder, config = llama.folder, llama.train[1]
    run, merged = str(folder / "runs/first"), folder / "merged"
    said = capstan(
        copy,
        llama.train,
        ("train", config, *held, "run.name=second"),  # from the cache
        mixture.train,
        ("plan", config, *held, "--gpu", "24GB"),
        ("export", run, str(folder / "adapter"), "--verify"),
        ("export", run, str(merged), "--format", "rows8"),
        ("plan", config, f"model.base={merged}", "quant.type=stored", "--gpu", "24GB"),
    )
    manifest, losses = llama.read()
    assert '"rows8"' in manifest
    assert len(set(losses)) == 3
    assert [record["loss"] for record in records_of(folder / "runs/second", "step")] == losses
    assert len(mixture.read()[1]) == 3
    assert said.count("fits") == 2
    assert json.loads((merged / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"
