"""The lines of a process that exports reach the bar, and its last line is the result."""

import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from rich.filesize import decimal

from launcher import export
from tests.material import Workshop
from trainer.config import dump_config
from trainer.errors import CapstanError, ConfigError, StorageError, Unreachable
from trainer.export.card import PLACE
from trainer.export.destination import ExportProgress
from trainer.export.figures import Proof
from trainer.processes import children
from trainer.store.store import Store

PROGRAM = """
import sys, time
print("progress 1 4", flush=True)
if sys.argv[1:] == ["hangs"]:
    time.sleep(20)
print("say Converting.", flush=True)
print("progress 4 4", flush=True)
if sys.argv[1:] == ["fails"]:
    print("capstan: the destination is taken.", file=sys.stderr)
    sys.exit(2)
if sys.argv[1:] == ["crashes"]:
    raise RuntimeError("no such kernel")
print('{"step": 7}')
"""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    start = children.start
    monkeypatch.setattr(
        export.children, "start", lambda command, **given: start([sys.executable, "-c", PROGRAM, *command[3:]], **given)
    )


@pytest.mark.usefixtures("started")
def test_progress_and_sentences_are_told_and_the_last_line_is_the_result() -> None:
    done, said = list[Any](), list[str]()
    progress = ExportProgress(lambda *bytes_done: done.append(bytes_done), said.append)
    assert export.run_module("any.module", progress=progress) == {"step": 7}
    assert (done, said) == ([(1, 4), (4, 4)], ["Converting."])


@pytest.mark.usefixtures("started")
def test_who_is_interrupted_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    start, processes = export.children.start, list[Any]()
    monkeypatch.setattr(
        export.children, "start", lambda *command, **given: processes.append(start(*command, **given)) or processes[0]
    )

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.run_module("any.module", "hangs", progress=ExportProgress(interrupted, lambda _: None))
    assert processes[0].wait(10) == -signal.SIGKILL


PROOF = Proof(0.01, 0.02, 0.5, 0.03, 0.04, 0.6, "fp32", "8 rows")


@pytest.mark.parametrize(
    ("format", "given", "told", "words"),
    [
        ("peft", {}, [], "adapter of step 7 in /x (5 bytes)"),
        ("peft", {"step": 3, "verify": True}, ["--step", "3", "--verify"], f"(5 bytes); {PROOF.sentence()}\nA remark."),
        (
            "merged",
            {"server": "http://here", "verify": True},
            ["--verify", "--server", "http://here"],
            "of step 7 in /x",
        ),
    ],
)
def test_an_export_is_a_process_whose_result_is_told(
    format: str, given: dict[str, Any], told: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[str, ...]]()

    def run_module(*arguments: str, progress: ExportProgress) -> dict[str, Any]:
        asked.append(arguments)
        made = {"step": 7, "bytes": 5, "tuned_base": False, "remarks": ["A remark."]}
        return {**made, "proof": asdict(PROOF)} if given.get("verify") else made

    monkeypatch.setattr(export, "run_module", run_module)
    found = export.export_run(Store("memory://run", None), "/x", format=format, options=(), **given)
    assert asked == [("trainer.export", "memory://run", "/x", "--format", format, *told)]
    assert words in found.sentence()
    assert (found.merged, found.to_json()["dry_run"]) == (format == "merged", False)


def test_a_dry_run_looks_at_a_destination_that_would_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {
        "whole_checkpoint": SimpleNamespace(step=7),
        "trained_config": None,
        "refused_exports": {},
        "method_of": SimpleNamespace(exports_model=False),
        "cut_sentence": "The first 2 layers.",
    }
    for name, value in found.items():
        monkeypatch.setattr(export, name, lambda *_, value=value, **__: value)
    (tmp_path / "notes.txt").touch()

    def planned(**given: Any) -> export.Exported:
        return export.export_run(Store("memory://run", None), str(tmp_path), "peft", dry_run=True, **given)

    with pytest.raises(ConfigError, match="is not empty"):
        planned()
    there = planned(verify=True)
    assert there.sentence() == f"{there.what} of step 7 in {tmp_path} (dry run: nothing written)\nThe first 2 layers."
    assert there.to_json()["dry_run"] is True


