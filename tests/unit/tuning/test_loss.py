"""The chunked, token-summed loss is cross entropy, in value and gradients, and never holds a whole row of logits."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from trainer.config import ObjectiveSettings
from trainer.model import head as loss_module
from trainer.model.head import IGNORE, Goal, LossHead, LossTerms
from trainer.tuning.objective.distil import Distil
from trainer.tuning.objective.sft import NextTokens, noise_on

T, H, V = 50, 12, 31
TERMS = {
    "plain": LossTerms(),
    "smoothed": LossTerms(label_smoothing=0.2),
    "z-loss": LossTerms(z_loss=0.03),
    "both": LossTerms(0.2, 0.03),
}
with_terms = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
# The factor and the divisor of the products with the head, and the cap.
Logits = tuple[float, float, float | None]
with_logits = pytest.mark.parametrize(
    "logits",
    [(1.0, 1.0, None), (1.0, 1.0, 1.5), (0.3, 1.0, None), (1.0, 0.7, 1.5)],
    ids=["plain", "capped", "multiplied", "divided-and-capped"],
)


def made_by(logits: Logits, head: LossHead) -> LossHead:
    head.factor, head.divisor, head.softcap = logits
    return head


@pytest.fixture(params=[1, 7, T], ids=lambda rows: f"chunks-of-{rows}")
def head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LossHead:
    """A frozen head whose logits are made so many positions at a time."""
    return learning_head(request.param, monkeypatch).requires_grad_(False)


def row(share_of_targets: float = 0.6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, T, H, generator=generator).requires_grad_()
    labels = torch.randint(V, (1, T), generator=generator)
    labels[torch.rand(1, T, generator=generator) >= share_of_targets] = IGNORE
    return hidden, labels


def stock(logits: Tensor, labels: Tensor, terms: LossTerms) -> Tensor:
    """The loss of each target by PyTorch's cross entropy, and the z-loss as PaLM states it: (targets,)."""
    logits, labels = logits[labels != IGNORE], labels[labels != IGNORE]
    smoothing, z_loss = terms
    nats = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    return nats + z_loss * torch.logsumexp(logits, -1) ** 2


@with_terms
@with_logits
def test_value_and_gradient_are_those_of_cross_entropy(head: LossHead, logits: Logits, terms: LossTerms) -> None:
    made_by(logits, head)
    hidden, labels = row()
    reference = stock(head(hidden), labels, terms).sum()
    (expected,) = torch.autograd.grad(reference / 17, hidden)
    value = head(hidden, labels, terms=terms)
    (gradient,) = torch.autograd.grad(value / 17, hidden)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, reference)
    torch.testing.assert_close(gradient, expected)
    assert 10 < int((labels != IGNORE).sum()) < T
    assert not gradient[labels == IGNORE].any()


def test_training_adds_the_terms_that_the_settings_ask_for_and_an_evaluation_has_none(head: LossHead) -> None:
    hidden, labels = row()
    batch: Any = SimpleNamespace(input=None, labels=labels, places=None)
    model: Any = SimpleNamespace(head=head.train(), hidden=lambda _: hidden)
    objective = NextTokens(ObjectiveSettings.model_validate({"label_smoothing": 0.2, "z_loss": 0.03}))
    torch.testing.assert_close(objective.loss(model, batch), stock(head(hidden), labels, TERMS["both"]).sum())
    head.eval()
    torch.testing.assert_close(objective.loss(model, batch), stock(head(hidden), labels, TERMS["plain"]).sum())


def test_dynamic_fine_tuning_weighs_each_target_by_its_probability(head: LossHead) -> None:
    """-sg(p) log p, as the paper and LLaMA-Factory's `use_dft_loss` have it; an evaluation is without the weights."""
    hidden, labels = row()
    batch = SimpleNamespace(input=None, labels=labels, places=None)
    model = SimpleNamespace(head=head.train(), hidden=lambda _: hidden)
    logits = head(hidden)[labels != IGNORE]
    chosen = logits.log_softmax(-1).gather(1, labels[labels != IGNORE][:, None])
    expected = -(chosen.detach().exp() * chosen).sum()
    objective: Any = NextTokens(ObjectiveSettings.model_validate({"dft": True}))
    found = objective.loss(model, batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (found, expected)))
    model.head.eval()
    torch.testing.assert_close(objective.loss(model, batch), stock(head(hidden), labels, LossTerms()).sum())


