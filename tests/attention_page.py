"""Writes docs/attention.md from the table of kernels: what each computes, and which one `auto` takes for which base on
which GPU.

python -m tests.attention_page            write the page
python -m tests.attention_page --check    exit 1 when the page is not what would be written
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.config_docs import write_or_check
from tests.unit.base.test_published_models import MODELS
from trainer.base.architecture import Architecture
from trainer.base.describe.architecture_cache import read_architecture
from trainer.model.kernels.attention import KERNELS, Capability, Kernel, chosen_kernel, unable

PAGE = Path(__file__).parents[1] / "docs" / "attention.md"

_GEMMA: dict[str, Any] = {
    "hidden_size": 3584,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "num_hidden_layers": 2,
}
# Beside the well-known sizes: bases that differ in what their attention computes, with as few layers as show it.
_BASES: dict[str, dict[str, Any]] = {
    "Llama 3.1, Qwen3, Mistral": MODELS["Llama-3.1-405B"].config,
    "Gemma 3 (heads of 256, windows)": {"model_type": "gemma3_text", **_GEMMA, "vocab_size": 262144},
    "Gemma 2 (capped logits)": {"model_type": "gemma2", **_GEMMA, "vocab_size": 256000},
    "gpt-oss (sinks)": MODELS["gpt-oss-120b"].config,
    "DeepSeek-V3, Kimi K2 (latent attention)": MODELS["DeepSeek-V3"].config,
    "Llama 4 (chunks)": MODELS["Llama-4-Maverick"].config,
    "MiniMax-M2": MODELS["MiniMax-M2"].config,
    "Qwen3-Next (its attention layers)": MODELS["Qwen3-Next-80B-A3B"].config,
}
_GPUS: dict[str, Capability | None] = {
    "A100 (8.0), L40S, RTX 4090 (8.9)": (8, 0),
    "H100, H200 (9.0)": (9, 0),
    "B200 (10.0), B300 (10.3)": (10, 0),
    "RTX 50, RTX PRO (12.0)": (12, 0),
    "CPU, older GPUs": None,
}

_HEADER = """\
# Attention kernels

<!-- Written by `python -m tests.attention_page` from trainer/model/kernels/attention.py: change that. -->

With `model.attention: auto` Capstan takes the first suitable kernel of this table. A suitable kernel runs on the
machine, computes the values and gradients of the base's own attention, and keeps the documents of a packed row
separate. The log of rank 0 names this kernel, and says why Capstan did not take the ones before it in the table.
`capstan doctor` lists the kernels that run on this machine, and the packages that you can install for its GPU. If you
name a kernel that cannot be used, Capstan refuses it with the reason. In the table, *caps* are capped attention scores
(Gemma 2), and *sinks* are attention sinks (gpt-oss).
"""

_PACKAGES = """\
Capstan looks for a package by its distribution name, because flash-attn and flash-attn-4 have the same import name.
Before it takes a kernel, it checks that the signature of the kernel's function fits Capstan's call. Capstan does not
use flash-attn-4 on Hopper, because flash-attn-4's backward pass on Hopper supports neither packed documents nor sliding
windows.

You can get the packages in these ways:

- **flash-attn**: PyPI has only its source. Its releases on GitHub have wheels for some builds of PyTorch, CUDA and
  Python. `capstan doctor` prints the address that the wheel for this machine would have. If pip finds no wheel at this
  address, compile flash-attn from source, which takes an hour.
- **flash-attn-4**: PyPI has wheels, but only of beta versions. pip installs a beta only if you ask for one, as the
  command in the table does.
- **flash-attn-3**: it is not on PyPI. Build it from its source.

Capstan's extra `gpu` installs none of the flash-attn packages, because an extra cannot depend on the build of PyTorch
or on the GPU.

Tests compare each kernel's values and gradients with eager attention. They cover head sizes of 64 to 256, grouped
heads, sliding windows, rows with one or several documents, capped scores, and sinks
(`tests/unit/model/test_kernels.py`). On a CPU the tests run sdpa and flex_attention. A CPU cannot run the other
kernels, so the tests check only how Capstan calls them. On a machine with a GPU, `python -m pytest
tests/unit/model/test_attention.py` runs every installed kernel.

## Which one a base gets

The table shows the kernel that `auto` takes if the flash-attn package for the GPU is installed. The kernel in brackets
is the one that `auto` takes if the package is missing.
"""


_LIGER = """\
## Norms, rotary embeddings and gated MLPs

