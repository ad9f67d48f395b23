"""Losses of a head over a packed row are torch's over each text, and its measures are scikit-learn's."""

import json
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load, save
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import Model as Settings
from trainer.config import parse_config
from trainer.config.objective import HEADS
from trainer.model.head import IGNORE
from trainer.model.micro_batch import MicroBatch, ModelInput, Role, Segments
from trainer.tuning.head import WithHead
from trainer.tuning.linear_adapters import LABELS as NAMES
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS
from trainer.tuning.method import ExportedFiles
from trainer.tuning.objective import Objective, measured, reward, sums_of
from trainer.tuning.objective.classification import Classification, Several, _of_texts, _of_words
from trainer.tuning.objective.reward import last_places

WIDTH, LABELS = 6, ("good", "so-so", "bad", "unseen")


def row(lengths: list[int], numbers: list[list[int]], roles: tuple[Role, ...] | None = None) -> MicroBatch:
    """Segments of these lengths, whose last labels are `numbers`, and two tokens of padding."""
    labels = list[int]()
    for length, told in zip(lengths, numbers, strict=True):
        labels += [*[IGNORE] * (length - 1 - len(told)), *told, IGNORE]
    segments = Segments((*lengths, 2), (*(roles or [Role.DOCUMENT] * len(lengths)), Role.PADDING))
    zeros = torch.zeros(1, len(labels) + 2, dtype=torch.int32)
    given = torch.tensor([[*labels, IGNORE, IGNORE]])
    documents = tuple(range(len(lengths)))
    targets = sum(map(len, numbers))
    return MicroBatch(ModelInput.of(zeros, zeros, segments), given, len(labels), targets, documents=documents)


class Model:
    """The hidden states of a whole row, of which each rank gets its slice, and a head."""

    def __init__(self, tokens: int) -> None:
        torch.manual_seed(4)
        self.states = torch.randn(1, tokens, WIDTH)
        self.head = nn.Linear(WIDTH, len(LABELS))
        self.head.bias.data[-1] = -50  # nothing is of the last class
        self.model = nn.ModuleDict({"score": self.head})
        self.others = list[Tensor]()

    def hidden(self, given: ModelInput) -> Tensor:
        return self.states[:, given.first : given.first + given.input_ids.shape[1]]

    def total(self, mine: Tensor, given: ModelInput) -> Tensor:
        return torch.stack([mine, *self.others]).sum(0)


def figures(objective: Objective, model: Model, batch: MicroBatch) -> tuple[Tensor, dict[str, float]]:
    """The loss, and the measures. It is the same for two ranks that share the row, of which one counts."""
    sums: Tensor = objective.loss(model, batch)  # type: ignore[arg-type]
    parts = [batch.cut(rank, 2) for rank in range(2)]
    assert len(sums) == 1 + sums_of(objective)
    model.others = []
    seen = [model_outputs(objective, model, part) for part in parts]
    halves = list[Tensor]()
    for rank, part in enumerate(parts):
        model.others = [seen[1 - rank]]
        halves.append(objective.loss(model, part))  # type: ignore[arg-type]
    model.others = []
    torch.testing.assert_close(halves[0], sums)
    assert not halves[1].any()
    of_both = [torch.autograd.grad(half[0], model.head.weight, retain_graph=True)[0] for half in halves]
    torch.testing.assert_close(of_both[0] + of_both[1], torch.autograd.grad(sums[0], model.head.weight)[0])
    return sums[0].detach(), measured(objective, (sums[1:] / objective.weight(batch)).tolist())


def model_outputs(objective: Any, model: Model, part: MicroBatch) -> Tensor:
    """The outputs of one of two ranks: 0 for places that the other has."""
    found = list[Tensor]()
    model.total = lambda mine, given: found.append(mine) or mine  # type: ignore[method-assign]
    objective.loss(model, part)
    del model.total
    return found[0].detach()


