"""The proof of a merge into the base's own codes: the share of what was learnt that the codes keep.

Rounding always loses something, so nothing is proven equal. On rows that the training has not seen, if there are any,
three models predict the trained tokens: the base, base and adapter side by side, and the merge. The base's files are
read as the run's base and as the merge by the same code. The adapter's gain is how much better than the base it
predicts, and the kept share is the merge's gain over the adapter's. A run that was trained through codes is its own
model, which takes the place of base and adapter side by side.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from trainer.export.figures import KeptProof, Rounding
from trainer.export.proof import plain
from trainer.export.proof.models import Trained, base_directory, directory_of, grown_base, merged_base
from trainer.export.proof.rows import ProbeRow, distance
from trainer.export.write.adapter import export_adapter
from trainer.export.write.in_codes import write_base_in_codes
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_store

ROWS_OF_SHARES = 48  # more than other proofs have, because a share has an interval
_DRAWS = 2000


def prove_in_codes(
    folder: Store, step: int, exported: Store, made: str | None, rounding: Rounding, usual: Rounding
) -> KeptProof:
    """Measure the base, the adapter of `step` beside it, and the merge in `exported`.

    A base that is not stored in these codes is first quantized to those of the name `made`, which the run did not know.
    """
    trained = Trained.at(folder, step, rows=ROWS_OF_SHARES)
    trained.check_texts(exported)
    if trained.method.through:  # the adapter beside the base was not trained
        beside, alone = trained.predictions(), trained.predictions(learnt=False)
    else:
        beside, alone = trained.exported(beside_logits, made, packed=False)
    merged = trained.exported(merged_logits, exported.uri, packed=False)
    return kept_proof(trained, trained.probe.rows, alone, beside, merged, rounding, usual, computed_in="fp32")


def kept_proof(
    trained: Trained,
    rows: Sequence[ProbeRow],
    alone: Sequence[Tensor],
    beside: Sequence[Tensor],
    merged: Sequence[Tensor],
    rounding: Rounding,
    usual: Rounding,
    *,
    computed_in: str,
) -> KeptProof:
    """Return the figures of the logits of three models: the base `alone`, what was learnt `beside` it, and the merge.

    Each has the logits (P, V) of every row.
    """
    base, adapter, found = (_log_probs(logits, rows) for logits in (alone, beside, merged))
    low, high = _interval([ours - before for ours, before in zip(found, base, strict=True)], _gains(adapter, base))
    losses = [-float(torch.cat(values).mean()) for values in (base, adapter, found)]
    kept = (losses[0] - losses[2]) / (losses[0] - losses[1]) if losses[0] != losses[1] else 0.0
    return KeptProof(
        base_loss=losses[0],
        adapter_loss=losses[1],
        merged_loss=losses[2],
        kept=kept,
        kept_low=low,
        kept_high=high,
        kl=distance(beside, merged, rows).kl,
        kl_effect=distance(beside, alone, rows).kl,
        rounding=rounding,
        usual=usual,
        through=trained.method.through,
        tokens=sum(len(row.targets) for row in rows),
        computed_in=computed_in,
        rows=trained.probe.origin,
    )


def beside_logits(trained: Trained, made: str | None) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits of base and adapter side by side, and of the base alone, over the base as it is stored.

    With `made` the base is quantized to this code first.
    """
    rows = trained.probe.rows
    with _base_in_codes(trained, made) as base, scratch_folder("adapter") as folder:
        export_adapter(trained.run, open_store(folder), trained.manifest.step)
        stored = trained if made is None else merged_base(trained, base)
        model = grown_base(stored, base, stored.streamed_layers(), unrounded=_unrounded(trained))
        model, without = plain.add_adapter(model, Path(folder), trained.method)
        with plain.computing_in_fp32(model):
            beside = plain.place_logits(model, rows)
            with without:
                return beside, plain.place_logits(model, rows)


@contextmanager
def _base_in_codes(trained: Trained, made: str | None) -> Iterator[Path]:
    if made is None:
        with base_directory(trained.base) as base:
            yield base
        return
    with scratch_folder("base") as folder:
        write_base_in_codes(trained.base, trained.config, made, open_store(folder))
        yield Path(folder)


def merged_logits(trained: Trained, merged: str) -> list[Tensor]:
    """Return the logits of the merge, whose files are read as those of the base were."""
    with directory_of(open_store(merged)) as folder:
        model = grown_base(merged_base(trained, folder), folder, None, unrounded=_unrounded(trained))
        with plain.computing_in_fp32(model):
            return plain.place_logits(model, trained.probe.rows)


def _unrounded(trained: Trained) -> bool:
    """Whether codes times scales are not rounded to 16 bits: servers and transformers do so in fp32 alone."""
    return trained.config.model.dtype == "fp32"


def _log_probs(logits: Sequence[Tensor], rows: Sequence[ProbeRow]) -> list[Tensor]:
    """Return the log-probabilities of each row's trained tokens, (P,) fp64."""
    return [
        found.double().log_softmax(-1).gather(-1, row.targets[:, None])[:, 0]
        for found, row in zip(logits, rows, strict=True)
    ]


def _gains(adapter: Sequence[Tensor], base: Sequence[Tensor]) -> list[Tensor]:
    return [ours - before for ours, before in zip(adapter, base, strict=True)]


def _interval(kept: Sequence[Tensor], gains: Sequence[Tensor]) -> tuple[float, float]:
    """Return where 95 % of the shares lie if other rows of the same kind had been drawn (bootstrap over rows)."""
    sums = torch.tensor([[float(ours.sum()), float(gain.sum())] for ours, gain in zip(kept, gains, strict=True)])
    drawn = torch.randint(len(sums), (_DRAWS, len(sums)), generator=torch.Generator().manual_seed(0))
    totals = sums[drawn].sum(1)
    shares = torch.where(totals[:, 1] > 0, totals[:, 0] / totals[:, 1], -torch.inf).sort().values
    return float(shares[int(0.025 * _DRAWS)]), float(shares[int(0.975 * _DRAWS) - 1])
