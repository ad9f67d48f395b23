"""What pages say of the product is so: readers on a page read what the product writes, tables list what there is, and
no page calls missing what a setting offers.
"""

import importlib
import inspect
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pages import PAGES, ROOT, blocks_of
from tests.unit.data.test_data_compile import build, write
from tests.unit.data.test_shared_prefix import ROWS, settings
from trainer.config import Config
from trainer.config.peers.table import PEERS
from trainer.data.dataset.dataset import ID_BITS
from trainer.export.card import PLACE, peft_usage
from trainer.store.store import open_store
from trainer.tuning.method import methods
from trainer.tuning.objective import objectives

DOCS = ROOT / "docs"
# What pages call things, and the setting or the value that offers each.
OFFERED = {
    r"adapters? of somewhere else|foreign adapters?|others' adapters?": "tuning.start",
    r"noise on embeddings|NEFTune|noisy embeddings?": "objective.neftune_alpha",
    r"DFT|dynamic fine-tuning": "objective.dft",
    r"EAFT": "objective.eaft",
    r"GPTQ|AWQ": "quant.type",
    r"NVFP4|MXFP4|INT4|FP8 bases": "quant.type",
    r"early stopping": "train.stop_when",
    r"GRPO": "objective.name=grpo",
    r"DPO": "objective.name=dpo",
    r"ORPO": "objective.name=orpo",
    r"KTO": "objective.name=kto",
    r"SimPO": "objective.name=simpo",
    r"[Rr]eward models?": "objective.name=reward",
    r"[Dd]istillation": "objective.name=distil",
    r"DoRA": "tuning.method=dora",
    r"OFT": "tuning.method=oft",
    r"[Ss]equence parallelism": "sharding.sequence_parallel",
    r"Muon|Lion|Adafactor": "optim.name",
    r"Liger": "model.kernels",
    r"8-bit bases": "quant.type",
}
DENIALS = (
    r"\bnot offered\b|\bnot there\b|\bis missing\b|\bare missing\b|\bdoes not exist\b|\bdo not exist\b|\bnot here\b"
    r"|\bis not possible\b|\bcannot be continued\b|\bnot supported\b|\bStay where you are\b|\bno counterpart\b|\*\*no\*\*"
)
# Sentences that deny something else than what they name.
TRUE_DENIALS = (
    "GaLore, and other optimizers than AdamW, Adafactor, Lion and Muon",
    "reinforcement learning with a critic or with environments",
    "PEFT's dropout of rotations",
    "long contexts divided over GPUs",
    "tensor and expert parallelism",
)


def denials(text: str) -> list[str]:
    """The sentences and items of a page that deny something, without its blocks; a list belongs to what leads it in."""
    found = list[str]()
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for paragraph in re.split(r"\n\s*\n(?!- )", text):
        joined = " ".join(paragraph.split())
        led = re.match(r"[^:]*:(?= - )", joined)
        if led and re.search(DENIALS, led[0]):
            found += joined[led.end() :].split(" - ")
            continue
        parts = paragraph.splitlines() if paragraph.lstrip().startswith("|") else re.split(r"(?<=[.;:])\s+", joined)
        found += [part for part in parts if re.search(DENIALS, part)]
    return found


