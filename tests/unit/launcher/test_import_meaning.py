"""A peer's file means what its author means: rows, rates, batch and what learns are those that the peer makes of it.

tests/meaning has a file for each peer, written down from its sources: what it makes of a few rows by a dozen
configurations. The import's run compiles the same rows here, and gives the same.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launcher.init.importing.importing import import_files
from tests.material import byte_tokenizer, make_base
from trainer.base.base import Tokenizer
from trainer.base.find.locate import resolve_base
from trainer.config import Config, parse_config
from trainer.data.compile.prepare import prepare
from trainer.data.dataset.dataset import ID_BITS, TARGET_BIT, open_dataset
from trainer.store.store import open_store
from trainer.train.horizon import learning_rate
from trainer.tuning.method import method_of

MEANING = Path(__file__).parents[2] / "meaning"
PEERS = sorted(path.stem for path in MEANING.glob("*.yaml") if path.stem != "rows")
TABLES: dict[str, dict[str, Any]] = {
    peer: yaml.safe_load((MEANING / f"{peer}.yaml").read_text(encoding="utf-8")) for peer in PEERS
}
ROWS: dict[str, list[dict[str, Any]]] = yaml.safe_load((MEANING / "rows.yaml").read_text(encoding="utf-8"))
CASES = [pytest.param(peer, case, id=f"{peer}-{case['name']}") for peer in PEERS for case in TABLES[peer]["cases"]]
TURN, ENDED = "<|im_start|>{{ message.role }}\n", "{{ message.content }}<|im_end|>"
CHATML = (
    f"{{% for message in messages %}}{TURN}{ENDED}\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    f"{{% for message in messages %}}{TURN}{{% if message.role == 'assistant' %}}{{% generation %}}{ENDED}"
    f"{{% endgeneration %}}{{% else %}}{ENDED}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small bases, whose tokens are bytes: without a chat template, with ChatML, and with tags around answers."""
    folder = tmp_path_factory.mktemp("bases")
    found = {"plain": make_base(folder / "plain")}
    for name, template in (("chat", CHATML), ("chat-instruct", CHATML), ("tagged", TAGGED)):
        found[name] = make_base(folder / name)
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token = "<|im_end|>"
        tokenizer.chat_template = template
        tokenizer.save_pretrained(found[name])
    return found


def imported(case: dict[str, Any], base: Path, folder: Path) -> Config:
    """The configuration that a case's file becomes, over its rows in a file."""
    data = folder / "data"
    data.mkdir()
    rows = data / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[case["rows"]]))
    if "info" in case:
        (data / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", **case["info"]}}))
    theirs = folder / case["name"]
    theirs.write_text(case["file"].replace("BASE", str(base)).replace("ROWS", str(rows)))
    found = import_files([theirs])
    lost = {outcome.key: outcome.why for outcome in found.keys if outcome.status in ("not supported", "unknown")}
    assert not lost
    return parse_config(found.text, [f"run.store={folder / 'store'}", *case.get("wants", ())])


def documents(config: Config, folder: Path, tokenizer: Tokenizer) -> list[str]:
    """The text of each document that the run trains on, with what is trained in brackets."""
    store = open_store(str(folder / "store"))
    dataset = open_dataset(store, prepare(config, resolve_base(config.model), store).train)
    read, found = dataset.read(np.arange(len(dataset.blocks) - 1)), list[str]()
    for number in range(sum(source.documents for source in dataset.manifest.sources)):
        stored, text, inside = read.gather(np.array([number])), "", False
        for token in stored:
            trained = bool(token & TARGET_BIT)
            text += ("⟦" if trained else "⟧") if trained != inside else ""
            text += str(tokenizer.decode([int(token & ID_BITS)]))
            inside = trained
        found.append(text + ("⟧" if inside else ""))
    return found


@pytest.mark.parametrize("peer", PEERS)
def test_each_peer_has_a_dozen_files_and_says_where_their_meaning_is_written(peer: str) -> None:
    table = TABLES[peer]
    assert len(table["cases"]) >= 12
    assert set(table["sources"]) == {"version", "text", "rate", "batch", "trains"}


@pytest.mark.parametrize(("peer", "case"), CASES)
def test_a_file_means_what_its_author_means(
    peer: str, case: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[case["base"]]
    config = imported(case, base, tmp_path)
    from transformers import AutoTokenizer

    if case["text"] is not None:
        assert documents(config, tmp_path, AutoTokenizer.from_pretrained(base)) == case["text"]
    total = config.train.steps or case["total"]
    assert total == case["total"]
    rates = {step: learning_rate(config.optim, step, total) for step in case["rate"]}
    assert rates == pytest.approx(case["rate"], rel=1e-6, abs=1e-15)
    assert config.train.global_batch == case["batch"]
    learns = {name: _setting(config, name) for name in case["trains"]}
    assert learns == case["trains"]
    if "learns" in case:
        architecture = resolve_base(config.model).architecture
        named = {part.name for part in architecture.parameters if part.name.startswith(tuple(case["learns"]))}
        assert set(method_of(config).shapes(architecture)) == named


def _setting(config: Config, name: str) -> Any:
    section, _, key = name.partition(".")
    value = getattr(getattr(config, section), key)
    return list(value) if isinstance(value, tuple) else value
