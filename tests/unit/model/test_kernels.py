"""Every attention kernel gives eager attention's values and gradients, called as the installed or the published library
is called.

flash-attn's and PyTorch's varlen kernels take no tensors on a CPU. In their place stand plain products behind the
signatures of the libraries: a keyword that a library has not is a TypeError here too, and a wrong window, scale or
border another result.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from inspect import signature
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention import varlen
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

from trainer.model.attention import sdpa_with_sinks, varlen_attention
from trainer.model.kernels.attention import FLASH, KERNELS, AttentionNeeds, unable, unavailable
from trainer.model.kernels.flex import block_mask, flex_attention_capped


@dataclass(frozen=True)
class Case:
    """One shape of attention; `lengths` of the row's documents."""

    head: int = 64
    value: int | None = None  # else as wide as `head`
    groups: int = 1
    window: int | None = None
    cap: float | None = None
    sinks: bool = False
    lengths: tuple[int, ...] = (9, 17, 4, 1)

    def __str__(self) -> str:
        return "-".join(f"{name}={value}" for name, value in vars(self).items() if value != getattr(type(self), name))


PLAIN = [
    *(Case(head) for head in (64, 80, 96, 128, 192, 256)),
    Case(groups=4),
    Case(lengths=(31,)),
    Case(window=6),
    Case(128, groups=2, window=6, lengths=(31,)),
    Case(192, value=128),
]
CAPPED, SINKING = (
    [Case(256, groups=2, cap=5.0), Case(cap=5.0, window=6)],
    [Case(groups=4, sinks=True), Case(sinks=True, window=6)],
)


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query (1, heads, T, head), key and value (1, kv_heads, T, ...) and sinks (heads,)."""
    torch.manual_seed(1)
    tokens, shape = sum(case.lengths), (case.head, case.head, case.value or case.head)
    q, k, v = (
        torch.randn(1, heads, tokens, size, requires_grad=True)
        for heads, size in zip((4, 4 // case.groups, 4 // case.groups), shape, strict=True)
    )
    return q, k, v, torch.randn(4, requires_grad=True) if case.sinks else None


def seen(case: Case) -> Tensor:
    """(T, T): whether a token sees another; a window counts the token itself."""
    document = torch.repeat_interleave(torch.arange(len(case.lengths)), torch.tensor(case.lengths))
    back = torch.arange(len(document))[:, None] - torch.arange(len(document))
    return (document[:, None] == document) & (back >= 0) & (back < (case.window or len(document)))


def eager(case: Case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """The definition, in fp64: (1, T, heads, value)."""
    q, k, v = (part.double() for part in (q, k.repeat_interleave(case.groups, 1), v.repeat_interleave(case.groups, 1)))
    scores = q @ k.mT / case.head**0.5
    scores = scores if case.cap is None else case.cap * torch.tanh(scores / case.cap)
    scores = scores.masked_fill(~seen(case), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


def products(
    q: Tensor, k: Tensor, v: Tensor, borders: Any, keys: Any, scale: Any, window: tuple[int, int], cap: float
) -> Tensor:
    """Attention over documents (T, heads, size), as flash-attn defines it: a window of (left, right) more tokens, or
    -1.
    """
    assert torch.equal(borders, keys)
    assert borders.dtype == torch.int32
    groups, results = q.shape[1] // k.shape[1], []
    for begin, end in zip(borders.tolist(), borders.tolist()[1:], strict=False):
        one, other, values = (
            part[begin:end].transpose(0, 1)
            for part in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        )
        scores = one @ other.mT * scale
        scores = cap * torch.tanh(scores / cap) if cap else scores
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = (back < -window[1]) if window[1] >= 0 else torch.zeros_like(back, dtype=torch.bool)
        hidden = hidden | (back > window[0]) if window[0] >= 0 else hidden
        results.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(results)


# The parameters of flash_attn_varlen_func in flash-attn 2.8.3, flash-attn-3 3.0.0b1 and flash-attn-4 4.0.0b4, whose
# docstrings say what they mean. The first has no window as (-1, -1), the last as (None, None); its right edge is 0
# where it is causal.
def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert causal
    return products(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, (window_size[0], 0), softcap)


def flash_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    assert causal
    return products(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, (window_size[0], 0), softcap)


def flash_4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None, seqused_k=None,
    page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, score_mod=None, mask_mod=None, block_sparse_tensors=None, cu_total_m_blocks=None,
    cu_total_n_blocks=None, aux_tensors=None, return_lse=False,
):  # fmt: skip
    assert causal
    assert softcap == 0.0
    left = -1 if window_size[0] is None else window_size[0]
    return products(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, (left, 0), softcap), None


MODULES = {
    "flash_attention_4": ("flash_attn.cute", flash_4),
    "flash_attention_3": ("flash_attn_interface", flash_3),
    "flash_attention_2": ("flash_attn", flash_2),
}


def of_torch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert enable_gqa or query.shape[1] == key.shape[1]
    return products(query, key, value, cu_seq_q, cu_seq_k, scale, window_size, 0.0)


def of_older_torch(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1]
    return products(query, key, value, cu_seq_q, cu_seq_k, scale, window_size, 0.0)


@pytest.fixture
def flash_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All three of flash-attn's packages are installed."""
    for module, function in MODULES.values():
        names = {"flash_attn_func": None, "flash_attn_varlen_func": function, "flash_attn_with_kvcache": None}
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**names))
    padding = SimpleNamespace(pad_input=None, unpad_input=None)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    plain = metadata.version
    versions = {"flash-attn": "2.8.3", "flash-attn-3": "3.0.0b1", "flash-attn-4": "4.0.0b4"}
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or plain(name))
    yield
    flash_utils._loaded_implementation = None


