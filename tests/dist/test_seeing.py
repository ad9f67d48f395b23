"""A run over pictures: the curve of plain transformers, on any number of ranks, also where some have no pictures."""

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.dist import curves, runs, seeing
from tests.dist.launch import launch, running
from tests.dist.test_resume import losses
from tests.material import Workshop
from trainer.config import dump_config, override
from trainer.export.write.adapter import export_adapter
from trainer.run import layout
from trainer.store.store import open_store

pytest.importorskip("torchvision")
from tests import every_seeing
from tests.every_model import PROVEN
from tests.seeing import BASES, make_pictured, picture, seeing_base

pytestmark = pytest.mark.timeout(300)
QUICK = "gemma3"


def long(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("kind", "quant"), [(QUICK, "none"), *(long(kind, "none") for kind in BASES if kind != QUICK), long("llava", "nf4")]
)
def test_the_curve_is_that_of_plain_transformers_on_one_and_more_ranks(
    kind: str, quant: str, workshop: Workshop, tmp_path: Path
) -> None:
    """Rows are of one or two documents: some have pictures, some have none, and so have the ranks of a step."""
    base = seeing_base(tmp_path / "base", kind)
    rows = make_pictured(tmp_path / "rows")
    config = workshop.config(
        f"{kind}-{quant}",
        *(f"model.base={base}", f"quant.type={quant}", f"model.dtype={'bf16' if quant == 'nf4' else 'fp32'}"),
        *(f"data.train=[{{path: {rows}}}]", "data.format=pictures", "data.sequence_length=128"),
        *("train.steps=4", "train.global_batch=6", "train.micro_batch=1", "optim.lr=0.01"),
        "checkpoint.every_steps=0",
    )
    fingerprint = workshop.prepare(config).train
    text = dump_config(config)
    (stock,) = launch(1, seeing.stock_losses, text, fingerprint)
    within = 2e-2 if quant == "nf4" else 1e-5
    for ranks in (1, 3) if quant == "none" and kind != QUICK else (2,):
        named = dump_config(override(config, f"run.name={kind}-{quant}-{ranks}"))
        ours = launch(ranks, curves.losses, named, fingerprint)[0]
        assert ours == pytest.approx(stock, rel=within), ranks
    assert stock[-1] < 0.9 * stock[0]


def _run(kind: str, workshop: Workshop, base: Path, rows: Path, name: str) -> Any:
    return workshop.config(
        name,
        *(f"model.base={base}", "quant.type=none", "model.dtype=fp32", f"data.train=[{{path: {rows}}}]"),
        *("data.format=pictures", "data.sequence_length=128", "train.steps=6", "train.global_batch=6"),
        *("train.micro_batch=1", "optim.lr=0.01", "checkpoint.every_steps=3"),
    )


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_on_other_ranks_and_decodes_no_picture_again(
    workshop: Workshop, tmp_path: Path
) -> None:
    base, rows = seeing_base(tmp_path / "base", "qwen3_vl"), make_pictured(tmp_path / "rows")
    whole, killed = (_run("qwen3_vl", workshop, base, rows, name) for name in ("seeing-whole", "seeing-killed"))
    fingerprint = workshop.prepare(whole).train
    (every,) = launch(1, seeing.decoded, dump_config(whole), fingerprint, "start")
    expected = losses(workshop.store.sub("seeing-whole"))
    folder = workshop.store.sub("seeing-killed")
    with running(1, runs.run, dump_config(killed), fingerprint, "hold") as ranks:
        ranks.wait_until(lambda: folder.exists(layout.manifest(3)))
        ranks.kill()
    again = launch(2, seeing.decoded, dump_config(killed), fingerprint, "resume")
    assert losses(folder) == pytest.approx(expected, rel=1e-5)
    # Three steps of six are left; one more is read ahead in both.
    assert 0 < sum(again) < 0.75 * every


@pytest.mark.long
@pytest.mark.parametrize("kind", BASES)
def test_an_export_sees_as_its_card_says(kind: str, workshop: Workshop, tmp_path: Path) -> None:
    base, rows = seeing_base(tmp_path / "base", kind), make_pictured(tmp_path / "rows")
    name = f"seeing-{kind}-export"
    config = _run(kind, workshop, base, rows, name)
    assert launch(1, runs.run, dump_config(config), workshop.prepare(config).train)[0]["outcome"] == "finished"
    workshop.store.sub(name).put(layout.CONFIG, dump_config(config).encode())
    adapter = tmp_path / "adapter"
    export_adapter(workshop.store.sub(name), open_store(str(adapter)))
    (code,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
    shown = picture(40, 30, 1)
    shown.save(tmp_path / "picture.png")
    code = code.replace("FOLDER", str(adapter)).replace("picture.jpg", str(tmp_path / "picture.png"))
    with patch("builtins.print") as said:
        exec(code, here := dict[str, Any]())
    assert "assistant: " in said.call_args[0][0]
    with torch.no_grad():
        one = here["model"](**here["inputs"]).logits
        inputs = {name: v.flip(-1) if v.is_floating_point() else v for name, v in here["inputs"].items()}
        other = here["model"](**inputs).logits
        with here["model"].disable_adapter():
            before = here["model"](**here["inputs"]).logits
    assert (one - other)[:, -1].abs().max() > 1e-4
    assert (one - before)[:, -1].abs().max() > 1e-4


# Their decoder is inside of the module with the head; transformers picks the tower's states itself; the types of tokens
# follow from more than the ids.
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["llama4", "mistral3", "idefics3"])
def test_a_class_with_ways_of_its_own_is_that_of_plain_transformers(kind: str, tmp_path: Path) -> None:
    (found,) = launch(1, every_seeing.tried, kind, str(tmp_path), timeout=800)
    assert found["status"] == PROVEN, found
