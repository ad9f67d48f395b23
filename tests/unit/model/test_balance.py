"""The balancing loss of routers is transformers' and Megatron's, in value and gradients, with recomputation and padding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.material import make_base
from tests.unit.model.test_decoding import packed
from trainer.config import parse_config
from trainer.errors import ConfigError
from trainer.model.balance import Of, _Balance, _documents, balanced, routers
from trainer.model.documents import recomputed
from trainer.model.micro_batch import MicroBatch, ModelInput, Role, Segments
from trainer.model.packed import PackedModel
from trainer.plan.resolve import resolve
from trainer.tuning.objective.sft import NextTokens

WEIGHT, TOKENS = 0.3, 24
# Routers without and with a bias, one of sigmoids that chooses by groups, and layers without experts between those with.
KINDS = ("qwen3-moe", "gpt-oss", "deepseek-v3", "qwen2-moe")


def text(padding: int = 0) -> MicroBatch:
    tokens = torch.randint(3, 200, (1, TOKENS), generator=torch.Generator().manual_seed(2))
    plain = MicroBatch.of_text(tokens)
    labels = torch.cat([tokens[:, 1:], torch.full((1, 1), -100)], 1)
    if not padding:
        return _labelled(plain, labels)
    segments = Segments((TOKENS, padding), (Role.DOCUMENT, Role.PADDING))
    ids = torch.nn.functional.pad(tokens, (0, padding))
    places = torch.cat([torch.arange(TOKENS), torch.arange(padding)])[None]
    row = ModelInput.of(ids, places, segments).to(torch.device("cpu"))
    return _labelled(replace(plain, input=row), torch.nn.functional.pad(labels, (0, padding), value=-100))


def _labelled(batch: MicroBatch, labels: Tensor) -> MicroBatch:
    return replace(batch, labels=labels, targets=TOKENS - 1)


def gradients(model: PackedModel, loss: Tensor) -> dict[str, Tensor]:
    model.model.zero_grad()
    loss.backward()
    return {name: part.grad.clone() for name, part in model.model.named_parameters() if part.grad is not None}


def ours(model: PackedModel, batch: MicroBatch, of: Of) -> tuple[float, dict[str, Tensor]]:
    objective = NextTokens()
    loss = balanced(objective.loss, objective.weight, model.model, WEIGHT, of)(model, batch) / batch.targets
    return float(loss.detach()), gradients(model, loss)


def plainly(model: PackedModel, batch: MicroBatch, of: Of) -> tuple[float, dict[str, Tensor]]:
    """By the formulas of the papers, over what each router computed, with the graph of one whole pass."""
    seen = list[tuple[Tensor, Tensor]]()

    def see(out: Any, index: int) -> None:
        seen.append((out[index], next(value for value in out if not value.is_floating_point())))

    hooks = [
        module.register_forward_hook(lambda _module, _given, out, index=index: see(out, index))
        for module, index in routers(model.model).items()
    ]
    loss = NextTokens().loss(model, batch) / batch.targets
    for hook in hooks:
        hook.remove()
    shares = torch.stack([logits[:TOKENS].float().softmax(-1).mean(0) for logits, _ in seen])
    count, k = shares.shape[1], seen[0][1].shape[-1]
    visits = torch.stack(
        [torch.nn.functional.one_hot(chosen[:TOKENS], count).float().sum(1).mean(0) for _, chosen in seen]
    )
    if of == "layers":
        loss = loss + WEIGHT * count / k * (visits * shares).sum()
    else:
        loss = loss + WEIGHT * count * (visits.mean(0) * shares.mean(0)).sum()
    return float(loss.detach()), gradients(model, loss)


def check(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("of", ["model", "layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_the_formula(kind: str, of: Of) -> None:
    batch = text(padding=5 if kind == "qwen3-moe" else 0)
    wanted = plainly(packed(kind, train=True), batch, of)
    check(ours(packed(kind, train=True), batch, of), wanted)
    without = gradients(model := packed(kind, train=True), NextTokens().loss(model, batch) / batch.targets)
    of_routers = [name for name in without if name.endswith((".gate.weight", ".router.weight"))]
    assert any((without[name] - wanted[1][name]).norm() > 1e-3 * without[name].norm() for name in of_routers)


@pytest.mark.parametrize("of", ["model", "layers"])
def test_layers_that_are_computed_again_have_the_same_gradients(of: Of) -> None:
    model = packed("qwen3-moe", train=True)
    model.model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": recomputed})
    check(ours(model, text(), of), plainly(packed("qwen3-moe", train=True), text(), of))


@pytest.mark.parametrize("kind", ["qwen3-moe", "gpt-oss"])
def test_the_loss_of_the_model_is_transformers_own(kind: str) -> None:
    """Its own classes add it with `output_router_logits`, from the pass that gives the logits."""
    model, batch = packed(kind, train=True), text()
    model.model.config.output_router_logits = True
    theirs: Any = model.model
    theirs.router_aux_loss_coef = WEIGHT
    wanted = theirs(input_ids=batch.input.input_ids, labels=batch.input.input_ids, output_router_logits=True).loss
    value, found = ours(packed(kind, train=True), batch, "model")
    check((value, found), (float(wanted.detach()), gradients(model, wanted)))


def test_padding_of_a_row_that_ranks_share_counts_on_none_of_them() -> None:
    segments = Segments((3, 2, 3), (Role.DOCUMENT, Role.PADDING, Role.DOCUMENT))
    row = ModelInput.of(torch.zeros(1, 8, dtype=torch.int32), torch.arange(8, dtype=torch.int32)[None], segments)
    for one, expected in (
        (row, [1, 1, 1, 0, 0, 1, 1, 1]),
        (row.cut(0, 2), [1, 1, 1, 0]),
        (row.cut(1, 2), [0, 1, 1, 1]),
        (row.cut(3, 4), [1, 1]),
    ):
        kept = _documents(one)
        assert kept is not None
        assert kept.tolist() == expected
    assert _documents(text().input) is None


@pytest.mark.parametrize("of", ["model", "layers"])
def test_a_rank_that_has_only_padding_of_a_row_adds_nothing_to_the_loss(of: Of) -> None:
    """Its row counts trained tokens of other ranks."""
    ids, places = torch.zeros(1, 6, dtype=torch.int32), torch.arange(6, dtype=torch.int32)[None]
    row = ModelInput.of(ids, places, Segments((6,), (Role.PADDING,))).to(torch.device("cpu"))
    batch = _labelled(replace(text(), input=row), torch.full((1, 6), -100))
    value, found = ours(packed("qwen3-moe", train=True), batch, of)
    assert value == 0
    assert all(not gradient.any() for gradient in found.values())


def test_a_router_before_which_nothing_learns_counts_in_the_loss_and_stays_as_it_is() -> None:
    logits, chosen = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([[0], [2]])
    balance, given = _Balance("layers"), (logits, torch.ones(2, 1), chosen)
    balance.begin(0.5, None)
    assert balance.hook(0)(torch.nn.Linear(1, 1), None, given) is given
    share = (logits.softmax(-1).mean(0) * torch.tensor([0.5, 0.0, 0.5])).sum()
    assert balance.end().item() == pytest.approx(3 * share.item())


def test_a_pass_in_which_no_router_was_asked_has_no_loss_of_them() -> None:
    balance = _Balance("model")
    balance.begin(0.5, None)
    assert balance.end().item() == 0


def test_an_evaluation_measures_the_loss_alone_and_a_dense_base_is_refused() -> None:
    model, batch, objective = packed("qwen3-moe"), text(), NextTokens()
    loss = balanced(objective.loss, objective.weight, model.model, WEIGHT, "model")
    assert loss(model, batch).equal(objective.loss(model, batch))
    with pytest.raises(ConfigError, match="objective.router_loss"):
        balanced(objective.loss, objective.weight, packed("llama").model, WEIGHT, "model")


def test_a_router_that_returns_no_choice_is_told_before_the_start(tmp_path: Path) -> None:
    """`plan` and every start ask for the mismatches of base and settings; a first step would fail with the same words."""
    base, batch = make_base(tmp_path / "base", "llama4"), text()
    tree = f"run: {{name: a}}\nmodel: {{base: {base}}}\ndata: {{train: [{{path: a.jsonl}}]}}\ntrain: {{steps: 1}}\n"
    asked = parse_config(f"{tree}objective: {{router_loss: 0.1}}\nquant: {{type: none}}\n")
    with pytest.raises(
        ConfigError, match="objective.router_loss: Llama4Router of .* which experts it chose. Remove it"
    ):
        resolve(asked)
    model, objective = packed("llama4", train=True), NextTokens()
    with pytest.raises(ConfigError, match="Llama4Router of this base does not return which experts it chose"):
        balanced(objective.loss, objective.weight, model.model, WEIGHT, "model")(model, batch)