The extra `gpu` ([installation.md](installation.md#extras)) installs [Liger's](https://github.com/linkedin/Liger-Kernel)
kernels (BSD-2). Each kernel makes one pass over memory where the base's own operations make several. `model.kernels`
has three values. `auto` uses Liger on GPUs for the families that Liger knows. `liger` does the same, but is refused if
Liger cannot run. `none` leaves a base as it is. The log of rank 0 names the parts that Liger computes:

    kernels: liger (LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb)

Liger changes results only by rounding, and is not used on a CPU. The checks of an export never use Liger. With Liger,
the layers of an 8B Llama keep 24 % less memory for the backward pass. With `model.kernels: liger`, `plan` subtracts
this saving from the memory, and fewer layers are recomputed. With `auto`, `plan` does not subtract it.

| `model_type` | parts that Liger computes |
|---|---|
| `llama`, `mistral`, `ministral`, `qwen2`, `qwen3`, `phi3`, `gemma`, `gemma2`, `gemma3_text`, `olmo2`, `olmo3`, `smollm3`, `granite`, `exaone4`, `falcon_h1`, \
`hunyuan_v1_dense`, `llama4_text` | norms, rotary embedding, gated MLPs |
| `mixtral`, `qwen3_moe`, `gpt_oss`, `hunyuan_v1_moe` | norms, rotary embedding |
| `qwen3_next`, `qwen3_5_text`, `qwen3_5_moe_text`, `deepseek_v2`, `deepseek_v3`, `glm4`, `gemma4_text` | norms, gated MLPs: of mixtures the dense layers and \
shared experts |
| `deepseek_v4`, mixtures of `gemma4_text` | norms |

`TRITON_INTERPRET=1 python -m tests.liger_kernels interpret` computes losses and gradients once with Liger and once
without it, and compares the results. It needs no GPU. It covers LoRA, IA3 and bottleneck adapters, trained norms,
recomputed layers, and tiled MLPs. It computes in fp32 and fp16, because Triton's interpreter computes bf16 products
wrongly. With `ranks` instead of `interpret`, the program does the same on two ranks over a sharded 4-bit base. With
`compile` it compiles the kernels for sm_80, sm_90 and sm_100. For all families of the table except `ministral`,
`hunyuan_v1_moe` and `deepseek_v4`, we also ran plain transformers with Liger and without it, in fp32. With Liger,
gradients differ by at most 1.6e-5 of their norm, and losses by at most 1.4e-6.

Capstan does not use these parts of Liger:

- Liger's loss functions, because Capstan's [output head](architecture.md) computes the loss in chunks.
- Liger's kernels for experts, because they need all experts of a layer at once in 16 bits.
- Liger's MLP, if the base's activation is unusual for its family. Liger does not check this: a Llama with `gelu` would
  get `silu`, and gradients would be off by up to 29 % of their norm. So before Capstan uses a module of Liger, it
  compares the module with the base's own forward pass on random values.
- Liger's layer norms, because for some families Liger would replace PyTorch's layer norm for every model of the
  process.
- Liger's kernels in languages other than Triton. Unlike Triton's kernels, these kernels cannot be checked without a
  GPU. If you want them nevertheless, set `LIGER_KERNEL_IMPL`.
"""

_PRODUCTS = """\
## Products in FP8

With `train.products: fp8`, frozen linear layers multiply in FP8, in their forward and backward passes. Both operands of
a matrix product are converted to e4m3 numbers. One operand is the weight, which is first decoded from its 4 or 8 bits.
The other operand is the activation or the gradient. Each row of an operand has its own scale, a power of two. Sums are
in fp32 (`torch._scaled_mm`). Adapters, attention, the head, and layers whose sizes are not multiples of 16 stay in
`model.dtype`.

FP8 products are off by default. They need an NVIDIA GPU of compute capability 8.9 to 11. On any other GPU, such as RTX
50 and RTX PRO (12.0), Capstan refuses FP8 products. The log and `plan` say how many layers multiply in FP8, for example
`products: fp8 in 224 of 224 linear layers`.

On GPUs of compute capability 9.0 and 10.0, the experts of a mixture also multiply in FP8 (`torch._scaled_grouped_mm`,
one kernel for all of them). They do so only if an expert gets at least 2,048 tokens of a row on average. With fewer
tokens, converting the experts to FP8 would take more time than the faster products save. The experts then multiply in
`model.dtype`, and `plan` says so. For example, if each token visits 8 of 128 experts, FP8 needs rows of at least 32,768
tokens.

According to the data sheet of an H100, FP8 products take half the time of 16-bit products. How much time a whole run
saves has not been measured. With short rows expect no saving, because converting the weights then takes as much time as
the faster products save. A CPU computes the same numbers as a GPU, but gains no time. In 200 steps of a tiny base on a
CPU, FP8 changed the losses by 0.001 nats, while a different seed changed them by 0.07 nats
([benchmarks/README.md](../benchmarks/README.md)). The checks of an export never use FP8 products.
"""


def render() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEADER, *_kernel_rows(), "", _PACKAGES, *_base_rows(), "", _LIGER, _PRODUCTS])


def _kernel_rows() -> Iterator[str]:
    yield "| `model.attention` | package | GPUs, by compute capability | `model.dtype` | widest head | caps | sinks |"
    yield "|---|---|---|---|---:|---|---|"
    for kernel in KERNELS:
        numbers = (
            str(kernel.widest or "any"),
            *("yes" if has else "" for has in (kernel.caps, kernel.sinks)),
        )
        package = f"{kernel.distribution}: {kernel.install}" if kernel.install else "PyTorch"
        cells = (f"`{kernel.name}`", package, _gpus(kernel), "bf16" if kernel.half else "bf16, fp32", *numbers)
        yield f"| {' | '.join(cells)} |"


def _gpus(kernel: Kernel) -> str:
    if kernel.since is None:
        return "any, CPU"
    since = ".".join(map(str, kernel.since))
    return f"{since} to below {'.'.join(map(str, kernel.until))}" if kernel.until else f"from {since} on"


def _base_rows() -> Iterator[str]:
    yield f"| base | {' | '.join(_GPUS)} |"
    yield f"|---|{'---|' * len(_GPUS)}"
    for name, settings in _BASES.items():
        base = read_architecture(settings)
        yield f"| {name} | {' | '.join(_taken(base, capability) for capability in _GPUS.values())} |"


def _taken(base: Architecture, capability: Capability | None) -> str:
    """The kernel that auto takes with every package that this GPU can use, and without any."""
    names = []
    for packages in (True, False):
        unfit = {kernel.name: kernel.unfit(capability) for kernel in KERNELS}
        absent = {kernel.name: "" for kernel in KERNELS if kernel.install and not packages}
        missing = {name: reason for name, reason in unfit.items() if reason} | absent | unable(base.attention_needs)
        names.append(chosen_kernel("auto", missing)[0])
    with_packages, alone = names
    return with_packages if with_packages == alone else f"{with_packages} ({alone})"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, render, "tests.attention_page", "trainer/model/kernels/attention.py"))
