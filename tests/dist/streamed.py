"""The sides of a proof, each computed by a model that is whole and by one that has a decoder layer at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.export.proof import plain, verify
from trainer.export.proof.models import Trained
from trainer.export.proof.rows import ProbeRow
from trainer.export.write.adapter import export_adapter
from trainer.export.write.merged import export_merged
from trainer.model.parts import decoder_layers
from trainer.store.store import open_store


def compared(runs: dict[str, str], folder: str) -> dict[str, dict[str, Any]]:
    """For step 4 of each run by its kind: whether the adapter changes any number at all, the sides whose numbers differ
    in a bit, and the most layers that had weights at one time."""
    torch.set_num_threads(1)
    return {kind: _compared(uri, Path(folder, kind)) for kind, uri in runs.items()}


def _compared(uri: str, folder: Path) -> dict[str, Any]:
    run, scratch = open_store(uri), folder / "scratch"
    scratch.mkdir(parents=True)
    adapter, merged = (open_store(str(folder / name)) for name in ("adapter", "merged"))
    export_adapter(run, adapter, 4)
    export_merged(run, merged, 4)
    computed_in = Trained.at(run, 4).computed_in
    works: dict[str, Any] = {
        "trained": lambda trained: trained.logits(computed_in),
        "adapter": lambda trained: verify._adapter_side(trained, adapter.uri, computed_in),
        "adapter in bf16": lambda trained: verify._adapter_side(trained, adapter.uri, "bf16"),
        "merging": verify._merging_side,
        "merged": lambda trained: verify.merged_side(trained, merged.uri, trained.probe.rows),
    }
    whole, streamed = (
        {name: _observed(work, Trained.at(run, 4, place)) for name, work in works.items()} for place in (None, scratch)
    )
    beside, alone, *_ = whole["merging"][0]
    return {
        "effect": not _same(beside, alone),
        "differing": [name for name in works if not _same(whole[name][0], streamed[name][0])],
        "whole": {name: present for name, (_, present) in whole.items()},
        "streamed": {name: present for name, (_, present) in streamed.items()},
        "converted": len(list(scratch.iterdir())),
    }


def _observed(work: Any, trained: Trained) -> tuple[Any, int]:
    """The result, and the most layers of the model in transformers that had all of their weights at one time; 0 where
    there is none.
    """
    most, place_logits = 0, plain.place_logits

    def observing(model: Any, rows: Sequence[ProbeRow]) -> list[Tensor]:
        layers = list(decoder_layers(plain.language_part(model)) or ())

        def look(*_: Any) -> None:
            nonlocal most
            most = max(most, sum(map(_has_weights, layers)))

        hooks = [module.register_forward_pre_hook(look) for layer in layers for module in layer.modules()]
        found = place_logits(model, rows)
        for hook in hooks:
            hook.remove()
        return found

    plain.place_logits = observing
    try:
        return work(trained), most
    finally:
        plain.place_logits = place_logits


def _has_weights(layer: nn.Module) -> bool:
    """Whether its matrices are more than a single number each: those of the base, as adapters stay."""
    base = [weight for name, weight in layer.named_parameters() if weight.ndim > 1 and "lora_" not in name]
    return any(weight.untyped_storage().nbytes() > weight.dtype.itemsize for weight in base)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return all(map(_same, one, other))
    return one == other
