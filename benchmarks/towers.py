"""What a tower that learns keeps and computes: by `plan`, and in the real class.

    python benchmarks/towers.py [--tokens 512]

The bases are the small ones of the tests, made wider, so that weights and pictures are as in proportion to real ones.
`plan` is what `capstan plan` counts, by the class without weights. `held` are the bytes of the tensors that autograd
saves of the real class over a row full of pictures, and `PyTorch` are the operations that its own counter sees.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the bases of the tests

from tests import seeing
from trainer.base.describe.language_model import inner_of
from trainer.base.find.locate import resolve_base
from trainer.base.find.media import Shown
from trainer.base.find.media.still import Size
from trainer.base.find.processor import read_processor
from trainer.config import parse_config
from trainer.model.front import Front
from trainer.model.kept import kept_of
from trainer.model.micro_batch import Seen
from trainer.model.towers import AdaptedLayers, ChangedWeights, Lender
from trainer.plan.seeing import costs_of
from trainer.tuning.method import method_of

SIZE = Size(256, 256)


def compared(base: Path, learns: str, again: bool, tokens: int) -> tuple[int, int, int, int]:
    """Bytes by the plan and in the real class, and operations by the plan and by PyTorch."""
    rest = "data: {train: [{path: x}], format: pictures}, train: {steps: 1}, run: {name: x, store: x}"
    model = f"{{base: {base}, dtype: fp32, attention: eager}}"
    config = parse_config(f"{{model: {model}, tuning: {{towers: {learns}}}, {rest}}}")
    found, processor = resolve_base(config.model), read_processor(base, "it")
    (cost,) = costs_of(config, found, (SIZE,))
    given = method_of(config).sees(found.architecture)
    assert given
    assert cost.kept
    assert cost.operations
    count = max(1, tokens // cost.tokens)
    ids = processor.encode(" and ".join(processor.replacements((SIZE,) * count)))
    pictures = [Shown(SIZE, seeing.picture(SIZE.width, SIZE.height, number)) for number in range(count)]
    inputs = processor.inputs(pictures, ids)
    real: Any = AutoModelForImageTextToText.from_pretrained(base, attn_implementation="eager")
    embedding = real.get_input_embeddings()
    front = Front(real, inner_of(real), embedding)
    borrowing = (
        partial(ChangedWeights, given["changes"])
        if given["changes"]
        else partial(AdaptedLayers, given["adapters"], 2.0, 0.0)
    )
    lender = Lender({name: torch.randn(shape) / 10 for name, shape in given["shapes"].items()}, borrowing)
    front.learn(lender, again=again)
    lent = lender.lent()
    assert lent
    with FlopCounterMode(display=False) as counter:
        with kept_of(front) as kept:
            states = lent.joined(torch.zeros(1, len(ids), embedding.weight.shape[1]))
            handed = front.row(torch.tensor([ids]), lambda _: states, [len(ids)], [Seen(0, inputs)], lent)
        made = [one for one in tree_leaves(handed) if isinstance(one, torch.Tensor) and one.requires_grad]
        torch.stack([one.sum() for one in made]).sum().backward()
    of_row, of_token = cost.kept.recomputed if again else cost.kept.plain
    operations = (cost.operations + again * cost.repeated) * count
    return round(of_row + of_token * count * cost.tokens), kept.bytes, operations, counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=512)
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeing._TOWER.update(hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    table = Table("base", "learns", "layers again", "plan MB", "held MB", "plan/held", "GFLOP, plan/PyTorch")
    for kind in seeing.BASES:
        with tempfile.TemporaryDirectory() as folder:
            base = seeing.seeing_base(Path(folder), kind)
            assert AutoConfig.from_pretrained(base)
            for learns, again in (("lora", False), ("lora", True), ("projector", False)):
                planned, held, operations, counted = compared(base, learns, again, given.tokens)
                table.add_row(
                    *(kind, learns, "yes" if again else "no", f"{planned / 1e6:.2f}", f"{held / 1e6:.2f}"),
                    *(f"{planned / held:.4f}", f"{counted / 1e9:.2f}, {operations / counted:.4f}"),
                )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
