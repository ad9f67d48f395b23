"""The attention kernels in the order of preference: the package of each, the GPUs that it runs on, and what it
computes.

A kernel is taken only if it gives the values *and the gradients* of the base's own attention, document by document in a
packed row. Sources: the assertions of flash_attn/cute/interface.py (4.0 beta), hopper/flash_attn_interface.py (3.0
beta) and flash_attn/flash_attn_interface.py (2.8) of Dao-AILab/flash-attention, and torch/nn/attention of PyTorch 2.13.
"""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from inspect import signature
from typing import Any

from trainer.errors import first_line

Capability = tuple[int, int]

FLASH = ("flash_attention_4", "flash_attention_3", "flash_attention_2")  # by transformers' names
# of flash-attn; PyPI has the source of it, and of flash-attn-4, which is written in Python, wheels of betas alone
_RELEASE = "2.8.3.post2"
_LATENT = 192  # keys of latent attention, whose values are narrower and are widened to it (DeepSeek, Kimi)
_OWN = "this base's attention is more than it computes"
_COUNTED = 2**31
_COUNT_IN_32_BITS = ("auto", "flash_attention_2", "varlen", "sdpa", "flex_attention")  # auto may be any of them
_OF_FLASH = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "window_size")


@dataclass(frozen=True)
class AttentionNeeds:
    """The computations of a base's attention beyond softmax(QK)V; see trainer.base.architecture.Architecture."""

    caps_attention: bool = False
    has_sinks: bool = False
    supports_sdpa: bool = True
    supports_flash: bool = True
    widest_head: int = 0


@dataclass(frozen=True)
class Kernel:
    """An attention kernel by its `name` in `model.attention`. `distribution` is the name of its package in package
    indexes. `function` of `module` computes it, and the function's signature must have all of `arguments`.

    It runs on GPUs of compute capability `since` up to, but not including, `until`; without `since` it runs on any
    device. With `half` it computes in 16 bits only, otherwise in fp32 too. `widest` is the largest head. With `masks`
    it takes any mask; other kernels know only borders of documents and windows. `caps` and `sinks` say that it caps
    logits and has sinks, with the gradients of both.
    """

    name: str
    distribution: str | None = None
    install: str = ""
    module: str = ""
    function: str = ""
    arguments: tuple[str, ...] = ()
    since: Capability | None = None
    until: Capability | None = None
    half: bool = True
    widest: int | None = None
    masks: bool = False
    caps: bool = False
    sinks: bool = False

    def unable(self, needs: AttentionNeeds) -> str | None:
        """Return why it would give other results than the base's own attention; None if it would not."""
        if not self.masks and not needs.supports_flash:
            return "it takes no mask, which this base's attention needs"
        widest = needs.widest_head or _LATENT
        if self.widest and widest > self.widest:
            return f"it takes heads of up to {self.widest}, and this base has some of {widest}"
        if needs.caps_attention and not self.caps:
            return "it does not cap attention logits, as this base does"
        if needs.has_sinks and not self.sinks:
            return "it has no attention sinks, and this base needs them"
        if self.name == "eager" or not self.masks:
            return None
        # transformers does not say that it runs a base with caps or sinks by SDPA, as its own has neither.
        beyond = needs.has_sinks or needs.caps_attention
        return None if (needs.supports_flash if beyond else needs.supports_sdpa) else _OWN

    def unavailable(self, capability: Capability | None, half: bool, needs: AttentionNeeds | None = None) -> str | None:
        """Return why it cannot run on a GPU of this compute capability, or on a CPU (None), with what is installed
        here."""
        return self.unfit(capability, half) or self._missing(needs)

    def unfit(self, capability: Capability | None, half: bool = True) -> str | None:
        """Return why it cannot run on such a device, whatever is installed."""
        if self.since is None:
            return None
        if capability is None:
            return "it needs a CUDA device"
        if self.half and not half:
            return "it needs model.dtype: bf16"
        if capability < self.since or (self.until and capability >= self.until):
            until = f" and below {'.'.join(map(str, self.until))}" if self.until else " or newer"
            here = ".".join(map(str, capability))
            return (
                f"it needs a GPU of compute capability {'.'.join(map(str, self.since))}{until}, and this one's is"
                f" {here}"
            )
        return None

    def _missing(self, needs: AttentionNeeds | None) -> str | None:
        if self.distribution is None:
            return None
        try:
            version = metadata.version(self.distribution)  # flash-attn and flash-attn-4 share a name to import
        except metadata.PackageNotFoundError:
            return f"the {self.distribution} package is not installed ({self.install})"
        wanted = (*self.arguments, *(["softcap"] if needs is not None and needs.caps_attention else []))
        try:
            taken = signature(self.call).parameters
        except Exception as error:  # a compiled package whose versions do not fit each other raises anything
            return f"{self.distribution} {version} cannot be imported ({first_line(error)})"
        lacking = [name for name in wanted if name not in taken]
        return f"{self.function} of {self.distribution} {version} has no {', '.join(lacking)}" if lacking else None

    @property
    def call(self) -> Callable[..., Any]:
        """Import the function and return it."""
        return getattr(import_module(self.module), self.function)


def _flash(name: str, distribution: str, install: str, module: str, **limits: Any) -> Kernel:
    return Kernel(name, distribution, install, module, "flash_attn_varlen_func", _OF_FLASH, **limits)


