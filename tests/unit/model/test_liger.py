"""`model.kernels`: which kernels a base gets, and what is left of what Liger does to it. A stand-in is Liger here, with
plain operations; tests/liger_kernels.py has the real one, in Triton's interpreter."""

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral

from tests.families import KINDS, SIZES
from trainer.base.describe.empty_model import meta_model
from trainer.errors import ConfigError
from trainer.model.kernels import launch, liger
from trainer.model.kernels.liger import Kernels, fuse

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PACKAGE = "liger_kernel.transformers"


def model_of(kind: str, **settings: Any) -> Any:
    return meta_model(AutoConfig.for_model(**{**SIZES, **KINDS[kind], **settings}))


def rotary(*_arguments: Any) -> None: ...


rotary.__module__ = PACKAGE


def norm(self: Any, hidden: Tensor) -> Tensor:
    """As Llama's, in one expression."""
    return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)


FORWARDS = {"norm": norm}


def gated(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, bool]]:
    """The arguments that Liger was called with. It knows Llama and Mixtral."""
    given = list[dict[str, bool]]()

    def apply(model: Any, **parts: bool) -> None:
        given.append(parts)
        file = sys.modules[type(model).__module__]
        file.apply_rotary_pos_emb = rotary  # type: ignore[attr-defined]
        family = type(model).__name__.removesuffix("ForCausalLM")
        setattr(file, f"{family}RMSNorm", nn.RMSNorm)
        for layer in model.model.layers:
            _bind(layer.input_layernorm, FORWARDS["norm"])
            _bind(layer.mlp if hasattr(layer.mlp, "gate_proj") else layer.mlp.experts, gated)

    patching = SimpleNamespace(_apply_liger_kernel_to_instance=apply, MODEL_TYPE_TO_APPLY_LIGER_FN=["llama", "mixtral"])
    packages = {PACKAGE: {"monkey_patch": patching}, "liger_kernel.backends": {"set_impl": lambda name: None}}
    for name, contents in packages.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(liger, "can_launch", lambda device: True)
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.8.5" if name == "liger-kernel" else version(name))
    for file in (modeling_llama, modeling_mixtral):
        monkeypatch.setattr(file, "apply_rotary_pos_emb", file.apply_rotary_pos_emb)  # back at the end
    return given


def _bind(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    vars(module)["forward"] = MethodType(forward, module)


def test_without_a_gpu_or_the_package_a_base_keeps_its_own_operations_and_liger_is_refused() -> None:
    for device, kind, reason in [
        (CPU, "llama", "it needs a CUDA device"),
        (CUDA, "llama", r"the liger-kernel package is not installed \(pip install 'capstan-llm\[gpu\]'\)"),
    ]:
        with pytest.raises(ConfigError, match=f"^model.kernels: 'liger' cannot run here: {reason}. Use auto or none.$"):
            Kernels("liger", device).apply(model_of(kind))


def test_auto_says_why_not(applied: list[dict[str, bool]]) -> None:
    for setting, device, kind, why in [
        ("auto", CPU, "llama", "it needs a CUDA device"),
        ("auto", CUDA, "qwen3", "liger-kernel 0.8.5 has no kernels for qwen3 models"),
        ("none", CUDA, "llama", "set by model.kernels"),
    ]:
        model = model_of(kind)
        kernels = Kernels(setting, device)
        kernels.apply(model)
        assert (kernels.name, kernels.why) == ("none", why)
        assert not any("forward" in vars(module) for module in model.modules())
    assert applied == []


def test_a_package_that_cannot_be_imported_is_a_sentence(
    applied: list[dict[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, ModuleType(PACKAGE))
    with pytest.raises(ConfigError, match=r"liger-kernel 0.8.5 cannot be imported \(cannot import name .*\). Use auto"):
        Kernels("liger", CUDA).apply(model_of("llama"))


def test_where_liger_fails_or_has_nothing_is_a_sentence(
    applied: list[dict[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = model_of("llama")
    changed.model.layers[0].mlp = None
    said = r"^model.kernels: liger-kernel fails on llama models \(.* no attribute 'experts'\). Set none.$"
    with pytest.raises(ConfigError, match=said):
        Kernels("auto", CUDA).apply(changed)
    assert modeling_llama.LlamaRMSNorm is not nn.RMSNorm
    monkeypatch.setattr(liger, "can_launch", lambda device: False)
    with pytest.raises(
        ConfigError, match="Triton needs a C compiler and Python's headers on this machine. Use auto or none."
    ):
        Kernels("liger", CUDA).apply(model_of("llama"))
    monkeypatch.setattr(liger, "can_launch", lambda device: True)
    monkeypatch.setattr(liger, "fuse", lambda model, device: [])
    with pytest.raises(ConfigError, match="liger-kernel computes nothing as these llama models do. Use auto or none."):
        Kernels("liger", CUDA).apply(model_of("llama"))


def test_a_model_gets_what_agrees_with_its_own_modules_and_later_models_nothing(
    applied: list[dict[str, bool]],
) -> None:
    model = model_of("llama")
    own = dict(vars(modeling_llama))
    assert fuse(model, CPU) == ["LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"]
    assert applied == [
        {"cross_entropy": False, "fused_linear_cross_entropy": False, "layer_norm": False, "relu_squared": False}
    ]
    assert {name for name, value in vars(modeling_llama).items() if value is not own[name]} == {"apply_rotary_pos_emb"}
    assert "forward" in vars(model.model.layers[0].input_layernorm)
    assert fuse(model, CPU) == ["LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"], "a second load says the same"


def test_an_mlp_of_another_activation_and_experts_stay_as_they_are(applied: list[dict[str, bool]]) -> None:
    for kind, settings in [("llama", {"hidden_act": "gelu"}), ("mixtral", {})]:
        model = model_of(kind, **settings)
        names = fuse(model, CPU)
        assert [name for name in names if "MLP" in name or "Experts" in name] == []
        assert len(names) == 2
        assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)
    experts = [layer.mlp.experts for layer in model.model.layers]
    assert {type(module) for module in experts} == {modeling_mixtral.MixtralExperts}
    assert not any("forward" in vars(module) for module in experts)


@pytest.mark.parametrize("wrong", [lambda y, x: y + x, lambda y, x: 1.001 * y], ids=["offset", "factor"])
def test_a_norm_that_is_another_stays_as_it_is(
    applied: list[dict[str, bool]], monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor, Tensor], Tensor]
) -> None:
    monkeypatch.setitem(FORWARDS, "norm", lambda self, hidden: wrong(norm(self, hidden), hidden))
    assert fuse(model_of("llama"), CPU) == ["LlamaMLP", "apply_rotary_pos_emb"]


@pytest.mark.parametrize(("capability", "supported"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_kernels_are_launched_on_gpus_that_triton_supports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int], supported: bool
) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(launch, "find_spec", lambda name: name)
    monkeypatch.setattr(launch.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "cc")
    assert launch.can_launch.__wrapped__("cuda") is supported
    assert not launch.can_launch.__wrapped__("cpu")
