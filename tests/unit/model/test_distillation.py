"""The loss by a stored teacher is the divergence from it, in value and gradients, within the head's chunks."""

import math

import pytest
import torch
from torch import Tensor

from trainer.model import head as head_module
from trainer.model.divergence import Distillation, Divergence, Taught, TopK, likeliest
from trainer.model.head import IGNORE, LossHead
from trainer.model.micro_batch import ColumnValues, MicroBatch, ModelInput, Segments

T, H, V = 24, 8, 40
reversed_or_not = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def made_head(learns: bool, monkeypatch: pytest.MonkeyPatch) -> LossHead:
    monkeypatch.setattr(head_module, "_CHUNK_BYTES", 4 * V * 7)
    monkeypatch.setattr(head_module, "_CHUNK_ROWS", 7)
    torch.manual_seed(5)
    head = LossHead(H, V, bias=False)
    torch.nn.init.normal_(head.weight)
    return head.requires_grad_(learns)


def row() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, labels with some that are no targets, and a teacher's logits of the targets."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(1, T, H, generator=generator).requires_grad_()
    labels = torch.randint(V, (1, T), generator=generator)
    labels[torch.rand(1, T, generator=generator) > 0.7] = IGNORE
    return hidden, labels, torch.randn(int((labels != IGNORE).sum()), V, generator=generator) * 3


def whole(logits: Tensor, teacher: Tensor, labels: Tensor, given: Distillation) -> Tensor:
    """The full divergence by PyTorch's own functions, summed over the targets."""
    log_s, log_t = (values.div(given.temperature).log_softmax(-1) for values in (logits, teacher))
    sides = (log_t, log_s) if given.reverse else (log_s, log_t)
    divergence = torch.nn.functional.kl_div(*sides, reduction="sum", log_target=True) * given.temperature**2
    nats = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return (1 - given.next_tokens) * divergence + given.next_tokens * nats


