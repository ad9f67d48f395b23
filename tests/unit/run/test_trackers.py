"""Trackers by the services' own packages, without a network: one curve a run, whatever its starts were, and no harm to
it.
"""

import json
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.run import wandb_server
from tests.unit.run.tracked import loss
from trainer.config import load_config, parse_config
from trainer.config.registry import kinds
from trainer.errors import ConfigError
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.run.metrics import Curves, JsonLines, Metrics, Printed, open_trackers
from trainer.run.records import claim_generation, read_records
from trainer.run.trackers import Page, StepPoints, check_trackers, companion, find_service, points
from trainer.run.trackers.companion import ServiceState, TrackerProcess
from trainer.run.trackers.mlflow import Mlflow
from trainer.run.trackers.trackio import Trackio
from trainer.run.trackers.wandb import WeightsAndBiases
from trainer.store.store import Store, open_store

Curve = list[tuple[int, float]]
CONFIG = """
run: {{name: demo, store: {store}}}
model: {{base: base}}
data: {{train: [{{path: train.jsonl}}]}}
train: {{steps: 20}}
track: {{trackers: {trackers}, project: capstan-tests, name: shown, group: a group, tags: [first, second]}}
"""
SERVICES = ["wandb", "mlflow", "trackio"]
KNOWN = sorted(kinds("trainer.run.trackers", "SERVICES"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for all services, which they are pointed to and may not leave."""
    folder = tmp_path_factory.mktemp("services")
    given = {
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "not-to-be-shown",
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in given.items():
            patched.setenv(name, value)
        yield folder


def configuration(folder: Path, trackers: list[str]) -> Path:
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(store=folder / "store", trackers=trackers))
    return path


def start(config: Path, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.unit.run.tracked", str(config), *map(str, arguments)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[3])


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def kept(run: Store, tracker: str) -> dict[str, Any]:
    return json.loads(run.get(layout.tracker(tracker))) if run.exists(layout.tracker(tracker)) else {"shown": None}


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format, with blocks of 32 KiB, after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2

    data, place, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # full, or the last part
            record = messages.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_curve(folder: Path, name: str) -> Curve:
    """A curve as `wandb sync` of every folder, in their order, would send it."""
    found = []
    for file in sorted(folder.glob("**/*.wandb")):
        for record in wandb_records(file):
            values = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if name in values:
                found.append((values["_step"], values[name]))
    return found


def mlflow_run(id: str) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("capstan-tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`capstan.id` = '{id}'")
    return run


def mlflow_curve(id: str, name: str) -> Curve:
    from mlflow import MlflowClient

    return [
        (metric.step, metric.value) for metric in MlflowClient().get_metric_history(mlflow_run(id).info.run_id, name)
    ]


def trackio_curve(id: str, name: str) -> Curve:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("capstan-tests", f"shown-{id}")
    return [(log["step"], log[name]) for log in logs if name in log]


@pytest.fixture(scope="module")
def resumed(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    """A run shown by all services whose first start, of two ranks, was killed in step 9 after a commit of step 5, and
    whose second, of one rank, went on from there to the end. Its folder on the disk, and as a store."""
    folder = tmp_path_factory.mktemp("resumed")
    config = configuration(folder, SERVICES)
    run = open_store(str(folder / "store")).sub("demo")
    first = start(config, 1, 8, "hang")
    try:
        wait_for(config.with_suffix(".ready").exists, "the first start has not begun")
        wait_for(
            lambda: all(kept(run, name)["shown"] == 7 for name in SERVICES), "the first start's records are not shown"
        )
    finally:  # whoever kills a run wants it gone, so its processes have moments left
        first.send_signal(signal.SIGKILL)
        first.wait()
    second = start(config, 6, 20, "end")
    try:
        assert second.wait(timeout=300) == 0
    finally:
        second.kill()
    return folder, run


def curve(resumed: tuple[Path, Store], service: str, name: str) -> Curve:
    folder, run = resumed
    id = kept(run, service)["id"]
    if service == "wandb":
        return wandb_curve(folder, name)
    return mlflow_curve(id, name) if service == "mlflow" else trackio_curve(id, name)


# All three at once, in two starts; a kill and a resume are quick with the server of W&B, and each service's own records
# below.
@pytest.mark.long
@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_and_resumed_run_has_one_continuous_curve(resumed: tuple[Path, Store], service: str) -> None:
    # The killed start's last step is left to the one that repeats it: its evaluation might have been cut off.
    expected = [(step, loss(1 if step < 8 else 2, step)) for step in range(1, 21)]
    assert sorted(curve(resumed, service, "train/loss")) == expected
    evaluated = [(step, 2 * value) for step, value in expected if step % 4 == 0]
    assert sorted(curve(resumed, service, "eval/general/loss")) == evaluated
    assert curve(resumed, service, "train/samples") == []
    assert kept(resumed[1], service)["shown"] == 20


@pytest.mark.parametrize("service", SERVICES)
def test_steps_that_come_twice_would_be_seen(environment: Path, tmp_path: Path, service: str) -> None:
    """A control: the packages keep what they get, so a curve above has no step twice because none was sent twice."""
    run, config = open_store(str(tmp_path)).sub("demo"), load_config(configuration(tmp_path, SERVICES))
    (tmp_path / "demo").mkdir()
    kept = ServiceState("twice", "demo", -1)
    kept.write(run, service)
    for again in range(2):
        opened = find_service(service).opens(companion.page(config, run, kept))
        opened.show([StepPoints(step, step + again / 8, {"train/loss": loss(1, step)}) for step in (1, 2, 3)])
        if service == "mlflow":
            assert (opened.shown, mlflow_run("twice").info.status) == (3 if again else -1, "RUNNING")
        opened.close("finished")
        if service == "wandb":
            time.sleep(1.1)  # the folder of an offline run is named by the second
    assert [step for step, _ in sorted(curve((tmp_path, run), service, "train/loss"))] == [1, 1, 2, 2, 3, 3]
    if service == "mlflow":
        from mlflow import MlflowClient

        shown = mlflow_run("twice")
        history = MlflowClient().get_metric_history(shown.info.run_id, "train/loss")
        assert sorted(one.timestamp for one in history) == [1000, 1125, 2000, 2125, 3000, 3125], "milliseconds"
        assert not any(name.startswith("changed.") for name in shown.data.tags), "no setting has another value"


@pytest.mark.long
def test_a_server_of_wandb_is_asked_how_far_the_curve_is(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, ["wandb"])
    run = run_folder(load_config(config))
    with wandb_server.serve() as there:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", there.address)
        first = start(config, 1, 8, "hang")
        try:
            wait_for(config.with_suffix(".ready").exists, "the first start has not begun")
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
        wait_for(lambda: there.exits == [1], "the first start's end is not shown")
        id = kept(run, "wandb")["id"]
        assert there.steps(id) == list(range(1, 8))
        ServiceState(id, "demo", 0).write(run, "wandb")  # what the folder says may be older than what the server has
        second = start(config, 6, 20, "end")
        try:
            assert second.wait(timeout=300) == 0
        finally:
            second.kill()
    assert there.steps(id) == list(range(1, 21))
    assert [line["train/loss"] for line in there.history[id]] == [
        loss(1 if step < 8 else 2, step) for step in range(1, 21)
    ]
    assert there.exits == [1, 0]


@pytest.mark.long
def test_a_service_knows_the_run_by_its_name_group_tags_and_settings(resumed: tuple[Path, Store]) -> None:
    folder, run = resumed
    ids = {service: kept(run, service)["id"] for service in SERVICES}
    told = [
        record.run for file in sorted(folder.glob("**/*.wandb")) for record in wandb_records(file) if record.run.run_id
    ]
    assert {(one.run_id, one.project, one.display_name, one.run_group) for one in told} == {
        (ids["wandb"], "capstan-tests", "shown", "a group")
    }
    assert list(told[0].tags) == ["first", "second"]
    settings = {item.key: json.loads(item.value_json) for item in told[0].config.update}
    assert settings["train"]["steps"] == 20

    known = mlflow_run(ids["mlflow"])
    assert (known.info.run_name, known.info.status) == ("shown", "FINISHED")
    assert {"group": "a group", "first": "true", "second": "true"}.items() <= known.data.tags.items()
    assert (known.data.params["train.steps"], known.data.params["run.name"]) == ("20", "demo")

    from trackio.sqlite_storage import SQLiteStorage

    settings = SQLiteStorage.get_run_config("capstan-tests", f"shown-{ids['trackio']}")
    assert settings is not None
    assert (settings["train"]["steps"], settings["_Group"], settings["tags"]) == (20, "a group", ["first", "second"])


def test_no_secret_reaches_a_service(environment: Path, tmp_path: Path) -> None:
    """An earlier version did not refuse secrets in settings, so a run may have one."""
    config = load_config(
        configuration(tmp_path, SERVICES),
        ["cluster.ray.runtime_env={env_vars: {MY_TOKEN: abc123xyz, HOME_DIR: /home/me}}"],
    )
    text = json.dumps(companion.page(config, open_store(str(tmp_path)), ServiceState("id", "demo", -1))._asdict())
    assert "/home/me" in text
    assert "abc123xyz" not in text
    assert "not-to-be-shown" not in text


class _Mlflow:
    """MLflow's client, which has one experiment with these runs of parameters, and a curve up to these steps."""

    def __init__(self, runs: dict[str, dict[str, str]], steps: list[int]) -> None:
        self.runs, self.steps, self.told = runs, steps, list[Any]()

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name.upper()) if self.runs else None

    def create_experiment(self, name: str) -> str:
        return f"new {name}"

    def search_runs(self, places: list[str], query: str, max_results: int) -> list[Any]:
        self.told.append((places, query))
        return [_run(name, parameters) for name, parameters in self.runs.items()][:max_results]

    def create_run(self, place: str, run_name: str, tags: dict[str, str]) -> Any:
        self.told.append((place, run_name, tags))
        return _run("made", {})

    def get_metric_history(self, run: str, curve: str) -> list[Any]:
        assert curve == "train/loss"
        return [SimpleNamespace(step=step) for step in self.steps]

    def update_run(self, run: str, status: str) -> None:
        self.told.append((run, status))

    def log_batch(self, run: str, **batch: list[Any]) -> None:
        self.told.append((run, batch))


def _run(id: str, parameters: dict[str, str]) -> Any:
    return SimpleNamespace(info=SimpleNamespace(run_id=id), data=SimpleNamespace(params=parameters))


@pytest.fixture
def in_mlflow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Mlflow, list[Any]]]:
    """Opens a run there that has some settings, and returns what MLflow was told, too."""

    def plain(*values: Any) -> Any:
        return values

    def opened(settings: dict[str, Any], runs: dict[str, dict[str, str]], steps: list[int], **more: Any) -> Any:
        client = _Mlflow(runs, steps)
        monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: client))
        entities = SimpleNamespace(Param=plain, RunTag=plain, Metric=plain)
        monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
        page = Page("id-7", "shown", "ours", None, [], settings, None, 4)
        return Mlflow(page._replace(**more)), client.told

    return opened