@pytest.mark.parametrize(("scale", "power", "tokens"), [(3.0, 1.0, 7), (1.0, 0.5, 7), (3.0, 1.0, 1000)])
def test_entropy_adaptive_fine_tuning_weighs_each_target_by_the_entropy_of_the_likeliest_tokens(
    head: LossHead, scale: float, power: float, tokens: int
) -> None:
    """By LLaMA-Factory's `use_eaft_loss`, which divides the entropy by 3, and axolotl's `use_eaft`, which does not."""
    hidden, labels = row()
    batch, model = (
        SimpleNamespace(input=None, labels=labels, places=None),
        SimpleNamespace(head=head.train(), hidden=lambda _: hidden),
    )
    logits = head(hidden)[labels != IGNORE]
    nats = torch.nn.functional.cross_entropy(logits, labels[labels != IGNORE], reduction="none")
    p = logits.detach().topk(min(tokens, logits.shape[1]), -1).values.softmax(-1)
    expected = (nats * (-(p * p.log()).sum(-1) / scale) ** power).sum()
    given = {"eaft": power, "eaft_tokens": tokens, "eaft_scale": scale}
    objective: Any = NextTokens(ObjectiveSettings.model_validate(given))
    found = objective.loss(model, batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (found, expected)))


def test_noise_on_embeddings_is_transformers_for_each_document_and_gone_behind_the_pass() -> None:
    embedding, tokens = torch.nn.Embedding(9, 4), torch.arange(5)[None]
    theirs: Any = embedding
    theirs.neftune_noise_alpha = 5.0

    def noise(*lengths: int, first: int = 0) -> Tensor:
        torch.manual_seed(7)
        row: Any = SimpleNamespace(segments=SimpleNamespace(lengths=lengths), first=first)
        with noise_on(embedding, row, 5.0):
            return embedding(tokens) - embedding.weight[:5]

    alone, packed = noise(5), noise(3, 2)
    assert torch.equal(embedding(tokens)[0], embedding.weight[:5])
    torch.manual_seed(7)
    expected: Any = neftune_post_forward_hook(theirs, (), embedding.weight[None, :5])
    torch.testing.assert_close(alone, expected - embedding.weight[:5])
    longer = [(5 / tokens) ** 0.5 for tokens in (3, 3, 3, 2, 2)]
    torch.testing.assert_close(packed, alone * torch.tensor(longer)[:, None])
    assert torch.equal(noise(3, 5, first=3), alone), "a rank's part of a row has the lengths of its own tokens"


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_training_alone_has_noise_on_its_embeddings(alpha: float) -> None:
    embedding, tokens = torch.nn.Embedding(9, 4), torch.arange(5)[None]
    row: Any = SimpleNamespace(segments=SimpleNamespace(lengths=(5,)), first=0)
    batch: Any = SimpleNamespace(input=row, labels=None, places=None)
    head: Any = lambda hidden, *_, **__: hidden  # noqa: E731
    head.training = True
    model: Any = SimpleNamespace(
        head=head, hidden=lambda _: embedding(tokens), model=SimpleNamespace(get_input_embeddings=lambda: embedding)
    )
    objective = NextTokens(ObjectiveSettings.model_validate({"neftune_alpha": alpha}))
    assert torch.equal(objective.loss(model, batch), embedding(tokens)) is not bool(alpha)
    head.training = False
    assert torch.equal(objective.loss(model, batch), embedding(tokens))


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_student_is_drawn_to_its_teacher_and_evaluated_by_the_data_alone(head: LossHead, divergence: str) -> None:
    """With all tokens stored it is the whole divergence, by PyTorch's function."""
    hidden, labels = row()
    wanted, temperature, share = labels[labels != IGNORE], 2.5, 0.3
    teacher = torch.randn(len(wanted), V, generator=torch.Generator().manual_seed(6)) * 3
    log_t = teacher.div(temperature).log_softmax(-1)
    ids = torch.arange(V).expand(len(wanted), V)
    columns = {
        "teacher_ids": ids.contiguous(),
        "teacher_log_p": torch.nn.functional.pad(log_t, (0, 1), value=-torch.inf),
    }
    batch: Any = SimpleNamespace(input=None, labels=labels, places=None, column=columns.__getitem__)
    model: Any = SimpleNamespace(head=head.train(), hidden=lambda _: hidden)
    given = {"top_k": V, "divergence": divergence, "temperature": temperature, "next_tokens": share}
    objective = Distil(ObjectiveSettings.model_validate({"teacher": "/models/big", **given}))
    logits = head(hidden)[labels != IGNORE]
    log_s = logits.div(temperature).log_softmax(-1)
    sides = (log_s, log_t) if divergence == "forward" else (log_t, log_s)
    apart = torch.nn.functional.kl_div(*sides, reduction="sum", log_target=True) * temperature**2
    nats = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    torch.testing.assert_close(objective.loss(model, batch), (1 - share) * apart + share * nats)
    head.eval()
    torch.testing.assert_close(objective.loss(model, batch), nats)