def test_a_text_has_any_number_of_classes() -> None:
    lengths = [9, 6, 7]
    model = Model(sum(lengths) + 2)
    ends = torch.tensor(lengths).cumsum(0) - len(LABELS) - 1  # the flags stand behind the text
    logits = model.head(model.states[0, ends])
    taken = (logits > 0).long()
    there = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], taken[2].tolist()])
    batch = row(lengths, there.tolist())
    loss, found = figures(Several(LABELS), model, batch)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, there.float(), reduction="sum"))
    assert Several(LABELS).weight(batch) == 3 * len(LABELS)
    assert found == pytest.approx(
        {
            "accuracy": accuracy_score(there, taken),
            "micro_f1": f1_score(there, taken, average="micro"),
            "macro_f1": f1_score(there[:, :3], taken[:, :3], average="macro"),
        }
    )
    assert 0 < found["accuracy"] < 1
    assert len({*found.values()}) == 3
    assert Several(LABELS).identity == {"name": "multilabel_classification", "labels": [*LABELS]}


def test_a_text_has_one_class() -> None:
    lengths, classes = [5, 3, 6, 4, 4], [0, 1, 2, 1, 0]
    batch, model = row(lengths, [[number] for number in classes]), Model(sum(lengths) + 2)
    logits = model.head(model.states[0, torch.tensor(lengths).cumsum(0) - 2])
    objective = Classification("classification", LABELS, ("classified",), "texts", _of_texts)
    loss, found = figures(objective, model, batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor(classes), reduction="sum"))
    taken = logits.argmax(-1)
    assert found == pytest.approx(
        {"accuracy": accuracy_score(classes, taken), "macro_f1": f1_score(classes, taken, average="macro")}
    )
    assert 0 < found["accuracy"] < 1
    assert objective.identity == {"name": "classification", "labels": [*LABELS]}


def test_a_word_has_the_class_at_its_first_token_of_a_text_whose_numbers_no_model_reads() -> None:
    texts = [5, 4]
    tags = [[2, IGNORE, 0], [IGNORE, 1]]  # of the second to the last but one, and of the third token
    roles = (Role.DOCUMENT, Role.MISMATCHED) * 2
    labels = [[], tags[0], [], tags[1]]
    batch = row([5, 5, 4, 4], labels, roles)
    read, given = Model(sum(texts)), dict[str, Any]()

    def hidden(rows: ModelInput) -> Tensor:
        given["lengths"] = rows.segments.lengths
        return read.states

    model: Any = SimpleNamespace(hidden=hidden, model=read.model, total=lambda mine, given: mine)
    objective = Classification("token_classification", LABELS, ("tagged",), "words", _of_words)
    logits = objective.outputs(model, batch)
    assert given["lengths"] == (5, 4)
    # The label at a place is the number of the token behind it.
    torch.testing.assert_close(logits, read.head(read.states[0, [2, 4, 5 + 3]]))


@pytest.mark.parametrize(("padding", "places"), [(None, [3, 6, 8]), (0, [1, 6, 8]), (7, [3, 5, 8])])
def test_a_reward_is_read_at_the_last_token_that_is_no_padding(padding: int | None, places: list[int]) -> None:
    ids = [5, 6, 0, 0, 8, 9, 7, 3, 4]
    segments = Segments.of_documents([4, 3, 2])
    zeros = torch.zeros(1, 9, dtype=torch.int32)
    given = ModelInput.of(torch.tensor([ids], dtype=torch.int32), zeros, segments)
    assert last_places(MicroBatch(given, torch.full((1, 9), IGNORE), 9, 0), padding).tolist() == places


