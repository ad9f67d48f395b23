"""`capstan data` as a user calls it."""

import json
from pathlib import Path

from tests.cli.conftest import Capstan
from tests.material import make_data


def test_check_reports_as_json_and_refuses_what_train_would(capstan: Capstan, config: Path, tmp_path: Path):
    path = make_data(tmp_path / "rows.jsonl", documents=30)
    sound = capstan("data", "check", config, f"data.train=[{{path: {path}}}]", "--json")
    report = json.loads(sound.stdout)
    assert (sound.returncode, report["train"]["documents"], report["refusals"]) == (0, 30, [])
    path.write_text(path.read_text() + "{oops\n")
    refused = capstan("data", "check", config, f"data.train=[{{path: {path}}}]", "--json")
    report = json.loads(refused.stdout)
    assert (refused.returncode, report["train"]["bad_rows"], len(report["refusals"])) == (3, 1, 1)
    assert "rows.jsonl:31: not JSON" in report["train"]["bad_row_examples"][0]
    assert refused.stderr.strip().splitlines()[-1].startswith("capstan: data.train: 1 bad rows")


def test_a_changed_source_is_compiled_anew(capstan: Capstan, config: Path, tmp_path: Path):
    path = make_data(tmp_path / "rows.jsonl", documents=30)
    command = ("data", "build", config, f"data.train=[{{path: {path}}}]", "--json")
    built = json.loads(capstan(*command).stdout)["train"]
    assert (built["compiled"], built["documents"]) == (True, 30)
    assert json.loads(capstan(*command, "--dry-run").stdout)["train"] == built
    make_data(path, documents=29)
    changed = json.loads(capstan(*command, "--dry-run").stdout)["train"]
    assert not changed["compiled"]
    assert changed["fingerprint"] != built["fingerprint"]


def test_data_built_from_a_relative_path_is_found_by_its_absolute_one(capstan: Capstan, config: Path, tmp_path: Path):
    make_data(tmp_path / "rows.jsonl", documents=30)
    built = json.loads(capstan("data", "build", config, "data.train=[{path: ./*.jsonl}]", "--json").stdout)["train"]
    absolute = f"data.train=[{{path: {tmp_path}/rows.jsonl}}]"
    found = json.loads(capstan("data", "build", config, absolute, "--dry-run", "--json").stdout)["train"]
    assert found == built
    assert found["compiled"]


def test_plan_says_at_once_that_sources_are_missing(capstan: Capstan, config: Path):
    sources = ("data.train=[{path: no-*.jsonl}]", "data.eval=[{path: gone.parquet}]")
    done = capstan("plan", config, *sources, "--json")
    assert done.returncode == 3
    assert "data.train[0].path: 'no-*.jsonl' matches no file" in done.stderr
    assert "data.eval[0].path: 'gone.parquet' does not exist" in done.stderr
    assert len([text for text in json.loads(done.stdout)["shortfalls"] if "path" in text]) == 2
