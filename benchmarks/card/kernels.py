"""Kernels by themselves: their values and gradients beside plain ones in fp32, and how long they take."""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from card.figures import Figure, device, moved_in, seconds_of, shape


def kernels(given: argparse.Namespace) -> Iterator[Figure]:
    """Decoded weights in every format beside the CPU's, and of a stack that has more of them than 32 bits count; then loss and gradients of a packed row in bf16 by each
    attention kernel and by Liger's kernels, beside plain ones in fp32; and how long Liger's take."""
    yield from _decoded(given)
    yield from _moved(given)
    yield from _beyond_32_bits(given)
    yield from _mixture(given)
    yield from _grouped(given)
    yield from _attention(given)
    yield from _fused(given)


def _attention(given: argparse.Namespace) -> Iterator[Figure]:
    import torch
    from train import llama, make_base

    from trainer.base.find.locate import resolve_base
    from trainer.errors import ConfigError
    from trainer.model.attention import choose_attention
    from trainer.model.kernels.liger import missing

    here = torch.device(device())
    lacking = missing(here, "llama")
    with tempfile.TemporaryDirectory(prefix="capstan-bench-") as folder:
        hidden = 64 if given.pretend else 1024
        make_base(Path(folder, "base"), {**llama(2, hidden), "num_attention_heads": 8, "num_key_value_heads": 2})
        settings = _config(Path(folder, "base")).model
        base = resolve_base(settings)
        exact, exact_gradient = _loss_and_gradient(base, "eager", torch.float32)

        def beside(what: str, *options: Any) -> Figure:
            loss, gradient = _loss_and_gradient(base, *options)
            off = abs(loss - exact) / exact
            apart = float((gradient - exact_gradient).norm() / exact_gradient.norm())
            right = off < 2e-3 and apart < 5e-2
            return Figure(what, f"loss {off:.1e} off, gradient {apart:.1e}", "below 2e-3 and 5e-2", right)

        known = get_args(type(settings).model_fields["attention"].annotation)
        for name in (name for name in known if name != "auto"):
            try:
                choose_attention(name, here, torch.bfloat16, base.architecture.attention_needs)
            except ConfigError as error:
                yield Figure(f"attention: {name}", str(error))
                continue
            yield beside(f"attention: {name}", name, torch.bfloat16)
        if lacking is None:
            yield beside("liger", "sdpa", torch.bfloat16, "liger")


def _config(base: Path, *overrides: str) -> Any:
    from trainer.config import parse_config

    tree = {"run": {"name": "bench"}, "model": {"base": str(base)}, "train": {"steps": 1}}
    return parse_config(json.dumps({**tree, "data": {"train": [{"path": "none.jsonl"}]}}), overrides)


