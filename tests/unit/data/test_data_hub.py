"""Data sets of the Hub, through huggingface_hub itself and a stand-in of the Hub's HTTP API."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.hub_datasets import COMMIT, TOKEN, serve_hub
from tests.unit.data.test_data_files import lines, parquet
from trainer.config import Source
from trainer.data.source import hub
from trainer.data.source.files import expand
from trainer.errors import DataError

CARD = b"""---
configs:
- config_name: en
  data_files:
  - {split: train, path: "en/train-*.parquet"}
  - {split: test, path: en/test.parquet}
- config_name: de
  default: true
  data_files: {train: de.jsonl}
---
"""
REPOSITORIES = {
    "ann/described": {
        "README.md": CARD,
        "en/train-0.parquet": parquet({"text": "one"}),
        "en/train-1.parquet": parquet({"text": "two"}),
        "en/test.parquet": parquet({"text": "three"}),
        "de.jsonl": lines({"text": "eins"}),
    },
    "ann/named": {
        "data/train-00000.jsonl": lines({"text": "a"}),
        "data/validation-00000.jsonl": lines({"text": "b"}),
        "notes.txt": b"constrained",
    },
    "ann/plain": {"all.csv": b"text\nc\n", "image.png": b"", "LICENSE.txt": b"free"},
    "ann/secret": {"x.jsonl": lines({"text": "s"})},
    "ann/folders": {
        "README.md": b"---\nconfigs:\n- {config_name: 2020, data_dir: old}\n- {config_name: new, data_dir: new}\n---\n",
        "old/train.jsonl": lines({"text": "o"}),
        "old/test.jsonl": lines({"text": "p"}),
        "new/train.jsonl": lines({"text": "n"}),
    },
    "ann/parts": {f"data/train-0000{part}-of-00002.jsonl": lines({"text": str(part)}) for part in (0, 1)},
    "ann/listed": {
        "README.md": b"---\nconfigs:\n- {config_name: default, data_files: [a-*.jsonl, b.jsonl]}\n---\n",
        **{f"{name}.jsonl": lines({"text": name}) for name in ("a-0", "b", "c")},
    },
    "ann/about": {"a.json": lines({"text": "a"}), "dataset_infos.json": b"{}", ".hidden/b.json": b"{}"},
    "ann/broken": {"README.md": b"---\nconfigs: [\n---\n", "a.jsonl": lines({"text": "a"})},
}
# Runs with its own environment: huggingface_hub reads it when it is imported.
READ = """
import json, sys
from trainer.config import Source
from trainer.data.source.reading import rows
from trainer.data.source.files import expand
from trainer.errors import DataError
for given in json.loads(sys.argv[1]):
    try:
        files = expand([Source.model_validate(given)], "data.train")
        texts = [row["text"] for file in files for _, row in rows(file, print)]
        print(json.dumps([texts, [[file.uri, file.version, file.changed()] for file in files]]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def read(sources: list[dict[str, Any]], cache: Path, **environment: str) -> list[Any]:
    """The texts and files of each source, or why there are none."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    given = {**clean, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", **environment}
    command = [sys.executable, "-c", READ, json.dumps(sources)]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


WANTED: list[tuple[dict[str, Any], Any]] = [
    ({"path": "hf://ann/described"}, ["eins"]),
    ({"path": "hf://datasets/ann/described", "subset": "en"}, ["one", "two"]),
    ({"path": f"hf://datasets/ann/described@{COMMIT}", "subset": "en", "split": "test"}, ["three"]),
    ({"path": "hf://ann/described@main/en/*-1.parquet"}, ["two"]),
    ({"path": "hf://ann/named"}, ["a"]),
    ({"path": "hf://ann/named", "split": "validation"}, ["b"]),
    ({"path": "hf://ann/plain"}, ["c"]),
    ({"path": "hf://ann/plain/*.txt"}, ["free"]),
    ({"path": "hf://ann/secret"}, ["s"]),
    ({"path": "hf://ann/folders", "subset": "2020"}, ["o"]),
    ({"path": "hf://ann/folders", "subset": "2020", "split": "test"}, ["p"]),
    ({"path": "hf://ann/folders", "subset": "new"}, ["n"]),
    ({"path": "hf://ann/about"}, ["a"]),
    ({"path": "hf://ann/listed"}, ["a-0", "b"]),
    ({"path": "hf://ann/parts/data/*-00001-of-00002.jsonl"}, ["1"]),
    ({"path": "hf://ann/folders"}, "data.train[0].subset: the data set ann/folders has the subsets 2020, new. Name one."),
    ({"path": "hf://ann/broken"}, "data.train[0].path: the description in the README.md of the data set ann/broken cannot be read"),
    ({"path": "hf://ann/described", "subset": "fr"}, "data.train[0].subset: the data set ann/described has no 'fr', but en, de."),
    ({"path": "hf://ann/described", "split": "test"}, "data.train[0].split: the data set ann/described has no split 'test', but train"),
    ({"path": "hf://ann/named", "split": "test"}, "data.train[0].split: the data set ann/named has no split 'test', but train,"),
    ({"path": "hf://ann/named/*.parquet"}, "data.train[0].path: 'hf://ann/named/*.parquet' matches no file of the data set"),
    ({"path": "hf://ann/nothing"}, "data.train[0].path: the Hub did not give the data set ann/nothing ("),
    ({"path": "hf://ann/named@gone"}, "data.train[0].path: the Hub did not give the data set ann/named ("),
]  # fmt: skip


def test_data_sets_are_read_through_the_cache_and_from_it_alone_when_offline(tmp_path: Path) -> None:
    sources = [source for source, _ in WANTED]
    with serve_hub(REPOSITORIES, private=("ann/secret",)) as address:
        online = read(sources, tmp_path, HF_ENDPOINT=address, HF_TOKEN=TOKEN)
        (stranger,) = read([{"path": "hf://ann/secret"}], tmp_path / "other", HF_ENDPOINT=address)
    for found, (source, expected) in zip(online, WANTED, strict=True):
        if isinstance(expected, str):
            assert str(found).startswith(expected)
        else:
            assert found[0] == expected, (source, found)
            assert all(
                uri.startswith("hf://datasets/ann/") and version and not changed for uri, version, changed in found[1]
            )
    assert stranger.startswith("data.train[0].path: the Hub did not give the data set ann/secret (")
    assert "HF_TOKEN" in stranger
    # The server is gone: the cache has the same files under the same names, and nothing else.
    there = [number for number, (_, expected) in enumerate(WANTED) if isinstance(expected, list)]
    offline = read([sources[number] for number in there], tmp_path, HF_HUB_OFFLINE="1")
    assert offline == [online[number] for number in there]
    # Of these the cache has a part: it is known which, and where another program has filled it, by the names.
    part = {"path": "hf://ann/parts"}
    (known,) = read([part], tmp_path, HF_HUB_OFFLINE="1")
    assert "1 file(s) are missing (data/train-00000-of-00002.jsonl)" in known
    (listing,) = tmp_path.glob("hub/datasets--ann--parts/trees/*.json")
    listing.unlink()
    (guessed,) = read([part], tmp_path, HF_HUB_OFFLINE="1")
    assert "the cache has 1 of the 2 parts of data/train, and HF_HUB_OFFLINE" in guessed
    (missing,) = read([{"path": "hf://ann/described"}], tmp_path / "empty", HF_HUB_OFFLINE="1")
    assert missing.startswith("data.train[0].path: the Hub did not give the data set ann/described (")


class _Hub:
    """huggingface_hub over a folder, in this process. `asked` has what it was asked for."""

    def __init__(self, folder: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.keys, self.asked = folder, keys, list[dict[str, Any]]()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "hub_answers", lambda: self.answers)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)
        monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", self.kept)
        self.answers = True

    def list_repo_files(self, repo: str, **asked: Any) -> list[str]:
        self.asked.append({"list": repo, **asked})
        return self.keys

    def kept(self, repo: str, **asked: Any) -> list[Any]:
        self.asked.append({"kept": repo, **asked})
        return [SimpleNamespace(path=key) for key in self.keys]

    def snapshot(self, repo: str, **asked: Any) -> str:
        self.asked.append({"fetch": repo, **asked})
        return str(self.folder)


@pytest.mark.parametrize("answers", [True, False])
def test_the_files_of_a_revision_are_asked_for_by_their_very_names(
    answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = _Hub(tmp_path, ["a1.jsonl", "a[1].jsonl"], monkeypatch)
    there.answers = answers
    found = hub.find_hub_files("hf://ann/b@refs%2Fpr%2F1/a[1].jsonl", None, None, "data.train[0].path", [".jsonl"])
    assert found == {"hf://datasets/ann/b/a[1].jsonl": tmp_path / "a[1].jsonl"}
    of = {"repo_type": "dataset", "revision": "refs/pr/1"}
    assert there.asked == [
        {"list" if answers else "kept": "ann/b", **of},
        {"fetch": "ann/b", **of, "allow_patterns": ["a[[]1].jsonl"], "local_files_only": not answers},
    ]


SEVERAL = "{config_name: other, data_files: b.jsonl}, {config_name: default, data_files: a.jsonl}"


@pytest.mark.parametrize(
    ("configs", "keys", "split", "expected"),
    [
        (f"[{SEVERAL}]", ["a.jsonl", "b.jsonl"], None, ["a.jsonl"]),
        (
            "[{config_name: x, data_dir: in, data_files: '*.jsonl'}]",
            ["a.jsonl", "in/b.jsonl", "in/c.md"],
            None,
            ["in/b.jsonl"],
        ),
        ("[]", ["train.jsonl", "extra/a.jsonl", "extras.jsonl"], "extra", ["extra/a.jsonl"]),
        ("[]", ["a.jsonl", "__MACOSX/a.jsonl", ".x/a.jsonl", "dataset_info.jsonl"], None, ["a.jsonl", "dataset_info.jsonl"]),
        ("[]", ["valid.jsonl", "my-dev/a.jsonl", "devious.jsonl", "train.jsonl"], "validation", ["my-dev/a.jsonl", "valid.jsonl"]),
        ("[]", ["eval.jsonl", "training.jsonl"], "test", ["eval.jsonl"]),
        (
            "[]",
            ["1train.jsonl", "a-train.b.jsonl", "constrain.jsonl", "my train.jsonl", "train2.jsonl", "trainer.jsonl", "x_train/a.jsonl"],
            "train",
            ["1train.jsonl", "a-train.b.jsonl", "my train.jsonl", "train2.jsonl", "x_train/a.jsonl"],
        ),
        ("[]", ["eval.jsonl", "training.jsonl"], "train", ["training.jsonl"]),
    ],
)  # fmt: skip
def test_a_split_has_the_files_that_its_card_or_their_names_give_it(
    configs: str,
    keys: list[str],
    split: str | None,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    _Hub(tmp_path, [*keys, "README.md"], monkeypatch)
    found = hub.find_hub_files("hf://ann/b", None, split, "data.train[0].path", [".jsonl"])
    assert [path.relative_to(tmp_path).as_posix() for path in found.values()] == expected


@pytest.mark.parametrize("path", ["hf://", "hf://ann", "hf://datasets/ann", "hf://ann/b@"])
def test_a_path_that_is_no_data_set_of_the_hub_is_refused(path: str) -> None:
    with pytest.raises(DataError, match=r"data\.train\[0\]\.path: .* is no data set of the Hub\. Give hf://owner/name"):
        expand([Source(path=path)], "data.train")