def attend(kernel: str, case: Case) -> tuple[Tensor, list[Tensor]]:
    """The kernel's result, called as a layer of transformers calls it, and the gradients of its inputs."""
    q, k, v, sinks = tensors(case)
    borders = torch.tensor([0, *case.lengths]).cumsum(0).int()
    module: Any = nn.Linear(1, 1)
    module.is_causal, module.num_key_value_groups = True, case.groups
    module.config = SimpleNamespace(_attn_implementation=kernel)
    given: dict[str, Any] = {
        "scaling": case.head**-0.5,
        "sliding_window": case.window,
        "softcap": case.cap,
        "s_aux": sinks,
    }
    longest = max(case.lengths)
    given |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
    call, mask = {
        **dict.fromkeys(FLASH, (flash_attention_forward, None)),
        "varlen": (varlen_attention, None),
        "sdpa": (sdpa_with_sinks if case.sinks else sdpa_attention_forward, seen(case)[None, None]),
        "flex_attention": (flex_attention_capped, flex_mask(case)),
    }[kernel]
    out, _ = call(module, q, k, v, mask, **given)
    torch.manual_seed(2)
    (out * torch.randn(out.shape)).sum().backward()
    return out, [part.grad for part in (q, k, v, sinks) if part is not None and part.grad is not None]


def flex_mask(case: Case) -> Any:
    document = torch.repeat_interleave(torch.arange(len(case.lengths)), torch.tensor(case.lengths))[None]
    function = and_masks(causal_mask_function, packed_sequence_mask_function(document))
    if case.window is not None:
        function = and_masks(function, lambda batch, head, one, other: one - other < case.window)
    return block_mask(1, sum(case.lengths), sum(case.lengths), mask_function=function)


@pytest.mark.parametrize(("first", "kept"), [(0, 0), (5, 0), (5, 2)])
def test_a_mask_of_flex_attention_places_queries_and_keys_behind_those_that_were_before(first: int, kept: int) -> None:
    """`first` is the place of the first query, and `kept` that of the first key."""
    mask = block_mask(2, 3, 8, first, kept, lambda batch, head, one, other: (one >= other) & (other > one - 4))
    assert mask.shape == (2, 1, 3, 8)
    queries, keys = torch.arange(first, first + 3)[:, None], torch.arange(kept, kept + 8)
    at = torch.arange(2)[:, None, None], torch.tensor(0), torch.arange(3)[:, None], torch.arange(8)
    found = mask.mask_mod(*at).expand(2, 3, 8)
    assert torch.equal(found, ((queries >= keys) & (keys > queries - 4)).expand(2, 3, 8))


def assert_as_eager(kernel: str, case: Case) -> None:
    inputs = tensors(case)
    expected = eager(case, *inputs)
    torch.manual_seed(2)
    (expected * torch.randn(expected.shape)).sum().backward()
    found, gradients = attend(kernel, case)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    wanted = [part.grad for part in inputs if part is not None]
    assert len(gradients) == len(wanted)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [*PLAIN, *CAPPED], ids=str)
@pytest.mark.parametrize("kernel", FLASH)
def test_flash_attn_is_called_as_each_of_its_packages_wants_it(flash_packages: None, kernel: str, case: Case) -> None:
    if kernel == "flash_attention_4" and case.cap:
        with pytest.raises(AssertionError):  # the control: it is not taken for such a base
            attend(kernel, case)
    else:
        assert_as_eager(kernel, case)


@pytest.mark.parametrize("case", PLAIN, ids=str)
@pytest.mark.parametrize("installed", [of_torch, of_older_torch])
def test_torchs_varlen_kernel_is_called_by_its_own_signature(
    monkeypatch: pytest.MonkeyPatch, installed: Callable[..., Tensor], case: Case
) -> None:
    if installed is of_torch:
        assert signature(varlen.varlen_attn).parameters.keys() == signature(of_torch).parameters.keys()
    monkeypatch.setattr(varlen, "varlen_attn", installed)
    assert_as_eager("varlen", case)


@pytest.mark.parametrize("case", [*PLAIN, *SINKING], ids=str)
def test_sdpa_is_eager_attention(case: Case) -> None:
    assert_as_eager("sdpa", case)