def _loss_and_gradient(base: Any, kernel: str, dtype: Any, fused: str = "none") -> tuple[float, Any]:
    """The loss of a row of three documents, and its gradient by the embedding, fp32; `fused` is model.kernels."""
    import torch
    from safetensors.torch import load_file

    from trainer.base.load.load import empty_model
    from trainer.model.attention import choose_attention
    from trainer.model.kernels.liger import Kernels
    from trainer.model.micro_batch import MicroBatch, ModelInput, Segments
    from trainer.model.packed import PackedModel
    from trainer.tuning.objective import find_objective

    here = torch.device(device())
    config = _config(base.directory, f"model.dtype={'fp32' if dtype == torch.float32 else 'bf16'}")
    attention = choose_attention(kernel, here, dtype, base.architecture)
    model: Any = empty_model(base, config, attention, Kernels(fused, here))
    weights: dict[str, Any] = {}
    for path in Path(base.directory).glob("*.safetensors"):
        weights |= load_file(path)
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True, strict=False)
    model = model.to(here).eval()
    embedding = model.get_input_embeddings().weight.requires_grad_(True)
    lengths = (700, 1, 323)
    tokens = torch.randint(0, 1000, (1, sum(lengths)), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    places = torch.cat([torch.arange(length) for length in lengths])
    labels = torch.where((places + 1 == 700) | (places == 0), -100, tokens)
    given = ModelInput.of(tokens, places.int()[None], Segments.of_documents(lengths))
    row = MicroBatch(given, labels.int(), sum(lengths), int((labels != -100).sum()))
    loss = find_objective(config).loss(PackedModel(model, attention), row.to(here)).sum()
    loss.backward()
    return float(loss.detach()), embedding.grad.float()


def _fused(given: argparse.Namespace) -> Iterator[Figure]:
    """How long the parts of an 8B layer that Liger computes take, forwards and backwards over 8192 tokens, with it and
    without.
    """
    import torch

    from trainer.model.kernels.liger import missing

    if lacking := missing(torch.device(device()), "llama"):
        yield Figure("liger", lacking)
        return
    from liger_kernel.ops import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.transformers import LigerRMSNorm  # pyright: ignore[reportMissingImports]
    from liger_kernel.transformers.rope import liger_rotary_pos_emb  # pyright: ignore[reportMissingImports]
    from torch.nn.functional import silu
    from transformers.models.llama import modeling_llama as llama

    def values(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.bfloat16, device=device(), requires_grad=True)

    def passes(forward: Any, inputs: list[Any]) -> Callable[[], object]:
        def both() -> object:
            results = forward(*inputs)
            results = results if isinstance(results, tuple) else (results,)
            return torch.autograd.grad(results, inputs, [torch.ones_like(result) for result in results])

        return both

    sizes = shape(given.layers, pretend=given.pretend)
    hidden, inner, tokens = sizes["hidden_size"], sizes["intermediate_size"], given.length
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    norms = [of(hidden).to(device(), torch.bfloat16).requires_grad_(False) for of in (llama.LlamaRMSNorm, LigerRMSNorm)]
    cos, sin = torch.randn(2, 1, tokens, hidden // heads, dtype=torch.bfloat16, device=device())
    rotaries = [
        lambda q, k, of=of: of(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        for of in (llama.apply_rotary_pos_emb, liger_rotary_pos_emb)
    ]
    parts = {
        "norm": (*norms, [values(1, tokens, hidden)]),
        "rotary": (*rotaries, [values(1, tokens, count, hidden // heads) for count in (heads, kv_heads)]),
        "gated product": (
            lambda gate, up: silu(gate) * up,
            LigerSiLUMulFunction.apply,
            [values(1, tokens, inner) for _ in range(2)],
        ),
    }
    for name, (plain, fused, inputs) in parts.items():
        before, after = (1e3 * seconds_of(passes(forward, inputs)) for forward in (plain, fused))
        said = f"{after:.2f} ms, plain {before:.2f} ms"
        yield Figure(f"liger: {name}", said, "faster", after < before)


def _decoded(given: argparse.Namespace) -> Iterator[Figure]:
    """A matrix of an 8B layer in every format, as the device and as the CPU decodes it, and of its memory's speed the share that
    the kernel reaches; on a card, beside operators or bitsandbytes' kernels."""
    import torch

    from tests.kernels.held import FORMATS, stack_of
    from trainer.model.kernels.launch import can_launch

    shape = (1, 128, 256) if given.pretend else (1, 4096, 14336)
    for name, of in FORMATS.items():
        stack = stack_of(form := of.form(shape, "BF16"), shape, torch.bfloat16)
        host, there = form.matrices(stack, 0, 1), stack.to(device())
        moved = sum(stack.sizes.values()) + host.nbytes

        def by_operators(form: Any = form, there: Any = there) -> Any:
            return form.matrices(there, 0, 1)

        def by_kernel(there: Any = there) -> Any:
            return there.matrices(0, 1)

        ways = {"by one kernel": by_kernel} if can_launch(device()) else {}
        for way, decode in {"by operators": by_operators, **ways}.items():
            found, seconds = decode().cpu(), seconds_of(decode)
            same = torch.equal(found.isnan(), host.isnan()) and torch.equal(found.nan_to_num(), host.nan_to_num())
            yield Figure(f"decoding {name}, {way}", moved_in(seconds, moved), "the CPU's bits", same)


def _moved(given: argparse.Namespace) -> Iterator[Figure]:
    """The same matrix with its codes moved by an adapter of rank 16, as `_decoded`; the sum of its products is in the
    time."""
    import torch

    from tests.kernels.held import FORMATS, stack_of
    from trainer.model.kernels.launch import can_launch
    from trainer.tuning.lora import LowRankUpdate
    from trainer.tuning.method import Moved

    shape = (1, 128, 256) if given.pretend else (1, 4096, 14336)
    drawn = torch.Generator().manual_seed(0)
    up, down = (
        torch.randn(*of, generator=drawn).mul_(0.1).bfloat16().double() for of in ((shape[1], 16), (16, shape[2]))
    )
    for name, of in FORMATS.items():
        if of.of_blocks:
            continue
        stack = stack_of(form := of.form(shape, "BF16"), shape, torch.bfloat16)
        host = form.moved(stack, 0, 1, Moved("w", LowRankUpdate(up, down, 2.0)))
        there, by = stack.to(device()), Moved("w", LowRankUpdate(up.to(device()), down.to(device()), 2.0))

        def by_operators(form: Any = form, there: Any = there, by: Any = by) -> Any:
            return form.moved(there, 0, 1, by)

        def by_kernel(there: Any = there, by: Any = by) -> Any:
            return there.matrices(0, 1, by)

        ways = {"by one kernel": by_kernel} if can_launch(device()) else {}
        for way, move in {"by operators": by_operators, **ways}.items():
            found, seconds = move().cpu(), seconds_of(move)
            same = torch.equal(found.isnan(), host.isnan()) and torch.equal(found.nan_to_num(), host.nan_to_num())
            bytes_moved = sum(stack.sizes.values()) + host.nbytes + 24 * host.numel()
            yield Figure(f"moving {name}, {way}", moved_in(seconds, bytes_moved), "the CPU's bits", same)


def _mixture(given: argparse.Namespace) -> Iterator[Figure]:
    """The elementwise work of a layer of Qwen3-235B over 4,096 tokens, beside PyTorch's operators in fp32."""
    import torch

    from trainer.model.kernels.launch import can_launch

    if not can_launch(device()):
        yield Figure("mixtures", "Triton's kernels need a CUDA device")
        return
    from trainer.model.kernels.mixture import combined, gated

    tokens, each, width, inner = (64, 2, 64, 32) if given.pretend else (4096, 8, 4096, 1536)
    generator = torch.Generator(device()).manual_seed(0)

    def some(*shape: int) -> Any:
        return torch.randn(*shape, device=device(), generator=generator)

    both = some(tokens * each, 2 * inner).bfloat16().requires_grad_()
    weights = some(tokens * each).requires_grad_()
    grad = some(tokens * each, inner).bfloat16()
    gate, up = (part.float() for part in both.chunk(2, 1))
    exact = weights[:, None] * torch.nn.functional.silu(gate) * up
    (expected,) = torch.autograd.grad(exact, [both], grad.float(), retain_graph=True)
    (found,) = torch.autograd.grad(gated(both, weights), [both], grad)
    apart = float((found.float() - expected.float()).norm() / expected.float().norm())
    seconds = seconds_of(lambda: torch.autograd.grad(gated(both, weights), [both, weights], grad))
    moved = 2 * both.nbytes + both.nbytes // 2 + grad.nbytes + both.nbytes
    said = f"{moved_in(seconds, moved)}, gradient {apart:.1e} off"
    yield Figure("mixtures: gate times routing weight, forward and backward", said, "below 1e-2", apart < 1e-2)

    rows, places = some(tokens * each, width).bfloat16(), torch.randperm(tokens * each, device=device())
    plain = rows[places].view(tokens, each, width).float().sum(1).bfloat16()
    close = torch.allclose(combined(rows, places, each), plain, rtol=2**-7, atol=1e-3)
    seconds = seconds_of(lambda: combined(rows, places, each))
    yield Figure("mixtures: a token's experts", moved_in(seconds, rows.nbytes + plain.nbytes), "PyTorch's sums", close)


def _grouped(given: argparse.Namespace) -> Iterator[Figure]:
    """Grouped products by our kernel and by PyTorch's, of rows for the experts of a layer of Qwen3-30B."""
    import torch

    from trainer.model.kernels.launch import can_launch, lacks_grouped_products

    if not can_launch(device()):
        yield Figure("grouped products", "Triton's kernels need a CUDA device")
        return
    from trainer.model.kernels.multiply import by_matrices, tiles_of

    experts, rows, inputs, outputs = 128, 32_768, 2048, 1536
    generator = torch.Generator(device()).manual_seed(0)
    values = [
        torch.randn(*of, device=device(), generator=generator).bfloat16()
        for of in ((rows, inputs), (experts, outputs, inputs))
    ]
    visits = torch.randint(experts, (rows,), device=device(), generator=generator).sort().values
    offsets = torch.searchsorted(visits, torch.arange(experts, device=device()), right=True).int()
    x, matrices = values[0], values[1].mT
    ways = {
        "by our kernel": lambda: by_matrices(x, matrices, tiles_of(offsets, rows)),
        "by PyTorch's": lambda: torch.nn.functional.grouped_mm(x, matrices, offs=offsets),
    }
    taken = "by our kernel" if lacks_grouped_products(x.device) else "by PyTorch's"
    plain = ways["by PyTorch's"]().float()
    for way, multiply in ways.items():
        apart = float((multiply().float() - plain).norm() / plain.norm())
        seconds = seconds_of(multiply)
        said = f"{1e3 * seconds:.2f} ms, {2 * rows * inputs * outputs / seconds / 1e12:.0f} TFLOP/s, {apart:.1e} off"
        yield Figure(f"grouped products {way}{', taken' * (way == taken)}", said, "below 1e-2", apart < 1e-2)


def _beyond_32_bits(given: argparse.Namespace) -> Iterator[Figure]:
    """A run of more weights than a kernel that counts in 32 bits can decode, beside its parts, by each way."""
    import torch

    from trainer.model.held import blockwise
    from trainer.model.kernels.launch import can_launch

    if given.pretend:
        blockwise.AT_ONCE = 2**15
    numel, part = 2 * blockwise.AT_ONCE + 64, blockwise.AT_ONCE // 4
    absmax = torch.rand(numel // 64, device=device())
    for kind in ("nf4", "int8"):
        in_byte = 1 if kind == "int8" else 2
        packed = torch.randint(256, (numel // in_byte,), dtype=torch.uint8, device=device())

        def decoded(first: int, last: int, kind: str = kind, packed: Any = packed, in_byte: int = in_byte) -> Any:
            some = packed[first // in_byte : last // in_byte], absmax[first // 64 : last // 64]
            return blockwise.dequantize_blocks(*some, last - first, kind, 64, torch.bfloat16)

        yield _beside_its_parts(f"{numel} weights in {kind}", decoded, numel, part)
    if not can_launch(device()):
        return
    from trainer.model.kernels.decode import Nested, Numbers, decode_matrices, tiling

    packed = torch.randint(256, (numel // 2,), dtype=torch.uint8, device=device())
    codes = torch.randint(256, (numel // 64,), dtype=torch.uint8, device=device())
    nested, mean = torch.rand(-(-len(codes) // 256), device=device()), torch.rand(1, device=device())
    numbers = Numbers("nf4", 4, torch.bfloat16, blockwise.four_bit_code("nf4", packed.device), upper_first=True)
    tiles = tiling((1, numel), (1, 64), 4)
    assert tiles is not None

    def by_kernel(first: int, last: int) -> Any:
        of_scales = Nested(nested[first // 2**14 :], mean, blockwise.nested_code(packed.device), 256)
        some, scales = packed[first // 2 : last // 2], codes[first // 64 : last // 64]
        shape = (1, 1, last - first)
        return decode_matrices(some, scales, numbers, tiles, shape, torch.bfloat16, of_scales).view(-1)

    yield _beside_its_parts(f"{numel} weights in nf4, double, by one kernel", by_kernel, numel, part)


def _beside_its_parts(what: str, decoded: Callable[[int, int], Any], numel: int, part: int) -> Figure:
    whole, same = decoded(0, numel), 0
    for first in range(0, numel, part):
        last = min(numel, first + part)
        same += int((whole[first:last] == decoded(first, last)).sum())
    return Figure(what, f"{same} as in its parts", f"{numel}", same == numel)