@pytest.mark.parametrize("learns", [False, True], ids=["frozen-head", "learning-head"])
@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.0), (2.5, 0.3)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@reversed_or_not
def test_the_whole_vocabulary_gives_the_full_divergence(
    reverse: bool,
    softcap: float | None,
    temperature: float,
    share: float,
    learns: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = made_head(learns, monkeypatch)
    head.softcap = softcap
    hidden, labels, teacher = row()
    given = Distillation(likeliest(teacher, TopK(V, V, temperature)), reverse, temperature, share)
    inputs = [hidden, head.weight] if learns else [hidden]
    expected = whole(head(hidden)[labels != IGNORE], teacher, labels[labels != IGNORE], given)
    found = head(hidden, labels, distillation=given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True)
    for mine, theirs in gradients:
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


@reversed_or_not
def test_the_tail_is_one_outcome(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By autograd through k + 1 probabilities, which are added up outside of the head."""
    head, (hidden, labels, teacher) = made_head(False, monkeypatch), row()
    taught = likeliest(teacher, TopK(6, V))
    logits = head(hidden)[labels != IGNORE]
    s, t = logits.softmax(-1), teacher.softmax(-1)

    def outcomes(p: Tensor) -> Tensor:
        known = p.gather(-1, taught.ids)
        return torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1)

    first, second = (outcomes(s), outcomes(t)) if reverse else (outcomes(t), outcomes(s))
    expected = (first * (first.log() - second.log())).sum()
    found = head(hidden, labels, distillation=Distillation(taught, reverse))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    mine, theirs = (torch.autograd.grad(value, hidden)[0] for value in (found, expected))
    assert float((mine - theirs).norm() / theirs.norm()) < 1e-4


@reversed_or_not
def test_tokens_that_the_student_rules_out_have_no_gradient(reverse: bool) -> None:
    """Nor has the tail that they are together."""
    logits, t = torch.tensor([[1.0, 0.0, float("-inf"), float("-inf")]]), torch.tensor([[0.5, 0.3, 0.2]])
    s, taught = logits.softmax(-1)[:, :2], Taught(torch.tensor([[0, 1]]), t.log())
    differences = (s / t[:, :2]).log()
    known = s * (differences - (s * differences).sum()) if reverse else s - t[:, :2]
    found = Divergence(logits, Distillation(taught, reverse)).gradient()
    torch.testing.assert_close(found, torch.cat([known, torch.zeros(1, 2)], 1))


def test_a_teacher_that_leaves_nothing_for_the_tail_gives_no_infinite_divergence() -> None:
    """As 16 bits round it; e**-40 stands for nothing."""
    logits, t = torch.tensor([[1.0, 0.0, -1.0, -2.0]]), torch.tensor([[0.6, 0.4, 0.0]])
    s = logits.softmax(-1)[0].tolist()
    tail = s[2] + s[3]
    expected = s[0] * math.log(s[0] / 0.6) + s[1] * math.log(s[1] / 0.4) + tail * (math.log(tail) + 40)
    found = Divergence(logits, Distillation(Taught(torch.tensor([[0, 1]]), t.log()), reverse=True))
    assert float(found.nats()) == pytest.approx(expected, rel=1e-5)
    assert found.gradient().isfinite().all()


def test_the_stored_64_point_where_the_full_divergence_does() -> None:
    """A vocabulary of a few likely tokens and a long tail: without the tail's term the gradient points elsewhere."""
    torch.manual_seed(0)
    teacher = (torch.randn(128, 4096) * 4).log_softmax(-1)
    logits = (teacher * 0.8 + torch.randn(128, 4096)).requires_grad_()
    full = logits.softmax(-1) - teacher.exp()

    def cosine(taught: Taught) -> float:
        found = Divergence(logits.detach(), Distillation(taught)).gradient()
        return float(torch.nn.functional.cosine_similarity(found.flatten(), full.detach().flatten(), dim=0))

    by_64 = likeliest(teacher, TopK(64, 4096))
    cut = Taught(by_64.ids, by_64.log_p - by_64.log_p[:, :-1].logsumexp(-1, keepdim=True))
    without_tail = Taught(
        cut.ids, torch.cat([cut.log_p[:, :-1], torch.full_like(cut.log_p[:, -1:], float("-inf"))], -1)
    )
    print(
        f"cosine to the full divergence's gradient at k = 64: {cosine(by_64):.5f}, renormalised"
        f" {cosine(without_tail):.5f}"
    )
    assert cosine(by_64) > 0.9995 > cosine(without_tail)


def test_a_head_names_the_likeliest_of_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    head, (hidden, labels, _) = made_head(False, monkeypatch), row()
    places = labels[0] != IGNORE
    found = head(hidden, labels, top=TopK(5, V - 3, temperature=2.0))
    log_p = (head(hidden)[0, places, : V - 3] / 2).log_softmax(-1)
    values, ids = log_p.topk(5, -1)
    assert torch.equal(found[:, :5].long(), ids)
    torch.testing.assert_close(found[:, 5:10], values)
    torch.testing.assert_close(found[:, 5:].exp().sum(-1), torch.ones(len(values)))
    assert head(hidden, labels[:, :0].expand(1, 0), labels[0, :0], top=TopK(5, V)).shape == (0, 11)


def test_ranks_that_share_a_row_have_the_teachers_word_on_their_own_targets() -> None:
    labels = torch.tensor([[5, IGNORE, 6, 7, IGNORE, 8]], dtype=torch.int32)
    columns = {"teacher_ids": ColumnValues("target", torch.arange(4)[:, None])}
    row = MicroBatch(ModelInput.of(labels, labels, Segments.of_documents([6])), labels, 6, 4, (), (0,), columns)
    slices = [row.cut(part, 2).column("teacher_ids") for part in range(2)]
    assert [part.flatten().tolist() for part in slices] == [[0, 1], [2, 3]]