@with_terms
@with_logits
def test_each_targets_nats_may_weigh_differently(head: LossHead, logits: Logits, terms: LossTerms) -> None:
    made_by(logits, head)
    hidden, labels = row()
    reference = stock(head(hidden), labels, terms)
    weights = torch.linspace(-1, 2, len(reference))
    (expected,) = torch.autograd.grad((weights * reference).sum(), hidden)
    nats = head(hidden, labels, per_target=True, terms=terms)
    (gradient,) = torch.autograd.grad((weights * nats).sum(), hidden)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, reference)
    torch.testing.assert_close(gradient, expected)


@with_logits
@pytest.mark.parametrize("terms", [LossTerms(), LossTerms(0.1, 0.01)], ids=["plain", "smoothed"])
@pytest.mark.parametrize("ids", [[5, 2], [30, 31, 32], [33, 5, 31, 32, 0]], ids=["in-place", "behind", "both"])
def test_rows_that_learn_stand_in_the_place_of_the_heads_own_and_behind_them(
    head: LossHead, ids: list[int], logits: Logits, terms: LossTerms
) -> None:
    made_by(logits, head)
    hidden, labels = row()
    places, vocabulary = torch.tensor(ids), max(V, *(place + 1 for place in ids))
    labels[0, 1], labels[0, 2] = ids[0], ids[1]
    rows, start = torch.nn.Parameter(torch.randn(len(ids), H)), torch.randn(len(ids), H)
    own = torch.nn.functional.pad(head.weight, (0, 0, 0, vocabulary - V))

    def reference(matrix: Tensor) -> Tensor:
        factor, divisor, softcap = logits
        z = hidden[0] @ own.index_copy(0, places, matrix).T * factor / divisor
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        wanted = labels[0] != IGNORE
        z, (smoothing, z_loss) = z[wanted], terms
        nats = torch.nn.functional.cross_entropy(z, labels[0][wanted], reduction="none", label_smoothing=smoothing)
        return nats + z_loss * z.logsumexp(-1).square()

    head.learn(places, rows, start)
    weights = torch.linspace(-1, 2, int((labels != IGNORE).sum()))
    expected = torch.autograd.grad((weights * reference(rows)).sum(), (hidden, rows))
    nats = head(hidden, labels, per_target=True, terms=terms)
    torch.testing.assert_close(nats, reference(rows))
    torch.testing.assert_close(torch.autograd.grad((weights * nats).sum(), (hidden, rows)), expected)
    assert head(hidden).shape == (1, T, vocabulary)
    head.active = False
    torch.testing.assert_close(head(hidden, labels, per_target=True, terms=terms), reference(start))