def test_a_base_whose_values_cannot_be_written_is_not_dequantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = SimpleNamespace(stored=SimpleNamespace(unmergeable="in INT2", decoded=True), in_4_bits=False)
    monkeypatch.setattr(export, "describe_base", lambda model: base)
    monkeypatch.setattr(export, "typed", lambda config, base: config)
    (tmp_path / "run.yaml").write_text(dump_config(Workshop(tmp_path).config("one", "quant.type=stored")))
    with pytest.raises(ConfigError, match=r"computes with the weights that the files of .* have\."):
        export.dequantize(tmp_path / "run.yaml", str(tmp_path / "out"), (), dry_run=True, log=print)


def test_a_base_that_was_tuned_itself_is_a_whole_model_in_any_format(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"step": 7, "bytes": 5, "tuned_base": True}
    monkeypatch.setattr(export, "run_module", lambda *_, progress: made)
    found = export.export_run(Store("memory://run", None), "/x", format="peft", options=())
    assert found.merged
    assert found.sentence().startswith(f"{export.find_format('peft').what_if_tuned} of step 7 in /x")
    assert "adapter" not in found.what


def test_an_export_that_is_not_what_was_trained_ends_with_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(PROOF, kl=1.0)
    made = {"step": 7, "bytes": 5, "tuned_base": False, "proof": asdict(wrong)}
    monkeypatch.setattr(export, "run_module", lambda *_, progress: made)
    with pytest.raises(CapstanError) as found:
        export.export_run(Store("memory://run", None), "/x", format="peft", options=(), verify=True)
    assert str(found.value).endswith(f"{wrong.sentence()}. {wrong.verdict}")


def test_a_base_that_is_computed_with_as_it_is_stored_is_not_dequantized(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)

    def dequantized(*settings: str) -> export.Dequantized:
        (tmp_path / "run.yaml").write_text(dump_config(workshop.config("one", *settings)))
        return export.dequantize(tmp_path / "run.yaml", str(tmp_path / "out"), (), dry_run=True, log=print)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"out is not empty\. Name a new folder"):
        dequantized("quant.type=nf4")
    (tmp_path / "out" / "notes.txt").unlink()
    found = dequantized("quant.type=nf4")
    assert found.to_json() == {**asdict(found), "dry_run": True}
    assert found.sentence().endswith(f" as the run computes with it, in {tmp_path}/out (dry run: nothing written)")
    assert replace(found, bytes=5).sentence().endswith("/out (5 bytes)")
    with pytest.raises(ConfigError, match=r"^quant.type: none computes with the weights that the files of .* have\."):
        dequantized("quant.type=none")
    with pytest.raises(ConfigError, match=r"^model.layers: only the whole base can be written"):
        dequantized("quant.type=nf4", "model.layers=1")


class _Hub:
    """The Hub, as far as a push asks it: a repository that is private or not, with files of an earlier export."""

    endpoint = "https://hub"
    files = (
        "adapter_model.safetensors",
        "model-2.safetensors",
        "chat_template.jinja",
        "own/model.safetensors",
        "notes.md",
    )

    def __init__(self, token: str) -> None:
        self.asked = [("token", token)]

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        self.asked.append(("made private" if private else "made public", repository))

    def repo_info(self, repository: str) -> Any:
        return SimpleNamespace(private="made private" in dict(self.asked))

    def create_branch(self, repository: str, *, branch: str, exist_ok: bool) -> None:
        self.asked.append(("branch", branch))

    def list_repo_files(self, repository: str, *, revision: str | None) -> list[str]:
        return [*self.files, f"merged-{revision}.gguf"]

    def create_commit(self, repository: str, operations: Any, *, commit_message: str, revision: str | None) -> Any:
        for one in operations:
            added = isinstance(one, CommitOperationAdd)
            text = Path(str(one.path_or_fileobj)).read_text() if isinstance(one, CommitOperationAdd) else ""
            self.asked.append((f"{'adds' if added else 'deletes'} {one.path_in_repo}", text))
        self.asked.append((f"commits to {revision}", commit_message))
        return SimpleNamespace(oid="c0ffee")