def test_a_rewards_loss_is_the_papers_formula_at_the_last_tokens_that_are_not_padding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rewards are the numbers of the tokens that they are read at."""
    monkeypatch.setattr(reward, "head_of", lambda method: SimpleNamespace(padding=0))
    monkeypatch.setattr(reward, "outputs", lambda model, batch, places: places[:, None].float())
    text = "run: {name: a}\nmodel: {base: /m}\ntrain: {steps: 1}\ndata: {train: [{path: a}], format: preference}\n"
    config = parse_config(f"{text}objective: {{name: reward, margin: 0.5, center_rewards: 0.01}}")
    ids = torch.tensor([[5, 6, 0, 7, 8, 9]])
    segments = Segments((3, 3), (Role.DOCUMENT, Role.REJECTED))
    row = MicroBatch(ModelInput.of(ids, ids, segments), ids, 6, 6)
    chosen, rejected = 1, 5
    expected = math.log(1 + math.exp(-(chosen - rejected - 0.5))) + 0.01 * (chosen + rejected) ** 2
    for given in (row, row.cut(0, 2)):  # ranks that share a row read it at the same places
        sums = reward.Reward(config.objective, cast(Any, None)).loss(cast(Any, None), given)
        assert float(sums[0]) == pytest.approx(expected)


def test_a_class_that_is_predicted_and_is_no_ones_counts_in_macro_f1() -> None:
    """Of three classes the last one is neither predicted nor there, as in scikit-learn."""
    made = Classification("classification", ["a", "b", "c"], (), "texts", cast(Any, None))
    right, predicted, labelled = [0.5, 0.0, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]
    assert made.summary([*right, *predicted, *labelled]) == pytest.approx([0.5, (2 / 3 + 0) / 2])


@pytest.mark.parametrize(
    ("objective", "labels", "outputs", "biased"),
    [("classification", LABELS, 4, False), ("token_classification", LABELS, 4, True), ("reward", (), 1, False)],
)
def test_a_head_begins_small_as_that_of_its_class_in_transformers(
    objective: str, labels: tuple[str, ...], outputs: int, biased: bool
) -> None:
    plain: Any = SimpleNamespace(attach=lambda *_: None, groups=lambda *_: ["theirs"])
    method = WithHead(plain, HEADS[objective], objective, labels, Settings(base="b"))
    hidden, heads = 400, list[Any]()
    architecture: Any = SimpleNamespace(hidden=hidden)
    bias = {"score.bias": (outputs,)} if biased else {}
    assert method.own(architecture) == {"score.weight": (outputs, hidden), **bias}
    for deviation, seed in ((0.05, 3), (0.05, 3), (0.05, 4), (None, 3)):
        model: Any = nn.Sequential(nn.Linear(1, 1))
        text = SimpleNamespace() if deviation is None else SimpleNamespace(initializer_range=deviation)
        model.config = SimpleNamespace(get_text_config=lambda text=text: text)
        torch.manual_seed(len(heads))  # of no influence
        method.attach(model, architecture, torch.bfloat16, seed)
        heads.append(model.score)
        assert {name: tuple(part.shape) for name, part in model.score.named_parameters(prefix="score")} == (
            method.own(architecture)
        )
        assert model.score.weight.dtype == torch.bfloat16
        assert float(model.score.weight.detach().float().std()) == pytest.approx(deviation or 0.02, rel=0.15)
        assert not biased or not model.score.bias.any()
        theirs, own = method.groups(model, cast(Any, None))
        assert theirs == "theirs"
        assert (own["name"], own["lr_ratio"], own["params"]) == ("head", 1.0, list(model.score.parameters()))
    first, again, other, _ = (head.weight for head in heads)
    assert torch.equal(first, again), "the same on every rank"
    assert not torch.equal(first, other)


def test_a_head_is_exported_with_the_names_of_its_outputs_and_the_settings_last() -> None:
    plain: Any = None
    files = {PEFT_WEIGHTS: save({"a": torch.zeros(1)}), PEFT_SETTINGS: b'{"task_type": "CAUSAL_LM"}'}
    for objective, labels in (("classification", ("gut", "größer")), ("reward", ())):
        method = WithHead(plain, HEADS[objective], objective, labels, Settings(base="b"))
        weight = torch.ones(method.outputs, 3)
        found = method.added_to(ExportedFiles("peft", "An adapter", files), {"score.weight": weight}, plain)
        assert list(found.files)[-1] == PEFT_SETTINGS, "nothing loads without them"
        settings = json.loads(found.files[PEFT_SETTINGS])
        assert settings == {"task_type": HEADS[objective].task, "modules_to_save": ["score"]}
        names = found.files.get(NAMES)
        assert names == ('{\n  "0": "gut",\n  "1": "größer"\n}'.encode() if labels else None)
        assert load(found.files[PEFT_WEIGHTS]).keys() == {"a", "base_model.model.score.weight"}