def test_a_row_without_targets_has_no_loss_and_no_gradient(head: LossHead) -> None:
    hidden, labels = row(share_of_targets=0)
    value = head(hidden, labels)
    assert float(value.detach()) == 0
    value.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_bf16_is_summed_in_fp32(head: LossHead) -> None:
    hidden, labels = row()
    exact = float(head(hidden, labels).detach())
    half = head.bfloat16()(hidden.detach().bfloat16(), labels)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(exact, rel=5e-3)


@with_terms
def test_logits_of_one_block_only_are_in_fp32_at_a_time(
    head: LossHead, monkeypatch: pytest.MonkeyPatch, terms: LossTerms
) -> None:
    sizes: list[int] = []
    plain = Tensor.logsumexp

    def observed(logits: Tensor, *arguments: object, **options: object) -> Tensor:
        sizes.append(logits.numel() * 4)
        return plain(logits, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Tensor, "logsumexp", observed)
    hidden, labels = row()
    head(hidden, labels, terms=terms)
    assert max(sizes) <= min(loss_module._BLOCK_BYTES, loss_module._CHUNK_BYTES)
    assert sum(sizes) == int((labels != IGNORE).sum()) * V * 4


@with_terms
@with_logits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_a_block_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, logits: Logits, terms: LossTerms
) -> None:
    head = made_by(logits, learning_head(T, monkeypatch)).to(dtype)
    hidden, labels = row()
    hidden = hidden.detach().to(dtype).requires_grad_()
    found: list[list[Tensor]] = []
    for rows in (1, 3, T):
        monkeypatch.setattr(loss_module, "_BLOCK_BYTES", rows * 4 * V)
        nats = head(hidden, labels, per_target=True, terms=terms)
        weights = torch.linspace(-1, 2, len(nats))
        ranked = head(hidden.detach(), labels, ranked=True, terms=terms)
        found.append([nats.detach(), ranked, *torch.autograd.grad((weights * nats).sum(), (hidden, head.weight))])
        head.requires_grad_(False)
        found[-1] += torch.autograd.grad(head(hidden, labels, terms=terms) / 17, hidden)
        head.requires_grad_(True)
    assert all(torch.equal(one, other) for of in found[1:] for one, other in zip(found[0], of, strict=True))


def test_without_gradients_the_value_is_the_same(head: LossHead) -> None:
    hidden, labels = row()
    with torch.no_grad():
        evaluated = head(hidden, labels)
    assert torch.equal(evaluated, head(hidden, labels).detach())


@pytest.mark.parametrize("terms", [terms for name, terms in TERMS.items() if name != "plain"])
def test_the_checks_would_see_a_term_that_is_left_out(head: LossHead, terms: LossTerms) -> None:
    hidden, labels = row()
    found = [torch.autograd.grad(head(hidden, labels, terms=given), hidden)[0] for given in (terms, LossTerms())]
    assert float((found[0] - found[1]).norm() / found[1].norm()) > 0.05


def learning_head(rows: int, monkeypatch: pytest.MonkeyPatch) -> LossHead:
    monkeypatch.setattr(loss_module, "_CHUNK_BYTES", rows * 4 * V)
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", 1)
    monkeypatch.setattr(loss_module, "_BLOCK_BYTES", 3 * 4 * V)
    torch.manual_seed(2)
    return LossHead(H, V, bias=False)