@pytest.mark.parametrize(("public", "revision"), [(False, None), (True, "v2")])
def test_a_push_replaces_an_earlier_export_and_leaves_all_other_files(
    public: bool, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_run(folder: Store, directory: str, format: str, options: Any, *, step: int | None) -> export.Exported:
        Path(directory).mkdir()
        for name, text in (("README.md", f'base = "{PLACE}"'), ("adapter_model.safetensors", "weights")):
            Path(directory, name).write_text(text)
        return export.Exported(directory, format, step or 7, False)

    hubs = list[_Hub]()
    monkeypatch.setattr(export, "HfApi", lambda token: hubs.append(_Hub(token)) or hubs[0])
    monkeypatch.setattr(export, "export_run", export_run)
    monkeypatch.setenv("HF_TOKEN", " hf_mine\n")
    told: dict[str, Any] = {"step": 3, "revision": revision, "public": public, "dry_run": False, "log": print}
    pushed = export.push_run(Store("memory://runs/mine", None), "hf://me/it/", "peft", **told)
    assert (pushed.private, pushed.url, pushed.commit) == (not public, "https://hub/me/it", "c0ffee")
    assert hubs[0].asked == [
        ("token", "hf_mine"),
        ("made public" if public else "made private", "me/it"),
        *([("branch", "v2")] if revision else []),
        ("adds README.md", 'base = "me/it"'),
        ("adds adapter_model.safetensors", "weights"),
        ("deletes model-2.safetensors", ""),
        ("deletes chat_template.jinja", ""),
        (f"deletes merged-{revision}.gguf", ""),
        (f"commits to {revision}", "Step 3 of the run mine, by Capstan"),
    ]


def refused(status: int, said: str | None = None) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("Client error.\nSee the manual.", response=response, server_message=said)


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        *(
            (
                refused(status),
                ConfigError,
                f"the token in HF_TOKEN may not write to hf://me/it: Client error ({status}). ",
            )
            for status in (401, 403, 404)
        ),
        (refused(400, "No.\n"), StorageError, "the Hub did not take hf://me/it: No (400). Call push again."),
        (refused(500), StorageError, "the Hub did not take hf://me/it: Client error (500). Call push again."),
        (OfflineModeIsEnabled("off"), ConfigError, "capstan push needs the network, and HF_HUB_OFFLINE is set."),
        (ConnectionError("reset"), Unreachable, "the Hub cannot be reached: reset. Call push again;"),
        (export.httpx2.ConnectError("no route"), Unreachable, "the Hub cannot be reached: no route. Call push again;"),
        (ValueError("no such license"), ConfigError, "hf://me/it does not take the export: no such license."),
    ],
    ids=str,
)
def test_what_the_hub_says_is_a_sentence_and_whether_to_call_again(
    error: Exception, kind: type[CapstanError], sentence: str
) -> None:
    with pytest.raises(kind) as caught, export._explained("me/it"):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(("size", "said"), [(4 * 10**9, [0, 12, 30]), (4 * 10**6, [12, 30])])
def test_much_work_is_told_of_at_once_and_then_every_ten_seconds_until_it_is_done(size: int, said: list[int]) -> None:
    now, lines = 0, list[str]()
    line = export.lines("merging", lines.append, lambda: float(now))
    for now in (0, 3, 12, 21, 30, 40):
        line(size * now // 40, size)
    assert lines == [f"merging: {decimal(size * at // 40)} of {decimal(size)}" for at in said]


@pytest.mark.usefixtures("started")
def test_its_error_and_exit_code_become_ours() -> None:
    with pytest.raises(CapstanError, match=r"^the destination is taken\.$") as caught:
        export.run_module("any.module", "fails", progress=ExportProgress(lambda *_: None, lambda _: None))
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("started")
def test_a_crash_is_shown_whole_and_its_exit_code_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CapstanError, match=r"^any\.module ended with exit code 1; its output is above\.$") as caught:
        export.run_module("any.module", "crashes", progress=ExportProgress(lambda *_: None, lambda _: None))
    assert caught.value.exit_code == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.rstrip().endswith("RuntimeError: no such kernel")


def test_a_push_removes_what_a_program_would_load_of_an_earlier_export_and_nothing_else(tmp_path: Path) -> None:
    for name in ("README.md", "model.safetensors"):
        (tmp_path / name).write_text("new")
    old = ["adapter_model.bin", "adapter_config.json", "tokenizer.json", "additional_chat_templates/rag.jinja"]
    old += ["config.json", "generation_config.json", "model.safetensors.index.json", "old-Q4_K_M.gguf", "vocab.json"]
    old += ["model-00001-of-00002.safetensors", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"]
    stay = [
        ".gitattributes",
        "README.md",
        "model.safetensors",
        "notes.txt",
        "runs/old/model.safetensors",
        "results.json",
    ]
    made = export._operations(tmp_path, [*old, *stay])
    added = [one.path_in_repo for one in made if isinstance(one, CommitOperationAdd)]
    removed = [one.path_in_repo for one in made if isinstance(one, CommitOperationDelete)]
    assert (added, removed) == (["README.md", "model.safetensors"], old)