def test_mlflow_goes_on_with_a_run_of_which_it_keeps_each_setting_once(in_mlflow: Any) -> None:
    settings = {"lr": 0.5, "name": "demo", "more": {"seed": 7, "fast": True}}
    runs = {"first": {"lr": "0.25", "name": "demo", "more.seed": "7"}, "other": {}}
    service, told = in_mlflow(settings, runs, [3, 9, 5])
    assert service.shown == 9
    assert told == [
        (["OURS"], "tags.`capstan.id` = 'id-7'"),
        ("first", "RUNNING"),
        ("first", {"params": [("more.fast", "true")]}),
        ("first", {"tags": [("changed.lr", "0.5")]}),
    ]
    told.clear()
    service.show([StepPoints(step, 1.0006 + step, {"a": 0.5, "b": step}) for step in range(501)])
    metrics = [one for _, batch in told for one in batch["metrics"]]
    assert [len(batch["metrics"]) for _, batch in told] == [1000, 2], "as many as MLflow takes"
    assert metrics[:2] + metrics[-1:] == [("a", 0.5, 1001, 0), ("b", 0, 1001, 0), ("b", 500, 501001, 500)]


def test_a_run_that_mlflow_does_not_have_is_made_with_its_tags(in_mlflow: Any) -> None:
    service, told = in_mlflow({"n": {str(n): n for n in range(101)}}, {}, [], group="g", tags=["x", "y"])
    assert service.shown == 4, "of the run's folder"
    made, begun, *batches = told[1:]
    assert made == ("new ours", "shown", {"capstan.id": "id-7", "group": "g", "x": "true", "y": "true"})
    assert begun == ("made", "RUNNING")
    assert [len(batch["params"]) for _, batch in batches] == [100, 1]
    _, told = in_mlflow({}, {}, [])
    assert told[1] == ("new ours", "shown", {"capstan.id": "id-7"})