@pytest.mark.parametrize("case", [*PLAIN, *CAPPED, *SINKING, Case(groups=2, cap=5.0, sinks=True)], ids=str)
def test_flex_attention_is_eager_attention(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """In its own plain operations, which PyTorch keeps from training on a CPU."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    assert_as_eager("flex_attention", case)


def test_a_window_that_is_off_by_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*args: Any, window_size: tuple[int, int], **given: Any) -> Tensor:
        return of_torch(*args, window_size=(window_size[0] + 1, 0), **given)

    monkeypatch.setattr(varlen, "varlen_attn", off)
    with pytest.raises(AssertionError, match="not close"):
        assert_as_eager("varlen", Case(window=6))


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_torchs_own_kernel_takes_the_shapes_of_every_case(case: Case) -> None:
    """On meta, where it checks shapes and keywords, forward and backward."""
    q, k, v = (part.detach().to("meta", torch.bfloat16).requires_grad_() for part in tensors(case)[:3])
    borders, longest = torch.zeros(len(case.lengths) + 1, dtype=torch.int32, device="meta"), max(case.lengths)
    given: dict[str, Any] = {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    out, _ = varlen_attention(nn.Module(), q, k, v, None, scaling=0.1, sliding_window=case.window, **given)
    out.sum().backward()
    assert out.shape == (1, sum(case.lengths), 4, case.value or case.head)
    assert [part.grad is not None and part.grad.shape == part.shape for part in (q, k, v)] == [True] * 3


NEEDS = AttentionNeeds(widest_head=128)


@pytest.mark.parametrize(
    ("capability", "missing"),
    [
        ((7, 5), {*FLASH, "varlen", "flex_attention"}),
        ((8, 6), {"flash_attention_4", "flash_attention_3"}),
        ((9, 0), {"flash_attention_4"}),
        ((10, 0), {"flash_attention_3"}),
        ((12, 0), {"flash_attention_4", "flash_attention_3"}),
    ],
)
def test_a_kernel_runs_on_the_gpus_that_it_was_made_for(
    flash_packages: None, capability: tuple[int, int], missing: set[str]
) -> None:
    found = unavailable(capability, half=True)
    assert found.keys() == missing
    assert all("compute capability" in reason for reason in found.values())
    assert unavailable(capability, half=False).keys() == missing | {*FLASH, "varlen"}
    assert unavailable(None, half=True).keys() == {*FLASH, "varlen", "flex_attention"}


def test_a_package_is_asked_for_by_its_own_name(monkeypatch: pytest.MonkeyPatch, flash_packages: None) -> None:
    """flash-attn-4 brings a `flash_attn` to import, as flash-attn does."""
    plain = metadata.version

    def only_4(name: str) -> str:
        if name in ("flash-attn", "flash-attn-3"):
            raise metadata.PackageNotFoundError(name)
        return plain(name)

    monkeypatch.setattr(metadata, "version", only_4)
    assert unavailable((8, 0), half=True)["flash_attention_2"].startswith(
        "the flash-attn package is not installed (pip"
    )
    assert "flash_attention_4" not in unavailable((10, 0), half=True)


def test_a_package_that_lacks_what_is_asked_of_it_or_does_not_import_is_told(
    monkeypatch: pytest.MonkeyPatch, flash_packages: None
) -> None:
    capping = replace(NEEDS, caps_attention=True)

    def older(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size): ...

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=older))
    reason = unavailable((8, 0), half=True, needs=capping)["flash_attention_2"]
    assert reason == "flash_attn_varlen_func of flash-attn 2.8.3 has no softcap"
    assert "flash_attention_2" not in unavailable((8, 0), half=True)

    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c105Error")

    monkeypatch.setattr("trainer.model.kernels.attention.import_module", broken)
    assert "cannot be imported (undefined symbol" in unavailable((8, 0), half=True)["flash_attention_2"]
    assert importlib.import_module("json")


@pytest.mark.parametrize(
    ("changed", "able"),
    [
        ({}, {*FLASH, "varlen", "sdpa", "eager"}),
        ({"widest_head": 256}, {"flash_attention_3", "flash_attention_2", "varlen", "sdpa", "eager"}),
        ({"widest_head": 0}, {"flash_attention_3", "flash_attention_2", "varlen", "sdpa", "eager"}),  # latent attention
        ({"widest_head": 512}, {"sdpa", "eager"}),
        (
            {"caps_attention": True, "supports_sdpa": False},
            {"flash_attention_3", "flash_attention_2", "flex_attention", "eager"},
        ),
        ({"has_sinks": True, "supports_sdpa": False}, {"sdpa", "flex_attention", "eager"}),
        ({"has_sinks": True, "supports_flash": False}, {"eager"}),
        ({"supports_flash": False}, {"sdpa", "eager"}),
        ({"supports_flash": False, "supports_sdpa": False}, {"eager"}),
    ],
)
def test_a_base_gets_no_kernel_that_computes_something_else(changed: dict[str, Any], able: set[str]) -> None:
    assert {kernel.name for kernel in KERNELS} - unable(replace(NEEDS, **changed)).keys() == able