def denied_but_offered(text: str) -> list[str]:
    return [
        f"{sentence!r}: {setting}"
        for sentence in denials(text)
        if not any(allowed in sentence for allowed in TRUE_DENIALS)
        for words, setting in OFFERED.items()
        if re.search(rf"\b(?:{words})\b", sentence)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_calls_missing_what_a_setting_offers(page: Path) -> None:
    assert denied_but_offered(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "sentence",
    [
        "Loading a foreign adapter to train it on is not offered.",
        "Stay where you are for: - images; - GPTQ, AWQ or FP8 training; - TPUs.",
        "A run cannot go on: noise on embeddings does not exist\nhere.",
        "| reinforcement learning | **no** GRPO | yes |",
    ],
)
def test_a_wrong_denial_is_found(sentence: str) -> None:
    assert denied_but_offered(sentence) != []


def test_what_pages_may_not_deny_is_offered() -> None:
    offered = {"objective": objectives(), "tuning": methods()}
    for setting in OFFERED.values():
        path, _, value = setting.partition("=")
        section, name = path.split(".")
        held: Any = Config.model_fields[section].annotation
        assert name in held.model_fields, setting
        if value:
            assert value in offered[section], setting


def test_the_reader_of_compiled_data_reads_ids_behind_every_flag(tmp_path: Path, monkeypatch: Any) -> None:
    """Documents with a shared prompt, whose tokens have the lowest flag."""
    build(
        open_store(str(tmp_path / "store")),
        settings(write(tmp_path / "a.jsonl", ROWS["answers"]), "answers", shared=True),
    )
    (reader,) = (block.text for block in blocks_of(DOCS / "data-format.md") if block.language == "python")
    (folder,) = {path.parent for path in (tmp_path / "store").rglob("tokens-00000.bin")}
    monkeypatch.chdir(folder)
    ids = list[int]()
    for document in range(len(np.fromfile("documents-00000.bin", "<u8")) - 1):
        names: dict[str, Any] = {"np": np}
        exec(reader.replace("offsets[7] : offsets[8]", f"offsets[{document}] : offsets[{document + 1}]"), names)
        ids += names["ids"].tolist()
    stored = np.fromfile("tokens-00000.bin", "<u4")
    assert (stored >> 27 & 1).any()
    assert ids == (stored & ID_BITS).tolist()


def test_a_shard_has_the_files_that_its_page_counts(tmp_path: Path) -> None:
    build(open_store(str(tmp_path / "store")), settings(write(tmp_path / "a.jsonl", ROWS["answers"]), "answers", False))
    written = {path.name for path in (tmp_path / "store").rglob("*-00000.bin")}
    page = " ".join((DOCS / "data-format.md").read_text(encoding="utf-8").split())
    counted = ["", "one", "two", "three", "four", "five", "six"][len(written)]
    assert f"has the first {counted} files of this table" in page
    assert f"SHA-256 of its {counted} files" in page
    assert set(re.findall(r"\| `(\w+)-0000i\.bin`", page)) == {name.partition("-")[0] for name in written}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_wrapped(page: Path) -> None:
    """Tables and blocks are as wide as they need; a line that is one link or one piece of code cannot be broken."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    wide = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "#", "<", "!["))]
    breakable = [line for line in wide if re.sub(r"`[^`]*`|\]\([^)]*\)", "", line).strip(" -").count(" ") > 1]
    assert breakable == []


def test_every_extra_has_its_line() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    table = re.findall(r"^\| (`.*?) \|", (DOCS / "installation.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for cell in table for name in re.findall(r"`([\w-]+)`", cell)} == extras.keys()


def test_no_page_asks_for_a_dependency_that_is_installed_anyway() -> None:
    core = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {re.split(r"[<>=\[]", line)[0] for line in core}
    asked = [
        (page.name, word)
        for page in PAGES
        for line in re.findall(r"pip install ([^`\n]+)", page.read_text(encoding="utf-8"))
        if "--no-deps" not in line
        for word in line.split()
        if word in names
    ]
    assert asked == []


def test_public_functions_have_the_arguments_that_their_page_lists() -> None:
    listed = re.findall(r"^\| `([\w.]+)\((.*?)\)` \|", (DOCS / "python-api.md").read_text(), re.MULTILINE)
    assert len(listed) > 8
    for path, arguments in listed:
        module, _, name = path.rpartition(".")
        signature = inspect.signature(getattr(importlib.import_module(module), name))
        assert _as_listed(signature) == arguments, path


def _as_listed(signature: inspect.Signature) -> str:
    """The arguments without their types, and a function that is a default by its name."""
    plain = [
        parameter.replace(
            annotation=parameter.empty,
            default=_Named(parameter.default) if inspect.isfunction(parameter.default) else parameter.default,
        )
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(plain))[1:-1]


class _Named:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = function.__name__

    def __repr__(self) -> str:
        return self._name


def test_every_tool_whose_files_are_read_is_in_the_comparison_and_the_migration() -> None:
    for page in ("comparison.md", "migration.md"):
        text = (DOCS / page).read_text(encoding="utf-8").lower()
        titles = {peer.title.partition(" (")[0].removesuffix(" v1") for peer in PEERS}
        assert {title for title in titles if title.lower() not in text} == set(), page


def test_the_snippet_of_the_export_page_is_the_cards() -> None:
    snippets = [block.text for block in blocks_of(DOCS / "export.md") if block.language == "python"]
    assert set(peft_usage(None).replace(PLACE, "adapter").splitlines()) == set(snippets[0].splitlines())


def test_bases_that_a_page_calls_known_are_known() -> None:
    known = [json.loads(line) for line in (ROOT / "trainer/base/find/known.jsonl").read_text().splitlines()]
    ids = {name for base in known for name in base["ids"]}
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    assert "moonshotai/Kimi-K2.5` is planned" in " ".join(page.split())
    assert "moonshotai/Kimi-K2.5" in ids
