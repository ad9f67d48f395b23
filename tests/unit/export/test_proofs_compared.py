"""Which models each proof compares, and what it takes for allowed and for the effect of the training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor

from trainer.data.dataset.dataset import TARGET_BIT
from trainer.export.proof import plain, rows, verify
from trainer.export.proof.rows import Distance, Probe, ProbeRow, _tags, as_shares, distance, judged
from trainer.store.store import Store

ROWS = [ProbeRow(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0, 1]), torch.tensor([2, 0]))]
NOWHERE = Store("memory://export", None)


def logits(seed: int) -> list[Tensor]:
    return [torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))]


TRAINED, BEGUN, FOUND, BESIDE, ALONE, MERGED = (logits(seed) for seed in range(6))
ALLOWED, EFFECT = Distance(0.1, 0.2), Distance(0.3, 0.4)


class _Checkpoint:
    """A checkpoint whose sides predict what `given` says."""

    def __init__(self, given: dict[str, Any], **method: Any) -> None:
        self.given, self.checked, self.asked = given, list[str](), list[tuple[str, dict[str, Any]]]()
        usual = {"exports_model": False, "through": False, "adapts_4_bits": True}
        self.method = SimpleNamespace(**{**usual, **method})
        self.computed_in, self.probe = "bf16", Probe(ROWS, "1 row")
        self.config = SimpleNamespace(quant=SimpleNamespace(held=SimpleNamespace(in_linear4bit=True)))
        self.head, self.base = None, None

    def check_texts(self, destination: Store) -> None:
        self.checked.append(destination.uri)

    def predictions(self, *, learnt: bool = True) -> list[Tensor]:
        return TRAINED if learnt else BEGUN

    def exported(self, work: Callable[..., Any], *_: Any, **how: Any) -> Any:
        self.asked.append((work.__name__, how))
        return self.given[work.__name__]


def proven(monkeypatch: pytest.MonkeyPatch, prove: Callable[..., Any], given: Any, **method: Any) -> Any:
    trained = _Checkpoint(given, **method)
    monkeypatch.setattr(verify.Trained, "at", lambda folder, step: trained)
    proof = prove(NOWHERE, 4, NOWHERE)
    assert trained.checked == [NOWHERE.uri]
    assert proof.rows == "1 row"
    return proof, trained.asked


def figures(proof: Any) -> list[tuple[float, float]]:
    """How far it is, what is allowed, and the effect, each as (KL, difference of log-probabilities)."""
    return [
        (proof.kl, proof.log_prob),
        (proof.kl_allowed, proof.log_prob_allowed),
        (proof.kl_effect, proof.log_prob_effect),
    ]


def test_an_adapter_is_compared_with_the_trained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    proof, asked = proven(monkeypatch, verify.prove_adapter, {"_adapter_side": (FOUND, ALLOWED, EFFECT)})
    assert figures(proof) == [distance(TRAINED, FOUND, ROWS), ALLOWED, EFFECT]
    assert (proof.computed_in, asked) == ("bf16", [("_adapter_side", {"packed": True})])


def test_a_tuned_model_is_compared_with_the_trained_one_and_its_effect_is_from_its_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for prove in (verify.prove_adapter, verify.prove_merged):
        given = {"_model_side": (FOUND, ALLOWED), "_base_side": ALONE}
        proof, _ = proven(monkeypatch, prove, given, exports_model=True)
        assert figures(proof) == [distance(TRAINED, FOUND, ROWS), ALLOWED, distance(FOUND, ALONE, ROWS)]


def test_a_merge_is_compared_with_pefts_own_and_told_how_far_it_is_from_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"_merging_side": (BESIDE, ALONE, MERGED, ALLOWED), "merged_side": FOUND}
    proof, _ = proven(monkeypatch, verify.prove_merged, given)
    assert figures(proof) == [distance(MERGED, FOUND, ROWS), ALLOWED, distance(FOUND, ALONE, ROWS)]
    assert proof.trained_kl == distance(TRAINED, FOUND, ROWS).kl
    assert proof.rounding_kl == distance(BESIDE, FOUND, ROWS).kl
    assert proof.computed_in == "fp32"


def test_fewer_bits_are_compared_with_the_trained_model_and_may_be_half_of_what_it_learnt_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proof, asked = proven(monkeypatch, verify.prove_recoded, {"_recoded_side": FOUND})
    effect = distance(TRAINED, BEGUN, ROWS)
    assert figures(proof) == [distance(TRAINED, FOUND, ROWS), (effect.kl / 2, effect.log_prob / 2), effect]
    assert asked == [("_recoded_side", {"packed": False, "recoded": True})]


@pytest.mark.parametrize("exports_model", [False, True])
def test_a_server_is_compared_by_the_tokens_of_the_rows_and_by_those_that_it_drew(
    monkeypatch: pytest.MonkeyPatch, exports_model: bool
) -> None:
    answer = SimpleNamespace(log_p=[-1.0, -2.0], drawn=[3, 1], drawn_log_p=[-0.5, -0.25])
    server = SimpleNamespace(url="http://here", model="one", ask=lambda prompt, count: answer)
    expected = torch.tensor([-1.1, -2.0, -0.5, -0.75])
    alike = torch.tensor([*answer.log_p, *answer.drawn_log_p])
    two = [expected, alike]
    sides = [two, [one + 0.01 for one in two], [one + 1.0 for one in two], []]
    trained = _Checkpoint({"_side": sides}, exports_model=exports_model)
    trained.probe = Probe(ROWS * 2, "2 rows")
    trained.sees, trained.vocabulary = False, 4  # type: ignore[attr-defined]
    trained.config.run = SimpleNamespace(name="a")
    trained.base = SimpleNamespace(architecture=SimpleNamespace(reads_prompts=False))  # type: ignore[assignment]
    monkeypatch.setattr(verify.Trained, "at", lambda folder, step: trained)
    monkeypatch.setattr(verify, "refuse_head", lambda _: None)
    monkeypatch.setattr(verify.CompletionsServer, "find", lambda *_: server)
    monkeypatch.setattr(verify, "_places", lambda prompt: [0, 1])
    monkeypatch.setattr(verify, "_whole", lambda *_: ROWS[0])
    given = list[Any]()
    plain = trained.exported
    monkeypatch.setattr(trained, "exported", lambda work, *of, **how: (given.append(of[0]), plain(work, *of, **how))[1])
    proof = verify.prove_served(NOWHERE, 4, NOWHERE, "http://here", whole_model=False)
    assert given == [NOWHERE.uri if exports_model else None]
    assert (proof.prompt, proof.drawn, proof.largest) == pytest.approx((0.025, 0.125, 0.5))
    assert (proof.allowed, proof.effect, proof.from_blind) == pytest.approx((0.03, 1.0, None))
    assert proof.from_base == pytest.approx((0.9 + 1.0 + 1.0 + 0.5 + 4 * 1.0) / 8)
    assert (proof.tokens, proof.draws) == (4, 4)
    trained.vocabulary = 3  # type: ignore[attr-defined]
    with pytest.raises(verify.ConfigError, match="draws tokens that the export lacks"):
        verify.prove_served(NOWHERE, 4, NOWHERE, "http://here", whole_model=False)


def test_a_head_is_compared_by_all_of_its_outputs_or_by_the_class_that_is_trained() -> None:
    row = ProbeRow(torch.zeros(1, 9, dtype=torch.int64), torch.tensor([4, 8]), torch.tensor([2, 1]))
    probe = Probe([row], "1 row")

    def by(several: bool, outputs: int) -> ProbeRow:
        head: Any = SimpleNamespace(head=SimpleNamespace(several=several), outputs=outputs)
        return judged(probe, head).rows[0]

    assert judged(probe, None) is probe
    assert by(several=False, outputs=3) is row
    reward, several = by(several=False, outputs=1), by(several=True, outputs=3)
    assert (reward.places.tolist(), reward.targets.tolist()) == ([4, 8], [0, 0])
    assert (several.places.tolist(), several.targets.tolist()) == ([4], [0])
    outputs = torch.tensor([[1.0], [-2.0]])
    assert torch.equal(as_shares(outputs, row), outputs)
    shares = as_shares(outputs, reward).softmax(-1)
    assert torch.allclose(shares[:, :1], torch.sigmoid(outputs))


@pytest.mark.parametrize("per_token", [False, True])
def test_a_head_is_asked_for_each_place_with_nothing_behind_it_or_for_all_at_once(per_token: bool) -> None:
    asked = list[tuple[int, int, int]]()

    class Judges(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: Tensor, token_type_ids: Tensor, pixel_values: Tensor) -> Any:
            asked.append((input_ids.shape[1], token_type_ids.shape[1], len(pixel_values)))
            outputs = input_ids.float()[..., None].bfloat16()
            return SimpleNamespace(logits=outputs if per_token else outputs[:, -1])

    tokens = torch.arange(10, 16)[None]
    pictures = {"token_type_ids": torch.zeros_like(tokens), "pixel_values": torch.ones(9, 2)}
    row = ProbeRow(tokens, torch.tensor([1, 4]), torch.tensor([0, 0]), beside_zero=True, pictures=pictures)
    (found,) = plain.head_logits(Judges(), [row])
    assert found.tolist() == [[11.0, 0.0], [14.0, 0.0]]
    assert found.dtype == torch.float32
    assert asked == [(6, 6, 9)] + ([] if per_token else [(2, 2, 9), (5, 5, 9)])


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", None])
def test_a_recoded_model_is_read_as_its_files_say_and_fp8_is_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str | None
) -> None:
    architecture = SimpleNamespace(**({} if method is None else {"quantization_config": {"quant_method": method}}))
    inside, read, layer = list[Any](), list[Any](), Linear4bit(2, 2).eval()

    @contextmanager
    def decoding(of: Any) -> Iterator[None]:
        inside.append(of)
        yield
        inside.clear()

    def load(folder: Path, held: torch.dtype, computed: torch.dtype, config: Any = None) -> Any:
        read.append((folder, held, computed, config, list(inside)))
        return layer

    monkeypatch.setattr(verify, "model_config", lambda folder, layers: architecture)
    monkeypatch.setattr(verify, "dequantized_by_transformers", decoding)
    monkeypatch.setattr(plain, "load_plain", load)
    monkeypatch.setattr(plain, "place_logits", lambda model, rows: (model, rows))
    trained: Any = SimpleNamespace(dtype=torch.bfloat16, probe=Probe(ROWS, "1 row"))
    found: Any = verify._recoded_side(trained, tmp_path.as_uri())
    given = [architecture] if method == "fp8" else []
    assert read == [(tmp_path, torch.bfloat16, torch.bfloat16, given[0] if given else None, given)]
    assert found == (layer, ROWS)
    assert layer.training, "else bitsandbytes packs its weights anew"


def test_a_row_of_tags_is_its_text_and_the_tags_of_its_trained_words(monkeypatch: pytest.MonkeyPatch) -> None:
    text, tags = np.array([5, 6, 7], np.uint32), np.array([1, 2, 3], np.uint32)
    tags[[0, 2]] |= TARGET_BIT
    row = _tags(np.concatenate([text, tags]))
    assert (row.tokens.tolist(), row.places.tolist(), row.targets.tolist()) == ([[5, 6, 7]], [0, 2], [1, 3])
    monkeypatch.setattr(rows, "TOKENS", 2)
    row = _tags(np.concatenate([text, tags]))
    assert (row.tokens.tolist(), row.places.tolist(), row.targets.tolist()) == ([[5, 6]], [0], [1])


def test_a_distance_is_the_divergence_of_the_second_from_the_first() -> None:
    one, other = [torch.tensor([[3.0, 0.0]])], [torch.tensor([[0.0, 1.0]])]
    row = ProbeRow(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([0]), torch.tensor([1]))
    p, q = one[0].double().softmax(-1)[0], other[0].double().softmax(-1)[0]
    expected = float((p * (p / q).log()).sum())
    assert distance(one, other, [row]).kl == pytest.approx(expected)
    assert distance(other, one, [row]).kl != pytest.approx(expected, rel=0.05)


def test_differences_of_both_signs_do_not_cancel() -> None:
    one, other = [torch.tensor([[2.0, 0.0], [0.0, 2.0]])], [torch.tensor([[0.0, 2.0], [2.0, 0.0]])]
    row = ProbeRow(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert distance(one, other, [row]).log_prob == pytest.approx(2.0)
