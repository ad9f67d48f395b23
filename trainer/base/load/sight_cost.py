"""Measures what pictures cost a run before it begins: operations of the part that sees, and time of the host.

The real class is built on `meta`, and goes over a document with one picture as in a run, up to its decoder. A tensor on
`meta` has a shape and no values. Grids, masks and indices decide the shapes of what follows, so they are computed.
"""

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from trainer.base.describe.empty_model import unfilled_whole
from trainer.base.describe.language_model import inner_of
from trainer.base.find.processor import Processor, read_processor
from trainer.base.unreadable import read_by_transformers
from trainer.model.front import Front
from trainer.model.micro_batch import Seen

_TIMES = 3
_META = torch.device("meta")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


def sight_costs(directory: str, name: str, sizes: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """For a picture of each of `sizes` (height, width) the `tokens` that stand for it, the `operations` of the part
    that sees, and the `seconds` of one core of this machine, which reads a JPEG file and makes the class's inputs.

    `operations` is None if the class does not compute on `meta`. Raises `ConfigError` as `read_processor`.
    """
    processor = read_processor(Path(directory), name)
    with read_by_transformers(name, "config.json"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    whole = unfilled_whole(config, torch.float32, "eager")  # whose products are all products of matrices
    embedding: Any = whole.get_input_embeddings()
    front, hidden = Front(whole, inner_of(whole), embedding), embedding.weight.shape[1]
    return [_cost(front, hidden, processor, height, width) for height, width in sizes]


def _cost(front: Front, hidden: int, processor: Processor, height: int, width: int) -> dict[str, Any]:
    from PIL import Image

    replacement = processor.replacements(((height, width),))[0]
    content = _jpeg(height, width)
    ids = processor.encode(replacement)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _time(lambda: processor.inputs([Image.open(io.BytesIO(content)).convert("RGB")], ids))
    finally:
        torch.set_num_threads(threads)
    inputs = processor.inputs([Image.new("RGB", (width, height))], ids)
    try:
        operations: int | None = operations_of(front, hidden, ids, inputs)
    except Exception:  # a class may ask for a value that a tensor on `meta` has not, in any way
        operations = None
    return {"tokens": len(ids), "operations": operations, "seconds": seconds}


@torch.no_grad()
def operations_of(front: Front, hidden: int, ids: Sequence[int], inputs: dict[str, Tensor]) -> int:
    """The operations of `front`, whose class is on `meta`, over a document of these `ids` with pictures."""
    states = torch.empty(1, len(ids), hidden, device=_META)
    given = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    with _ShapesAlone(), FlopCounterMode(display=False) as counter:
        front.row(torch.tensor([list(ids)]), states, [len(ids)], [Seen(0, given)])
    return counter.get_total_flops()


class _ShapesAlone(TorchDispatchMode):
    """Computes only shapes of whatever depends on a tensor on `meta`, and values of everything else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        tensors = [value for value in tree_leaves((args, named)) if isinstance(value, Tensor)]
        device = named.get("device")
        if any(tensor.is_meta for tensor in tensors):
            if device is not None:
                named["device"] = _META
            if func._schema.name in _INDEXING:
                args = (args[0], _places(args[1]), *args[2:])
            args, named = tree_map(lambda value: value.to(_META) if isinstance(value, Tensor) else value, (args, named))
        elif device is not None and torch.device(device).type == "meta":
            named["device"] = torch.device("cpu")  # a grid, say, that the class makes where its weights are
        return func(*args, **named)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices, in which a mask is replaced by its places: how many there are is lost on `meta`."""
    found = list[Tensor | None]()
    for index in indices:
        if index is not None and index.dtype == torch.bool and not index.is_meta:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _jpeg(height: int, width: int) -> bytes:
    """A file as a camera makes it: soft shapes, and some noise."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    soft = torch.randint(0, 256, (max(1, height // 32), max(1, width // 32), 3), generator=draw, dtype=torch.uint8)
    made = Image.fromarray(soft.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    noise = torch.randint(0, 256, (height, width, 3), generator=draw, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.blend(made, Image.fromarray(noise.numpy()), 0.1).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _time(work: Callable[[], object]) -> float:
    """The median seconds of `work`, after a first time that makes what is made once."""
    work()
    taken = list[float]()
    for _ in range(_TIMES):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return median(taken)
