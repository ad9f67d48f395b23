"""The layers of a proof that have their weights only for their turn."""

from pathlib import Path
from typing import Any

import torch

from tests.material import make_base
from trainer.export.proof.plain import load_plain
from trainer.export.proof.streamed import StreamedLayers
from trainer.model.parts import decoder_layers


def test_a_layer_has_its_weights_at_its_turn_and_at_no_other_time(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    model: Any = load_plain(base, torch.float32, torch.float32, streamed=StreamedLayers(tmp_path / "scratch"))
    layers: list[Any] = list(decoder_layers(model) or ())
    held = list[list[int]]()

    def having_weights() -> list[int]:
        weights = [layer.self_attn.q_proj.weight for layer in layers]
        return [n for n, weight in enumerate(weights) if weight.untyped_storage().nbytes() > weight.dtype.itemsize]

    for layer in layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: held.append(having_weights()))
    assert having_weights() == []
    with torch.no_grad():
        model(torch.arange(3, 9)[None])
    assert held == [[number] for number in range(len(layers))]
    assert len(layers) > 1
    assert having_weights() == []
