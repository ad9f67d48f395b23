"""What a step through the codes of an export (`tuning.through: stored`) costs beside a step of QLoRA.

    python benchmarks/through.py [--widths 1024 2048] [--tokens 512 2048] [--repeats 7]

One linear layer of each width with an adapter of rank 16, forward and backward, in fp32 on one thread. QLoRA is an
ordinary adapter over nf4, `beside` one over the same codes, `through` multiplies by moved codes. The other parts of a
step (attention, norms, the head, the optimizer) are the same for all three, so the ratio of whole steps is nearer to 1.
Times are those of the process on its core, the best of several, the sides in turn, as a machine is rarely idle. The
script fails if a step through any codes takes more than 1.15 times as long as QLoRA's at 2,048 tokens.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import torch
from torch import Tensor, nn

from trainer.model.held import HeldFormat
from trainer.model.held.codes import VALUES, Code, KeptWeight
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.formats.stored import KeptCodes
from trainer.model.held.layers import HeldLinear
from trainer.tuning.lora.layer import AdaptedLinear, multiply_adapted, multiply_through

RANK, SCALING, BOUND = 16, 2.0, 1.15
KEPT = {
    "int4": KeptWeight(Code("int4", (1, 32)), "BF16", "BF16"),
    "mxfp4": KeptWeight(Code("e2m1", (1, 32)), "F8_E8M0", "BF16"),
    "fp8": KeptWeight(Code("e4m3", (128, 128)), "F32", "BF16"),
    "int8": KeptWeight(Code("offset8", (1, 32)), "BF16", "BF16"),
}


def adapted(form: HeldFormat, parts: dict[str, Tensor], width: int) -> AdaptedLinear:
    """A square layer that holds these parts, and a trained adapter: it changes weights by a few percent of a step."""
    layer = HeldLinear(width, width, form, torch.float32)
    for name, part in parts.items():
        setattr(layer, name, nn.Parameter(part, requires_grad=False))
    drawn = torch.Generator().manual_seed(1)
    down = nn.Parameter(torch.randn(RANK, width, generator=drawn) * width**-0.5)
    up = nn.Parameter(torch.randn(width, RANK, generator=drawn) * 1e-3)
    return AdaptedLinear(layer, down, up, SCALING, None)


def in_codes(kept: KeptWeight, width: int) -> AdaptedLinear:
    codes = torch.randint(0, 256, (width * width * kept.code.bits // 8,), generator=torch.Generator().manual_seed(0))
    tiles, largest = kept.code.tiles(width, width), max(value for value in VALUES[kept.code.numbers] if value == value)
    form = KeptCodes(kept)
    scales = torch.full(tiles, 2.0**-5 / largest).to(form.scales_type).flatten().view(torch.uint8)
    return adapted(form, {"weight": codes.byte(), "scales": scales}, width)


def in_nf4(width: int) -> AdaptedLinear:
    form = Blocks("nf4", 64, False)
    weights = torch.randn(width * width, generator=torch.Generator().manual_seed(0)) * 0.02
    return adapted(form, form.encode(weights, width), width)


def sides(kept: KeptWeight, width: int) -> dict[str, Callable[[Tensor], Tensor]]:
    qlora, codes = in_nf4(width), in_codes(kept, width)
    return {
        "qlora": lambda x: multiply_adapted(x, None, [qlora])[0],
        "beside": lambda x: multiply_adapted(x, None, [codes])[0],
        "through": lambda x: multiply_through(x, codes, "w"),
    }


def measure(kept: KeptWeight, width: int, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of each side."""
    x, grad = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    found = dict[str, float]()
    for _ in range(repeats):
        for name, product in sides(kept, width).items():
            begun = time.process_time()
            product(x).backward(grad)
            found[name] = min(found.get(name, 1e9), time.process_time() - begun)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, one thread, torch {torch.__version__}; seconds of a processor, and of QLoRA's")
    print("| codes | width | tokens | QLoRA | beside | through | of QLoRA | of beside |")
    print("|---|---|---|---|---|---|---|---|")
    slow = list[str]()
    for name, kept in KEPT.items():
        for width in given.widths:
            for tokens in given.tokens:
                found = measure(kept, width, tokens, given.repeats)
                ratio = found["through"] / found["qlora"]
                figures = " | ".join(f"{1e3 * found[side]:.1f} ms" for side in ("qlora", "beside", "through"))
                of_beside = found["through"] / found["beside"]
                print(f"| {name} | {width:,} | {tokens:,} | {figures} | {ratio:.2f} | {of_beside:.2f} |", flush=True)
                if tokens >= 2048 and ratio > BOUND:
                    slow.append(
                        f"{name}, width {width}, {tokens} tokens: {ratio:.2f} times as long as QLoRA, allowed {BOUND}"
                    )
    sys.exit("; ".join(slow) or 0)


if __name__ == "__main__":
    main()
