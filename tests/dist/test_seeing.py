"""A run over pictures: the curve of plain transformers, on any number of ranks, also where some have no pictures."""

from pathlib import Path
from typing import Any

import pytest

from tests.dist import curves, seeing
from tests.dist.launch import launch
from tests.material import Workshop
from tests.seeing import BASES, make_pictured, seeing_base
from trainer.config import dump_config, override

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
