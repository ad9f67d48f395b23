"""Checks of Liger's kernels in our models without a GPU, each a process, as Triton reads the environment once.

TRITON_INTERPRET=1 python -m tests.liger_kernels interpret     values and gradients, in Triton's interpreter
TRITON_INTERPRET=1 python -m tests.liger_kernels ranks         the same of two ranks, sharded
python -m tests.liger_kernels compile                          binaries for GPUs of three generations
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.dist import gradients
from tests.dist.launch import launch
from tests.kernels.code import CAPABILITIES
from tests.material import Workshop
from trainer.base.find.locate import resolve_base
from trainer.base.load.load import empty_model
from trainer.config import dump_config, training
from trainer.model import activations
from trainer.model.attention import choose_attention
from trainer.model.kernels import liger
from trainer.model.kernels.liger import Kernels
from trainer.model.micro_batch import MicroBatch, ModelInput, Segments
from trainer.model.packed import PackedModel
from trainer.model.parts import decoder_layers
from trainer.tuning.method import method_of
from trainer.tuning.objective import find_objective

CPU = torch.device("cpu")
LENGTHS = (8, 5)
AGAIN, KEPT = "train.activation_checkpointing=all", "train.activation_checkpointing=none"
TILED = "train.tiled_mlp=true"
WITHOUT_RANK = ("tuning.rank=16", "tuning.alpha=32")  # the defaults
IA3 = ("tuning.method=ia3", "tuning.targets=[k_proj,gate_proj,up_proj,down_proj]", *WITHOUT_RANK)
BOTTLENECKS = ("tuning.method=bottleneck", "tuning.reduction=7", *WITHOUT_RANK)
LEARNT_NORMS = "tuning.modules_to_save=[norm,input_layernorm]"
# A family, the overrides of its run, and the kernels that it gets beside those of its norms.
CASES = [
    ("llama", (AGAIN, TILED), {"LlamaMLP", "apply_rotary_pos_emb"}),
    ("llama", (KEPT, TILED, LEARNT_NORMS), {"LlamaMLP", "apply_rotary_pos_emb"}),
    ("llama", (AGAIN, *IA3), {"LlamaMLP", "apply_rotary_pos_emb"}),
    ("llama", (KEPT, *BOTTLENECKS), {"LlamaMLP", "apply_rotary_pos_emb"}),
    ("qwen3", (AGAIN,), {"Qwen3MLP", "apply_rotary_pos_emb"}),  # norms of heads
    ("gemma2", (AGAIN,), {"Gemma2MLP", "apply_rotary_pos_emb"}),  # an offset, and norms before a sum
    ("qwen3-moe", (AGAIN,), {"apply_rotary_pos_emb"}),  # experts stay ours
    ("deepseek-v3", (KEPT,), {"DeepseekV3MLP"}),  # no rotary embedding of Liger's, but shared experts
]


@contextmanager
def interpreted() -> Iterator[None]:
    """Liger where there is no GPU, and the operations of its kernels that Triton's interpreter lacks: it leaves numbers
    plain, and knows no function of libdevice."""
    import numpy as np
    import triton.language as tl  # pyright: ignore[reportMissingImports]
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    plain = interpreter._implicit_cvt

    def converted(given: Any) -> Any:
        if not isinstance(given, float):
            return plain(given)
        return tl.tensor(interpreter.TensorHandle(np.array([given], dtype=np.float32), tl.float32), tl.float32)

    functions = [
        ("rms_norm", "rsqrt", lambda x: tl.rsqrt(x)),
        ("geglu", "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1),
    ]
    with ExitStack() as patches:
        patches.enter_context(patch.object(interpreter, "_implicit_cvt", converted))
        patches.enter_context(patch.object(liger, "missing", return_value=None))
        for file, name, function in functions:
            patches.enter_context(patch.object(import_module(f"liger_kernel.ops.{file}"), name, function))
        yield


def row() -> MicroBatch:
    """Two documents."""
    count = sum(LENGTHS)
    tokens = torch.randint(3, 259, (1, count), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    borders = torch.tensor([0, LENGTHS[0], count], dtype=torch.int32)
    labels = tokens.roll(-1, 1)
    labels[0, borders[1:].long() - 1] = -100
    row = ModelInput.of(tokens, places.int()[None], Segments.of_documents(LENGTHS))
    return MicroBatch(row, labels, count, count - 2)


class Built:
    """A model with what learns, which is as it is after some steps."""

    def __init__(self, workshop: Workshop, dtype: torch.dtype, setting: str, *overrides: str) -> None:
        config = workshop.config("liger", "model.dtype=fp32", "quant.type=none", *overrides)
        base, self.kernels = resolve_base(config.model), Kernels(setting, CPU)
        attention = choose_attention("auto", CPU, dtype, base.architecture.attention_needs)
        model = empty_model(base, config, attention, self.kernels)
        weights = AutoModelForCausalLM.from_pretrained(workshop.base, dtype=dtype).state_dict()
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(False)
        method = method_of(config)
        method.attach(model, base.architecture, dtype, seed=3)
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        self.model, self.loss = PackedModel(model, attention), find_objective(config).loss

    def step(self) -> tuple[float, dict[str, Tensor]]:
        loss = self.loss(self.model, row()).sum()
        loss.backward()
        learning = self.model.model.named_parameters()
        return float(loss.detach()), {name: part.grad.float() for name, part in learning if part.grad is not None}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of a gradient from its expectation, relative to this."""
    assert found.keys() == expected.keys() != set()
    return max(float((gradient - expected[name]).norm() / expected[name].norm()) for name, gradient in found.items())