@pytest.mark.parametrize(
    ("outcome", "status", "exit_code"),
    [("finished", "FINISHED", 0), ("stopped", "KILLED", 0), ("failed", "FAILED", 1), (None, "FAILED", 1)],
)
def test_a_service_is_told_how_a_start_ended(outcome: str | None, status: str, exit_code: int) -> None:
    told = list[Any]()
    curves, page = Mlflow.__new__(Mlflow), WeightsAndBiases.__new__(WeightsAndBiases)
    curves._run, curves._client = "7", SimpleNamespace(set_terminated=lambda *ended: told.append(ended))  # type: ignore[assignment]
    page._run = SimpleNamespace(finish=lambda exit_code: told.append(exit_code))  # type: ignore[assignment]
    for service in (curves, page):
        service.close(outcome)
    assert told == [("7", status), exit_code]


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A server that takes connections and never answers; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("service", ["mlflow", pytest.param("wandb", marks=pytest.mark.long)])
def test_a_service_that_hangs_neither_slows_nor_ends_the_training(
    environment: Path,
    silent_server: int,
    service: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    address = f"http://127.0.0.1:{silent_server}"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setattr(companion, "CLOSE_SECONDS", 6.0)
    config = load_config(configuration(tmp_path, [service]))
    run = run_folder(config)
    metrics = Metrics(open_trackers(run, claim_generation(run), config))
    metrics.write("start", step=0)
    began = time.monotonic()
    for step in range(1, 201):
        metrics.write("step", step=step, loss=1.0)
        metrics.flush()
    assert time.monotonic() - began < 30
    metrics.write("end", outcome="finished", reason="")
    metrics.close()
    assert f"{service} did not finish within 6 s, which does not end the run; it is left." in capfd.readouterr().err
    assert [record["kind"] for record in read_records(run, 1)] == ["start", *["step"] * 200, "end"]


def test_curves_follow_at_most_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[float]()
    monkeypatch.setattr(Curves, "__init__", lambda self, folder, generation, seconds: asked.append(seconds))
    monkeypatch.setattr(TrackerProcess, "__init__", lambda *_: None)
    for seconds in (5, 90):
        config = load_config(configuration(tmp_path, ["wandb"]), [f"track.flush_seconds={seconds}"])
        open_trackers(open_store(str(tmp_path)), 1, config)
    assert asked == [60, 90]


def test_a_run_has_the_trackers_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = list[str]()
    monkeypatch.setattr(TrackerProcess, "__init__", lambda self, name, *_: shown.append(name))
    open_trackers(open_store(str(tmp_path)), 1, load_config(configuration(tmp_path, SERVICES)))
    assert shown == SERVICES
    for asked, kinds_of in (("true", [JsonLines, Printed, Curves]), ("false", [JsonLines, Printed])):
        text = CONFIG.format(store=tmp_path, trackers=[])
        config = parse_config(f"{text[: text.index('track:')]}track: {{tensorboard: {asked}}}")
        trackers = open_trackers(open_store(str(tmp_path)), 1, config)
        assert [type(tracker) for tracker in trackers] == kinds_of


def test_a_tracker_that_cannot_be_opened_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = load_config(configuration(tmp_path, ["wandb"]))

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Curves, "__init__", fails)
    monkeypatch.setattr(TrackerProcess, "__init__", fails)
    trackers = open_trackers(open_store(str(tmp_path)), 1, config)
    assert [type(tracker) for tracker in trackers] == [JsonLines, Printed]
    assert capfd.readouterr().err.count("No space left on device") == 2


