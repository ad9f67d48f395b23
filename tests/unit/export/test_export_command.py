"""What the process of `capstan export` says and leaves, whatever the format."""

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.checkpoints import commit
from trainer.errors import ConfigError, NothingToResume
from trainer.export import __main__ as command
from trainer.export.destination import CARD, DestinationTaken, Written
from trainer.export.figures import NOT_TRAINED, KeptProof, Proof, ServedProof
from trainer.export.proof import verify
from trainer.state.checkpoint.manifest import write_doubt
from trainer.store.store import Store, open_store

PROOF = Proof(0.01, 0.02, 0.5, 0.03, 0.04, 0.6, "fp32", "8 rows")
KEPT = KeptProof(3.0, 1.0, 1.2, 0.9, 0.85, 0.95, 0.1, 0.7, "dither", "dither", False, 9, "fp32", "9 rows")
SERVED = ServedProof("http://here", "one", 0.01, 0.01, 0.3, 0.02, 0.5, 0.4, 9, 9, "8 rows")
UNPROVEN = b"## Proof\n\nIt was not compared.\n\n## Limitations\n"


class Form:
    """A format that exports step 4, and what happens to it."""

    whole_model = True

    def __init__(self, run: Store, proof: Any = PROOF, refused: Exception | None = None) -> None:
        self.run, self.proof, self.refused, self.done = run, proof, refused, list[Any]()

    def write(self, folder: Store, destination: Store, step: int | None, progress: Any) -> Written:
        destination.put(CARD, UNPROVEN)
        if self.refused is not None:
            raise self.refused
        destination.put("weights", b"1234")
        return Written(command.whole_checkpoint(self.run), {"files": 1}, ("a remark",))

    def prove(self, folder: Store, step: int, destination: Store) -> Any:
        self.done.append(("proven", step, b"not compared with" in destination.get(CARD)))
        return self.proof


class Command:
    """The command over a run with a checkpoint of step 4."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, form: Form, layers: int | None = None) -> None:
        self.form, self.run, self.destination = form, form.run, folder / "out"
        config = SimpleNamespace(model=SimpleNamespace(layers=layers, base="b"))
        base = SimpleNamespace(headers={"a": SimpleNamespace(size=1000)})
        monkeypatch.setattr(command, "find_format", lambda *_: form)
        monkeypatch.setattr(command, "trained_config", lambda *_: config)
        monkeypatch.setattr(command, "method_of", lambda _: SimpleNamespace(exports_model=True))
        monkeypatch.setattr(command, "resolve_trained_base", lambda *_: base)
        monkeypatch.setattr(
            command, "check_whole", lambda *_: form.done.append("every byte of the base") or "all whole"
        )
        monkeypatch.setattr(command, "getting_ready", nullcontext)
        monkeypatch.setattr(command, "get_ready", lambda _: None)
        monkeypatch.setattr(verify, "check_again", self.again)
        monkeypatch.setattr(verify, "prove_served", self.served)

    def again(self, form: Any, run: Any, step: int, destination: Any) -> Any:
        self.form.done.append("every byte of the export")
        return SimpleNamespace(facts={"codes": 200, "codes_changed": 3})

    def served(self, *_: Any, whole_model: bool) -> Any:
        self.form.done.append(("served", whole_model))
        return SERVED

    def __call__(self, **given: Any) -> dict[str, Any]:
        usual = {"format": "peft", "options": [], "step": None, "verify": False, "server": None}
        return command._export(
            argparse.Namespace(run=self.run.uri, destination=str(self.destination), **{**usual, **given})
        )

    @property
    def card(self) -> str:
        return (self.destination / CARD).read_text()


@pytest.fixture
def run(tmp_path: Path) -> Store:
    run = open_store(str(tmp_path / "run"))
    commit(run, 4)
    return run


def test_an_export_tells_its_bytes_and_what_a_user_has_to_know_of_its_checkpoint(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Command(tmp_path, monkeypatch, Form(run))()
    assert result == {
        "step": 4,
        "bytes": 4 + len(UNPROVEN),
        "tuned_base": True,
        "facts": {"files": 1},
        "remarks": ["a remark"],
    }
    written = commit(run, 9)
    write_doubt(run, [4], written.generation, "a rank computed wrongly")
    run.put(written.shards[0].key, b"damaged")
    capsys.readouterr()
    again = Command(tmp_path / "again", monkeypatch, Form(run), layers=2)()
    assert again["remarks"][0] == "the checkpoint of step 4 is in doubt: a rank computed wrongly"
    assert again["remarks"][1].startswith("It was trained over the first 2 layers of its base alone")
    assert again["remarks"][2:] == ["a remark"]
    said = "say the checkpoint of step 9 is damaged, so that of step 4 is exported"
    assert said in capsys.readouterr().out.splitlines()
    Command(tmp_path / "asked", monkeypatch, Form(run))(step=4)
    assert said not in capsys.readouterr().out.splitlines(), "it is the one that was asked for"


@pytest.mark.parametrize(("proof", "proven"), [(PROOF, True), (replace(PROOF, kl=9.0), False)])
def test_a_proof_is_in_the_card_once_it_holds(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proof: Proof, proven: bool
) -> None:
    asked = Command(tmp_path, monkeypatch, Form(run, proof))
    result = asked(verify=True)
    assert asked.form.done == ["every byte of the base", "every byte of the export", ("proven", 4, True)]
    assert result["proof"]["kl"] == proof.kl
    assert ("It was compared with the trained model: " in asked.card) is proven
    assert proof.verdict.startswith(NOT_TRAINED) is not proven


def test_a_share_has_the_codes_that_were_counted_and_a_server_proves_nothing_of_the_files(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Command(tmp_path, monkeypatch, Form(run, KEPT))(verify=True)["proof"]
    assert (kept["codes"], kept["codes_changed"]) == (200, 3)
    served = Command(tmp_path / "served", monkeypatch, Form(run))
    assert served(verify=True, server="http://here")["proof"]["server"] == "http://here"
    assert served.form.done == ["every byte of the base", ("served", True)]
    assert "It was compared with" not in served.card


def test_what_is_there_already_is_proven_and_without_that_refused(
    run: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = DestinationTaken("the destination is not empty")
    asked = Command(tmp_path, monkeypatch, Form(run, refused=taken))
    with pytest.raises(DestinationTaken):
        asked()
    open_store(str(asked.destination)).put(CARD, UNPROVEN)
    assert asked(verify=True)["step"] == 4
    (asked.destination / CARD).unlink()
    assert asked(verify=True, server="http://here")["step"] == 4, "a proof needs no card"
    refused = Command(tmp_path / "other", monkeypatch, Form(run, refused=ConfigError("no such export")))
    with pytest.raises(ConfigError):
        refused()
    assert not refused.destination.exists() or not list(refused.destination.iterdir()), "nothing is left of it"


def test_an_error_is_one_sentence_with_the_exit_code_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "/runs/a", "/out", "--format", "peft"])
    monkeypatch.setattr(command, "_export", lambda _: {"step": 4})
    command.main()
    assert json.loads(capsys.readouterr().out) == {"step": 4}

    def fails(_: Any) -> Any:
        raise NothingToResume("it has no checkpoint")

    monkeypatch.setattr(command, "_export", fails)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == NothingToResume.exit_code
    assert ended.value.code not in (0, 1)
    assert capsys.readouterr().err == "capstan: it has no checkpoint\n"
