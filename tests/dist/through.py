"""A run that was trained through the quantizer, beside its export as stored."""

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.dist.proofs import in_this_process
from trainer.base.find.locate import resolve_base
from trainer.base.partitions.filling import as_tensor
from trainer.base.rows.parameters import find_all_weights
from trainer.export.destination import ExportProgress
from trainer.export.format import find_format
from trainer.export.proof.kept import merged_logits
from trainer.export.proof.models import Trained
from trainer.export.proof.rows import distance
from trainer.model.held import Moves
from trainer.model.held.formats.stored import KeptCodes
from trainer.model.held.layers import HeldWeights
from trainer.store.safetensors_index import numel
from trainer.store.store import open_store


def exported_beside_trained(run_uri: str, step: int, folder: str) -> dict[str, Any]:
    """The weights that differ between the last forward pass and the export, those that the adapters have moved, and how
    far the logits of both are apart."""
    in_this_process()
    run = open_store(run_uri)
    quiet = ExportProgress(lambda done, total: None, lambda sentence: None)
    written = find_format("merged", ["as=stored"]).write(run, open_store(folder), step, quiet)
    trained, used = Trained.at(run, step), dict[str, Tensor]()
    plainly = KeptCodes.moved

    def recorded(self: KeptCodes, held: HeldWeights, first: int, last: int, by: Moves) -> Tensor:
        found = plainly(self, held, first, last, by)
        if (first, last) == (0, held.slices):
            used[by.name] = found.flatten().float()
        return found

    KeptCodes.moved = recorded  # type: ignore[method-assign]
    logits = trained.logits("fp32")
    KeptCodes.moved = plainly  # type: ignore[method-assign]
    after, before = (_weights(trained, base) for base in (folder, trained.config.model.base))
    merged = merged_logits(trained, folder)
    return {
        "weights": len(used),
        "differing": sum(int((after[name] != values.bfloat16()).sum()) for name, values in used.items()),
        "moved": sum(int((before[name] != values.bfloat16()).sum()) for name, values in used.items()),
        "counted": written.facts["codes_changed"],
        "difference": max(float((a - b).abs().max()) for a, b in zip(logits, merged, strict=True)),
        "largest": max(float(a.abs().max()) for a in logits),
        "kl": distance(logits, merged, trained.probe.rows).kl,
    }


def _weights(trained: Trained, folder: str) -> dict[str, Tensor]:
    base = resolve_base(trained.config.model.model_copy(update={"base": str(Path(folder))}))
    sources: dict[str, Any] = find_all_weights(base).sources
    return {name: as_tensor(source.read(0, numel(source)), source).float() for name, source in sources.items()}
