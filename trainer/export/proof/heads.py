"""The outputs of a head that learns beside an adapter, by our own engine, for a proof."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from trainer.export.proof.distributions import as_shares
from trainer.export.proof.rows import Probe, ProbeRow
from trainer.model.packed import TextRow
from trainer.state.zero.engine import Engine
from trainer.tuning.head import WithHead, outputs


def judged(probe: Probe, head: WithHead | None) -> Probe:
    """The rows as a `head` is compared on them. A head whose outputs stand for themselves, a reward or several classes, is compared in all
    of them at once, at the end of the text: the tokens that are trained there name none of its outputs."""
    if head is None or not (head.head.several or head.outputs == 1):
        return probe
    kept = slice(1) if head.head.several else slice(None)
    rows = [
        replace(row, places=row.places[kept], targets=torch.zeros_like(row.targets[kept]), beside_zero=True)
        for row in probe.rows
    ]
    return replace(probe, rows=rows)


def outputs_of_row(engine: Engine, row: ProbeRow) -> Tensor:
    """The outputs at the places of a row, (P, outputs) fp32 on the CPU, without dropout. Collective."""
    engine.evaluating(True)
    found = engine.look(partial(outputs, places=row.places), TextRow.of(row.tokens))
    engine.evaluating(False)
    return as_shares(found.cpu(), row)