@with_terms
@pytest.mark.parametrize("rows", [1, 7, T])
@with_logits
def test_a_head_that_learns_has_the_gradients_of_cross_entropy(
    rows: int, logits: Logits, terms: LossTerms, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = learning_head(rows, monkeypatch)
    made_by(logits, head)
    hidden, labels = row()
    reference = stock(head(hidden), labels, terms).sum()
    expected = torch.autograd.grad(reference / 17, (hidden, head.weight))
    value = head(hidden, labels, terms=terms)
    torch.testing.assert_close(value, reference)
    for gradient, other in zip(torch.autograd.grad(value / 17, (hidden, head.weight)), expected, strict=True):
        torch.testing.assert_close(gradient, other)
    head.requires_grad_(False)  # the control: a head that is taken for a frozen one would learn nothing
    with pytest.raises(RuntimeError, match="appears to not have been used|does not require grad"):
        torch.autograd.grad(head(hidden, labels), head.weight)


@with_terms
def test_an_embedding_that_is_the_head_too_has_the_sum_of_both_gradients(
    monkeypatch: pytest.MonkeyPatch, terms: LossTerms
) -> None:
    head, (_, labels) = learning_head(7, monkeypatch), row()
    tokens = torch.arange(T)[None] % V

    def gradient(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = torch.nn.functional.embedding(tokens, head.weight).tanh()
        return torch.autograd.grad(loss_of(hidden), head.weight)[0]

    expected = gradient(lambda hidden: stock(head(hidden), labels, terms).sum())
    torch.testing.assert_close(gradient(lambda hidden: head(hidden, labels, terms=terms)), expected)
    half = gradient(
        lambda hidden: loss_module._FrozenCrossEntropy.apply(  # type: ignore[arg-type,return-value]
            hidden[labels != IGNORE], head.weight, None, Goal(labels[labels != IGNORE], terms), head, None, None, True
        ).sum()
    )
    assert float((half - expected).norm() / expected.norm()) > 0.1, "the control: without the head's part"


def test_the_gradient_of_a_bf16_head_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of one target it is as good as in one chunk; summed in bf16 it would lose what each target adds."""
    exact = learning_head(T, monkeypatch)
    hidden, labels = (value.repeat(1, 20, 1) if value.ndim == 3 else value.repeat(1, 20) for value in row())
    hidden = hidden.detach()
    (expected,) = torch.autograd.grad(exact(hidden, labels), exact.weight)

    def error(rows: int) -> float:
        head = learning_head(rows, monkeypatch).bfloat16()
        (gradient,) = torch.autograd.grad(head(hidden.bfloat16(), labels), head.weight)
        assert gradient.dtype == torch.bfloat16
        return float((gradient.float() - expected).norm() / expected.norm())

    assert error(1) < 1.5 * error(20 * T) < 0.02


def test_an_evaluation_of_a_head_that_learns_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head, (hidden, labels) = learning_head(7, monkeypatch), row()
    with torch.no_grad():
        evaluated = head(hidden, labels)
    assert evaluated.grad_fn is None
    assert torch.equal(evaluated, head(hidden, labels).detach())
    empty = head(*row(share_of_targets=0))
    empty.backward()
    assert head.weight.grad is not None
    assert (float(empty.detach()), head.weight.grad.any().item()) == (0, False)


@pytest.mark.parametrize("learns", [False, True])
def test_a_bias_of_the_head_is_in_logits_loss_and_gradients(learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = learning_head(7, monkeypatch)
    head = LossHead(plain.in_features, plain.out_features)
    head.weight = torch.nn.Parameter(plain.weight.detach().clone())
    torch.nn.init.normal_(head.bias, generator=torch.Generator().manual_seed(1))
    head.requires_grad_(learns)
    hidden, labels = row()
    expected = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, head.weight, head.bias)[labels != IGNORE],
        labels[labels != IGNORE],
        reduction="sum",
    )
    of = [hidden, head.weight, head.bias] if learns else [hidden]
    wanted, found = torch.autograd.grad(expected, of), torch.autograd.grad(head(hidden, labels), of)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(hidden), torch.nn.functional.linear(hidden, head.weight, head.bias))


def test_a_row_that_learns_keeps_its_bias_and_one_behind_the_heads_last_has_none() -> None:
    torch.manual_seed(0)
    head, ids = LossHead(4, 7, bias=True), torch.tensor([2, 7])
    tokens, hidden = torch.nn.Parameter(torch.randn(2, 4)), torch.randn(3, 4)
    head.learn(ids, tokens, tokens.detach())
    weight, bias = torch.zeros(8, 4), torch.zeros(8)
    weight[:7], bias[:7] = head.weight.detach(), head.bias.detach()
    weight[ids] = tokens.detach()
    torch.testing.assert_close(head(hidden), torch.nn.functional.linear(hidden, weight, bias))