KERNELS = (
    # On Hopper its backward takes neither documents nor windows; nowhere does it have gradients of caps or sinks.
    _flash(
        "flash_attention_4",
        "flash-attn-4",
        "pip install 'flash-attn-4>=4.0.0b36'",
        "flash_attn.cute",
        since=(10, 0),
        until=(12, 0),
        widest=128,
    ),
    _flash(
        "flash_attention_3",
        "flash-attn-3",
        "built from the folder hopper of github.com/Dao-AILab/flash-attention",
        "flash_attn_interface",
        since=(9, 0),
        until=(10, 0),
        widest=256,
        caps=True,
    ),
    _flash(
        "flash_attention_2",
        "flash-attn",
        "pip install --no-build-isolation 'capstan-llm[flash-attn]'",
        "flash_attn",
        since=(8, 0),
        widest=256,
        caps=True,
    ),
    Kernel(
        "varlen",
        "torch",
        module="torch.nn.attention.varlen",
        function="varlen_attn",
        arguments=("scale", "window_size"),
        since=(8, 0),
        widest=256,
    ),
    Kernel("sdpa", half=False, masks=True, sinks=True),
    Kernel("flex_attention", since=(8, 0), half=False, widest=256, masks=True, caps=True, sinks=True),
    Kernel("eager", half=False, masks=True, caps=True, sinks=True),
)


def release_wheel(torch: str, cuda: str, *, cxx11_abi: bool) -> str:
    """Return the address of the wheel in flash-attn's release for this Python, by the scheme of its setup.py. `torch`
    and `cuda` are the versions that torch was built as and for. Only a request shows whether the release has such a
    wheel."""
    torch, python = ".".join(torch.split(".")[:2]), f"cp{''.join(platform.python_version_tuple()[:2])}"
    build = f"cu{cuda.partition('.')[0]}torch{torch}cxx11abi{str(cxx11_abi).upper()}"
    wheel = f"flash_attn-{_RELEASE}+{build}-{python}-{python}-linux_{platform.machine()}.whl"
    return f"https://github.com/Dao-AILab/flash-attention/releases/download/v{_RELEASE}/{wheel}"


def unable(needs: AttentionNeeds, *, masked: bool = False) -> dict[str, str]:
    """Return for each unfit kernel why: it gives other results than the base's own attention, or has no advantage. If
    rows are `masked` by more than borders of documents, flex_attention has one: it skips what a mask hides."""
    reasons = {kernel.name: kernel.unable(needs) for kernel in KERNELS}
    if not (masked or needs.caps_attention or needs.has_sinks) and not reasons["flex_attention"]:
        reasons["flex_attention"] = "it has nothing that this base needs and sdpa lacks"
    return {name: reason for name, reason in reasons.items() if reason}


def unavailable(capability: Capability | None, half: bool, needs: AttentionNeeds | None = None) -> dict[str, str]:
    """Return for each unfit kernel why it cannot run on a GPU of this compute capability, or on a CPU (None). `half`
    says that `model.dtype` has 16 bits.
    """
    reasons = {kernel.name: kernel.unavailable(capability, half, needs) for kernel in KERNELS}
    return {name: reason for name, reason in reasons.items() if reason}


def chosen_kernel(setting: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """Return the kernel that `model.attention` means if those of `missing` cannot be taken, and why it is this one."""
    if setting != "auto":
        return setting, "set by model.attention"
    name = next(kernel.name for kernel in KERNELS if kernel.name not in missing)
    before = dict[str, list[str]]()
    for kernel in KERNELS[: [kernel.name for kernel in KERNELS].index(name)]:
        before.setdefault(missing[kernel.name], []).append(kernel.name)
    return name, "; ".join(
        f"no {', '.join(names)}: {reason}" for reason, names in before.items()
    ) or "fastest available"


def uncountable(kernel: str, tokens: int, heads: int, size: int, *, masked: bool) -> bool:
    """Return whether a row has more numbers than some kernels can count in 32 bits. It has so many tokens, with so many
    heads of this size on a rank. flash-attn 2, and PyTorch's varlen and SDPA, which are built from it, compute the
    place of a document's gradient in 32 bits (`q_offset` of `row_offset_dq_accum` in flash_bwd_kernel.h; heads are
    rounded up to 32). flex_attention's backward pass computes the places of keys and values so
    (pytorch/pytorch#190857). SDPA's kernel with a mask computes the place of a row of the mask so (`query_start *
    p.bias_strideM` in kernel_forward.h)."""
    if kernel == "sdpa" and masked and tokens**2 > _COUNTED:
        return True
    return kernel in _COUNT_IN_32_BITS and tokens * heads * (-(-size // 32) * 32) > _COUNTED


SEEING = ("sdpa", "eager")
"""The kernels that take a mask as a class that sees makes it."""


def kernels_without_pictures(sees: bool) -> dict[str, str]:
    """Return the kernels that cannot compute rows with pictures, each with the reason as a clause.

    A class may make masks for its decoder, by which the tokens of a picture see each other."""
    why = "it takes no mask of a row with pictures"
    return {kernel.name: why for kernel in KERNELS if sees and kernel.name not in SEEING}


def uncountable_mixing(tokens: int, values: int) -> bool:
    """Return whether a row has more numbers than kernels of linear attention and of Mamba can count. A layer makes
    `values` numbers of each token. causal-conv1d and mamba-ssm compute places in unsigned 32 bits (`index_t` in
    causal_conv1d.h and selective_scan.h)."""
    return tokens * values > 2 * _COUNTED


def kernels_without_masks(share_prefix: bool) -> dict[str, str]:
    """Return the kernels that cannot compute rows in which answers share a prompt, each with the reason as a clause."""
    why = "it only knows where documents begin and end, and data.share_prefix needs a mask"
    return {kernel.name: why for kernel in KERNELS if share_prefix and not kernel.masks}