def check(workshop: Workshop, dtype: torch.dtype, overrides: tuple[str, ...], names: set[str]) -> None:
    plain = Built(workshop, dtype, "none", *overrides)
    loss, expected = plain.step()
    code = vars(sys.modules[type(plain.model.model).__module__])
    own = dict(code)
    built = Built(workshop, dtype, "auto", *overrides)
    changed = {name: value for name, value in code.items() if value is not own[name]}
    assert changed.keys() == names & {"apply_rotary_pos_emb"}, "no class of models to come"
    found_loss, found = built.step()
    code.update(own)
    off, apart = abs(found_loss - loss) / loss, furthest(found, expected)
    parts = set(built.kernels.why.split(", "))
    assert built.kernels.name == "liger"
    assert {name for name in parts if not name.endswith("RMSNorm")} == names, parts
    assert len(parts - names) == 1, parts
    bounds = (1e-5, 1e-4) if dtype == torch.float32 else (5e-3, 3e-2)
    print(f"{workshop.base.parent.name} {dtype} {overrides}: {off:.1e}, {apart:.1e}", flush=True)
    assert off < bounds[0]
    assert 0 < apart < bounds[1], "other operations"


def interpret() -> None:
    """Losses and gradients of our modules with Liger's kernels are those without, and two things that would be wrong
    are seen.
    """
    activations.MLP_TILE = training.MLP_TILE = 8
    with tempfile.TemporaryDirectory() as folder, interpreted():
        workshops = {kind: Workshop(Path(folder, kind), kind) for kind, _, _ in CASES}
        for kind, overrides, names in CASES:
            check(workshops[kind], torch.float32, overrides, names)
        for kind in ("llama", "gemma2"):
            check(workshops[kind], torch.float16, *next(case[1:] for case in CASES if case[0] == kind))
        _controls(workshops, Path(folder))
    print("interpreted")


def _controls(workshops: dict[str, Workshop], folder: Path) -> None:
    """A norm whose gradient takes the place of the one that also passes it by, and an MLP of another activation than
    Liger's.
    """
    _, expected = Built(workshops["gemma2"], torch.float32, "none", KEPT).step()
    built = Built(workshops["gemma2"], torch.float32, "liger", KEPT)
    layers: Any = decoder_layers(built.model.model)
    for layer in layers:
        layer.post_feedforward_layernorm.in_place = True
    assert furthest(built.step()[1], expected) > 0.1
    other = Workshop(folder / "gelu", "llama", hidden_act="gelu")
    check(other, torch.float32, (KEPT,), {"apply_rotary_pos_emb"})
    _, expected = Built(other, torch.float32, "none", KEPT).step()
    with patch.object(liger, "_agrees", return_value=True):
        _, found = Built(other, torch.float32, "liger", KEPT).step()
    assert furthest(found, expected) > 0.1