def test_a_process_that_dies_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = TrackerProcess("unheard-of", 1, load_config(configuration(tmp_path, ["wandb"])))
    assert tracker._has_ended(within=60)
    for _ in range(3):
        tracker.flush()
    tracker.close()
    said = "the process that shows the run by unheard-of has ended, which does not end the run."
    assert capfd.readouterr().err.count(said) == 1


@pytest.mark.parametrize(
    ("trackers", "said"),
    [
        (
            ["wandb", "mlfow"],
            f"track.trackers: 'mlfow' is not allowed. Allowed are {', '.join(KNOWN)}. Did you mean mlflow?",
        ),
        (
            ["trackio"],
            (
                "track.trackers: trackio is not installed. Install it with pip install 'capstan-llm[trackio]', or leave"
                " it out."
            ),
        ),
    ],
)
def test_a_start_is_refused_for_a_service_that_is_not_there(
    trackers: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.run.trackers.find_spec", lambda package: None if package == "trackio" else package)
    with pytest.raises(ConfigError) as refused:
        check_trackers(load_config(configuration(tmp_path, trackers)).track)
    assert str(refused.value) == said


@pytest.mark.parametrize("setting", ["project: mine", "name: mine", "group: mine", "tags: [mine]"])
def test_a_setting_of_no_service_is_refused(setting: str) -> None:
    text = CONFIG.format(store="s", trackers=["wandb"])
    with pytest.raises(ConfigError, match=f"track.{setting.partition(':')[0]}: has no effect without track.trackers"):
        parse_config(text[: text.index("track:")] + f"track: {{{setting}}}")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"kind": "step", "loss": 1.5, "tokens": 8}, {"train/loss": 1.5, "train/tokens": 8}),
        ({"kind": "eval", "loss": 1.5}, {"eval/loss": 1.5}),
        ({"kind": "eval", "set": "sea", "loss": 1.5}, {"eval/sea/loss": 1.5}),
        ({"kind": "measured", "by": "routing", "share": 0.5, "whole": True, "of": "all"}, {"routing/share": 0.5}),
        ({"kind": "end", "loss": 1.5}, {}),
    ],
)
def test_a_record_has_its_numbers_under_the_names_of_their_curves(
    record: dict[str, Any], expected: dict[str, float]
) -> None:
    assert points({"step": 3, "time": 1.0, "clock": 2.0, **record}) == expected


