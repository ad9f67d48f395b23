"""The share of what was learnt that a merge as stored keeps, of logits whose probabilities are known."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.export.proof import kept
from trainer.export.proof.kept import kept_proof
from trainer.export.proof.rows import ProbeRow, distance

TRAINED: Any = SimpleNamespace(method=SimpleNamespace(through=False), probe=SimpleNamespace(origin="40 rows"))
ROWS = [ProbeRow(torch.zeros(1, 3, dtype=torch.long), torch.tensor([0, 1]), torch.tensor([1, 0])) for _ in range(40)]


def saying(losses: np.ndarray) -> list[Tensor]:
    """The logits of rows whose two tokens have these losses each."""
    chances = torch.from_numpy(np.exp(-losses))
    right = torch.stack([chances.log(), (1 - chances).log()], -1)
    return [torch.stack([pair.flip(-1), pair]) for pair in right]


def test_the_share_is_the_merges_gain_over_that_of_the_adapter_and_its_bounds_are_those_of_other_rows() -> None:
    draw = np.random.default_rng(1)
    base, adapter = np.full(40, 2.0), draw.uniform(0.5, 1.5, 40)
    merged = adapter + draw.uniform(0, 0.4, 40)
    alone, beside, made = map(saying, (base, adapter, merged))
    proof = kept_proof(TRAINED, ROWS, alone, beside, made, "dither", "dither", computed_in="fp32")
    losses = (proof.base_loss, proof.adapter_loss, proof.merged_loss)
    assert losses == pytest.approx((2.0, adapter.mean(), merged.mean()))
    assert proof.kept == pytest.approx((2 - merged.mean()) / (2 - adapter.mean()))
    chosen = draw.integers(0, 40, (4000, 40))
    shares = (2 - merged)[chosen].sum(1) / (2 - adapter)[chosen].sum(1)
    assert (proof.kept_low, proof.kept_high) == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.005)
    assert proof.kl == distance(beside, made, ROWS).kl > 0
    assert proof.kl_effect == distance(beside, alone, ROWS).kl
    assert (proof.tokens, proof.rows, proof.computed_in, proof.through) == (80, "40 rows", "fp32", False)


def test_an_adapter_that_predicts_no_better_has_no_bound() -> None:
    base = saying(np.full(40, 2.0))
    proof = kept_proof(TRAINED, ROWS, base, base, base, "dither", "dither", computed_in="fp32")
    assert (proof.kept, proof.kept_low, proof.gains, proof.holds) == (0.0, -np.inf, False, False)


@pytest.mark.parametrize("made", [None, "int4"])
def test_the_adapter_is_beside_the_base_as_it_is_stored_or_as_it_is_quantized_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made: str | None
) -> None:
    trained: Any = SimpleNamespace(
        run=None,
        base="the base",
        config=SimpleNamespace(model=SimpleNamespace(dtype="fp32")),
        manifest=SimpleNamespace(step=4),
        method=None,
        probe=SimpleNamespace(rows=ROWS),
        streamed_layers=lambda: "streamed",
    )
    in_codes: Any = SimpleNamespace(streamed_layers=lambda: "in codes")
    loaded, written = list[Any](), list[Any]()
    given = {
        "base_directory": lambda base: nullcontext(tmp_path),
        "export_adapter": lambda *_: None,
        "write_base_in_codes": lambda base, config, code, store: written.append((base, code)),
        "merged_base": lambda of, folder: in_codes,
        "grown_base": lambda of, folder, streamed, unrounded: loaded.append(
            (of, folder == tmp_path, streamed, unrounded)
        ),
    }
    for name, function in given.items():
        monkeypatch.setattr(kept, name, function)
    monkeypatch.setattr(kept.plain, "add_adapter", lambda *_: ("adapted", nullcontext()))
    monkeypatch.setattr(kept.plain, "computing_in_fp32", lambda model: nullcontext())
    monkeypatch.setattr(kept.plain, "place_logits", lambda model, rows: [model])
    assert kept.beside_logits(trained, made) == (["adapted"], ["adapted"])
    if made is None:
        assert (loaded, written) == ([(trained, True, "streamed", True)], [])
    else:
        assert (loaded, written) == ([(in_codes, False, "in codes", True)], [("the base", "int4")])


@pytest.mark.parametrize("through", [False, True])
def test_a_run_that_was_trained_through_codes_is_measured_by_itself(
    monkeypatch: pytest.MonkeyPatch, through: bool
) -> None:
    losses = {"base": 2.0, "learnt": 1.0, "side by side": 1.5, "merge": 1.75}
    said = {name: saying(np.full(40, loss)) for name, loss in losses.items()}
    asked = list[Any]()

    def exported(measure: Any, of: Any, *, packed: bool) -> Any:
        asked.append((measure, of, packed))
        return said["merge"] if measure is kept.merged_logits else (said["side by side"], said["base"])

    trained: Any = SimpleNamespace(
        method=SimpleNamespace(through=through),
        probe=SimpleNamespace(rows=ROWS, origin="40 rows"),
        check_texts=lambda store: asked.append(store.uri),
        predictions=lambda learnt=True: said["learnt" if learnt else "base"],
        exported=exported,
    )
    opened = list[Any]()
    monkeypatch.setattr(kept.Trained, "at", lambda *of, rows: opened.append((*of, rows)) or trained)
    run, merge = (SimpleNamespace(uri=uri) for uri in ("memory://run", "memory://merge"))
    proof = kept.prove_in_codes(run, 4, merge, "int4", "dither", "nearest")  # type: ignore[arg-type]
    assert opened == [(run, 4, 48)]
    beside = [] if through else [(kept.beside_logits, "int4", False)]
    assert asked == ["memory://merge", *beside, (kept.merged_logits, "memory://merge", False)]
    figures = (proof.base_loss, proof.adapter_loss, proof.merged_loss)
    assert figures == pytest.approx((2.0, 1.0 if through else 1.5, 1.75))
    assert (proof.kept, proof.through) == (pytest.approx(0.25 if through else 0.5), through)
    assert (proof.rounding, proof.usual, proof.computed_in) == ("dither", "nearest", "fp32")