def sharded(loads: list[tuple[str, str, str]]) -> list[Any]:
    """`gradients.first_step` of each configuration, data and destination in turn."""
    activations.MLP_TILE = training.MLP_TILE = 16
    with interpreted():
        return [gradients.first_step(*load) for load in loads]


def ranks() -> None:
    """A step of two ranks over a 4-bit base in shards, whose frozen norms are gathered with their layers."""
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        ways = {
            f"{setting}-{number}": (f"model.kernels={setting}", "model.dtype=fp32", *way)
            for setting in ("none", "liger")
            for number, way in enumerate([(AGAIN, TILED), (KEPT, LEARNT_NORMS)])
        }
        loads = []
        for name, overrides in ways.items():
            config = workshop.config(name, "data.sequence_length=32", "train.global_batch=2", *overrides)
            loads.append(
                (dump_config(config), workshop.prepare(config).train, str(Path(folder, f"{name}.safetensors")))
            )
        facts = dict(zip(ways, launch(2, sharded, loads, timeout=250)[0], strict=True))
        for number in range(2):
            plain, fused = f"none-{number}", f"liger-{number}"
            off = abs(facts[fused]["loss"] - facts[plain]["loss"]) / facts[plain]["loss"]
            found, expected = (load_file(Path(folder, f"{name}.safetensors")) for name in (fused, plain))
            apart = furthest(found, expected)
            print(f"{ways[fused]}: {off:.1e}, {apart:.1e}")
            assert off < 1e-5
            assert 0 < apart < 1e-4
    print("sharded")


def compiled() -> None:
    """Every kernel that a base may get, forwards and backwards, in bf16."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    for name, kernel, constants in _kernels():
        types = {argument: "constexpr" if argument in constants else _type(argument) for argument in kernel.arg_names}
        source = ASTSource(kernel, types, constants)
        for capability in CAPABILITIES:
            binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
            print(f"{name} sm_{capability}: {len(binary.asm['cubin'])} bytes")


def _kernels() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Kernels with constants as of Llama 3.1 8B: norms as of Llama, which are frozen, and as of Gemma, which learn."""
    from triton.language import bfloat16  # pyright: ignore[reportMissingImports]

    norms, rope, swiglu, geglu = (
        import_module(f"liger_kernel.ops.{name}") for name in ("rms_norm", "rope", "swiglu", "geglu")
    )
    wide = {"n_cols": 14336, "BLOCK_SIZE": 16384}
    heads = {"n_qh": 32, "n_kh": 8, "hd": 128, "pad_n_qh": 32, "pad_n_kh": 8, "pad_hd": 128, "pad_rd": 128, "rd": 128}
    for casting in (0, 1):
        common = {"casting_mode": casting, "elementwise_affine": True, "BLOCK_SIZE": 4096}
        yield f"norm {casting}", norms._rms_norm_forward_kernel, common
        frozen = {"COMPUTE_DW": False, "dW_ptr": None} if casting == 0 else {"COMPUTE_DW": True}
        yield f"norm {casting} backward", norms._rms_norm_backward_kernel, {**common, "X_dtype": bfloat16, **frozen}
    for backward in (False, True):
        constants = {"bs": 1, "cos_bs": 1, **heads, "BLOCK_SIZE": 32, "BACKWARD_PASS": backward}
        yield f"rotary {backward}", rope._triton_rope, constants
    for way in ("forward", "backward"):
        yield f"swiglu {way}", getattr(swiglu, f"_swiglu_{way}_kernel"), wide
        yield f"swiglu {way} in tiles", getattr(swiglu, f"_swiglu_{way}_kernel_tiled"), {"BLOCK_SIZE": 1024}
        yield f"geglu {way}", getattr(geglu, f"_geglu_tanh_{way}_kernel"), wide


def _type(argument: str) -> str:
    """The type of an argument that is no constant: numbers with a fraction, statistics, counts, and everything else in
    16 bits.
    """
    if argument in ("eps", "offset", "gate_multiplier"):
        return "fp32"
    if argument in ("RSTD_ptr", "dW_ptr"):
        return "*fp32"
    if argument in ("sl", "n_rows", "n_cols", "rows_per_program") or argument.endswith("stride"):
        return "i32"
    return "*bf16"


if __name__ == "__main__":
    {"interpret": interpret, "ranks": ranks, "compile": compiled}[sys.argv[1]]()