@pytest.mark.parametrize(("offline", "shown"), [(False, 4), (True, 3)])
def test_weights_and_biases_goes_on_behind_what_its_server_has_and_hears_how_a_run_ended(
    monkeypatch: pytest.MonkeyPatch, offline: bool, shown: int
) -> None:
    ends, told = list[int](), list[Any]()
    own = SimpleNamespace(
        offline=offline,
        starting_step=5,
        config=SimpleNamespace(update=lambda settings, allow_val_change: told.append((settings, allow_val_change))),
        log=lambda values, step, commit: told.append((values, step, commit)),
        finish=lambda exit_code: ends.append(exit_code),
    )
    module = SimpleNamespace(Settings=lambda **_: None, init=lambda **given: told.append(given) or own)
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]  # what of it is called
    page = Page("id", "demo", "project", "group", ["a", "b"], {"lr": 0.5}, "/runs/demo", 3)
    for place, folder in ((None, "/runs/demo"), ("/curves", None)):  # W&B reads the place itself
        monkeypatch.setenv("WANDB_DIR", place) if place else monkeypatch.delenv("WANDB_DIR", raising=False)
        told.clear()
        service = WeightsAndBiases(page)
        assert service.shown == shown
        identity = {"id": "id", "name": "demo", "project": "project", "group": "group", "tags": ["a", "b"]}
        known = {**identity, "config": {"lr": 0.5}, "dir": folder, "resume": "allow", "settings": None}
        assert told == [known, ({"lr": 0.5}, True)], "settings that a later start has changed, too"
    told.clear()
    service.show([StepPoints(4, 1000.5, {"train/loss": 2.0}), StepPoints(5, 1001.5, {"eval/loss": 3.0})])
    assert told == [
        ({"train/loss": 2.0, "_timestamp": 1000.5}, 4, True),
        ({"eval/loss": 3.0, "_timestamp": 1001.5}, 5, True),
    ]
    for outcome in ("finished", "stopped", "failed", None):
        service.close(outcome)
    assert ends == [0, 0, 1, 1]


def test_trackio_goes_on_behind_its_last_step_under_a_name_that_no_other_run_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = list[Any]()
    own = SimpleNamespace(
        _next_step=8, log=lambda values, step: told.append((values, step)), finish=lambda: told.append("end")
    )

    def init(project: str, **given: Any) -> Any:
        told.append((project, given["name"], given["group"], given["config"], given["resume"]))
        return own

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))  # type: ignore[arg-type]
    page = Page("id", "demo", "project", "group", ["a"], {"lr": 0.5}, None, 3)
    for following, shown in ((8, 7), (0, 3)):  # points may wait for a server that does not answer now
        own._next_step = following
        service = Trackio(page)
        assert service.shown == shown
    assert told[0] == ("project", "demo-id", "group", {"lr": 0.5, "tags": ["a"]}, "allow")
    told.clear()
    service.show([StepPoints(4, 1000.5, {"train/loss": 2.0}), StepPoints(5, 1001.5, {"eval/loss": 3.0})])
    service.close("finished")
    assert told == [({"train/loss": 2.0}, 4), ({"eval/loss": 3.0}, 5), "end"]
