"""What every way to hold a weight says of itself is so, and nobody asks which one it is."""

import re
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer.config.model import Quant
from trainer.model.held import HeldFormat, layers
from trainer.model.held.formats.stored import KeptCodes
from trainer.model.held.layers import HeldLinear, HeldStack, held_by, multiply, multiply_back, weight_of
from trainer.model.kernels import launch
from trainer.model.kernels.launch import can_launch

ROOT = Path(__file__).parents[4]
MADE = ("nf4", "fp4", "int8")


def filled(weights: Tensor, form: HeldFormat) -> HeldStack:
    """A stack (n, rows, columns) in a format, matrix by matrix."""
    count, rows, columns = weights.shape
    stack, parts = HeldStack((count, rows, columns), form, weights.dtype), list[dict[str, Tensor]]()
    for index, matrix in enumerate(weights):
        made = form.encode(matrix.flatten(), columns)
        if spanning := form.spanning:
            spanned, stack.absmax_mean[index] = spanning.finish(made[spanning.part].view(torch.float32))
            made |= spanned
        parts.append(made)
    for name, size in stack.sizes.items():
        joined = torch.cat([made[name] for made in parts])
        assert len(joined) == size
        setattr(stack, name, nn.Parameter(joined, requires_grad=False))
    return stack


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("shape", [(2, 7, 33), (3, 64, 64)])
def test_runs_of_units_are_encoded_and_decoded_by_themselves(
    name: str, double: bool, shape: tuple[int, int, int]
) -> None:
    if name == "int8" and double:
        return
    torch.manual_seed(0)
    form: HeldFormat = Quant(type=name, double=double).held
    weights, (rows, columns) = torch.randn(shape), shape[1:]
    stack = filled(weights, form)
    values = stack.matrices(0, shape[0])
    assert (values - weights).abs().max() < 0.7
    assert torch.equal(stack.matrices(1, 2)[0], values[1])
    unit, flat = form.unit(rows, columns), weights[0].flatten()
    whole, behind = form.encode(flat, columns), form.encode(flat[unit:], columns)
    for part, size in form.unit_bytes(rows, columns).items():
        assert torch.equal(whole[part][size:], behind[part])
    if not form.spanning:
        assert torch.equal(form.decode(whole, len(flat), columns, torch.float32), values[0].flatten())


def test_a_plain_layer_and_one_that_holds_the_same_weight_otherwise_multiply_alike() -> None:
    torch.manual_seed(0)
    form: HeldFormat = Quant(type="int8").held
    stack = filled(torch.randn(1, 48, 64), form)
    held, plain = HeldLinear(64, 48, form, torch.float32), nn.Linear(64, 48)
    for name in stack.sizes:
        setattr(held, name, getattr(stack, name))
    with torch.no_grad():
        plain.weight.copy_(weight_of(held))
    assert (held_by(held).packs, held_by(plain).packs) == (True, False)
    x, grad = torch.randn(3, 64), torch.randn(3, 48)
    assert torch.equal(multiply(x, held, plain.bias), multiply(x, plain, plain.bias))
    assert torch.equal(multiply_back(grad, held), multiply_back(grad, plain))
    total = torch.ones(3, 64)
    assert torch.equal(multiply_back(grad, held, total.clone()), multiply_back(grad, plain, total.clone()))


def test_a_format_may_multiply_by_a_way_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    form: HeldFormat = Quant(type="nf4").held
    layer = HeldLinear(64, 48, form, torch.float32)
    monkeypatch.setattr(type(form), "product", lambda self, x, linear, bias: x[:, :48] + 1)
    monkeypatch.setattr(type(form), "product_back", lambda self, grad, linear, total: grad * 2)
    x = torch.zeros(3, 64, requires_grad=True)
    assert torch.equal(multiply(x, layer, None), torch.ones(3, 48))
    assert torch.equal(multiply_back(torch.ones(3, 48), layer), 2 * torch.ones(3, 48))


def test_a_kernel_decodes_where_one_can_be_launched_and_operators_do_where_the_format_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form: HeldFormat = Quant(type="int8").held
    stack = filled(torch.randn(2, 48, 64), form)
    plain, kernels = stack.matrices(0, 2), [None, torch.ones(1)]
    monkeypatch.setattr(type(form), "by_kernel", lambda self, held, first, last, by: kernels[0])
    assert torch.equal(stack.matrices(0, 2), plain)
    monkeypatch.setattr(layers, "can_launch", lambda device_type: device_type == "cpu")
    assert torch.equal(stack.matrices(0, 2), plain)
    kernels.pop(0)
    assert torch.equal(stack.matrices(0, 2), torch.ones(1))


def test_a_kernel_is_launched_on_a_gpu_alone_where_triton_can_compile_what_launches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compiles its launchers by a C compiler, with Python's headers."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(launch, "find_spec", lambda name: name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    found = [can_launch.__wrapped__("cuda")]
    for missing in ("Python.h", "gcc"):
        (tmp_path / missing).touch(mode=0o755)
        found.append(can_launch.__wrapped__("cuda"))
    assert found == [False, False, True]
    assert not can_launch.__wrapped__("cpu")


def test_pytorch_has_grouped_products_for_two_generations_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "can_launch", lambda device_type: device_type == "cuda")
    for capability, lacks in (((8, 0), True), ((8, 9), True), ((9, 0), False), ((10, 0), False), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert launch.lacks_grouped_products.__wrapped__(torch.device("cuda", 0)) is lacks
    assert not launch.lacks_grouped_products.__wrapped__(torch.device("cpu"))


def test_stored_codes_take_room_to_be_decoded_by_operators_and_stay_plain_where_files_have_none() -> None:
    stored: HeldFormat = Quant(type="stored").held
    assert not stored.of(None).packs
    assert KeptCodes.decoding_bytes == 2**27
    assert Quant(type="nf4").held.decoding_bytes == 0


def test_nobody_asks_which_format_a_run_has() -> None:
    asked = re.compile(r"quant\.type\s*(==|!=|in\b|not in\b)|isinstance\([^)]*(Blocks|KeptCodes|Plain)\b")
    files = [file for package in ("trainer", "launcher") for file in (ROOT / package).rglob("*.py")]
    assert [str(file) for file in files if asked.search(file.read_text())] == []
