"""The outputs of a head that learns beside an adapter, by our own engine, for a proof."""

from functools import partial

from torch import Tensor

from trainer.export.proof.rows import ProbeRow
from trainer.model.packed import PackedModel, TextRow
from trainer.tuning.head import outputs
from trainer.zero.engine import Engine


def outputs_of_row(engine: Engine, row: ProbeRow) -> Tensor:
    """The outputs at the places of a row, (P, outputs) fp32 on the CPU, without dropout. Collective."""
    engine.evaluating(True)
    found = engine.look(partial(_outputs, places=row.places), TextRow.of(row.tokens))
    engine.evaluating(False)
    return found.cpu()


def _outputs(model: PackedModel, row: TextRow, places: Tensor) -> Tensor:
    return outputs(model, row, places.to(row.input_ids.device))
