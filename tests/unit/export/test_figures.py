"""What the figures of a proof say: when it holds, and in which words."""

from dataclasses import asdict, replace
from math import inf

import pytest

from trainer.export.figures import NOT_TRAINED, KeptProof, Proof, ServedProof, proof_of

EXPORTED = Proof(
    kl=0.01,
    kl_allowed=0.02,
    kl_effect=0.5,
    log_prob=0.03,
    log_prob_allowed=0.04,
    log_prob_effect=0.6,
    computed_in="fp32",
    rows="8 rows",
)
KEPT = KeptProof(
    base_loss=3.0,
    adapter_loss=1.0,
    merged_loss=1.2,
    kept=0.9,
    kept_low=0.85,
    kept_high=0.95,
    kl=0.1,
    kl_effect=0.7,
    rounding="dither",
    usual="dither",
    through=False,
    tokens=1234,
    computed_in="fp32",
    rows="64 rows",
)
SERVED = ServedProof(
    server="http://here",
    model="one",
    prompt=0.01,
    drawn=0.02,
    largest=0.3,
    allowed=0.02,
    effect=0.5,
    from_base=0.4,
    tokens=1234,
    draws=56,
    rows="8 rows",
)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "It is what was trained."),
        ({"kl": 0.02, "log_prob": 0.04}, "It is what was trained."),
        ({"kl": 0.021}, NOT_TRAINED),
        ({"log_prob": 0.041}, NOT_TRAINED),
        ({"kl_effect": 0.02}, "That proves nothing: what was learnt changes no more than rounding does."),
        ({"kl_effect": 0.001, "kl": 0.03}, NOT_TRAINED),
    ],
)
def test_an_export_is_proven_by_a_difference_below_the_allowed_one_and_an_effect_above_it(
    changed: dict[str, float], said: str
) -> None:
    proof = replace(EXPORTED, **changed)
    assert proof.verdict.startswith(said)
    assert proof.holds is (said == "It is what was trained.")


def test_the_sentence_of_an_export_has_its_figures_and_those_of_a_merge() -> None:
    figures = (
        "KL 0.01 nats a token (allowed 0.02; the training's own effect is 0.5), log-probabilities of the trained tokens"
        " 0.03 nats (allowed 0.04, effect 0.6), computed in fp32 on 8 rows"
    )
    assert EXPORTED.sentence() == f"{EXPORTED.compared}: {figures}"
    assert replace(EXPORTED, trained_kl=0.7).sentence() == EXPORTED.sentence()
    merged = replace(EXPORTED, trained_kl=0.7, rounding_kl=0.8).sentence()
    assert merged.startswith(
        f"its predictions in transformers against PEFT's own merge: {figures}; KL 0.8 from base and"
    )
    assert merged.endswith("and 0.7 from the model as it was trained")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kept": 0.8}, "It keeps what was trained."),
        ({"adapter_loss": 3.0}, "That proves nothing: on these rows the adapter predicts hardly better"),
        ({"kept_low": -inf}, "That proves nothing: on these rows the adapter predicts hardly better"),
        ({"kept": 0.79, "through": True}, "It should have the codes of the trained model, and does not"),
        ({"kept": 0.79}, "A merge as stored has to keep 80%. What keeps more: round by rows of the run's data"),
        ({"kept": 0.79, "rounding": "gptq", "usual": "gptq"}, "A merge as stored has to keep 80%. What keeps more: serve the"),
        ({"kept": 0.79, "rounding": "nearest"}, "A merge as stored has to keep 80%. Leave rounding=nearest out. What keeps more: serve"),
    ],
)  # fmt: skip
def test_a_merge_as_stored_has_to_keep_most_of_what_was_learnt(changed: dict[str, float], said: str) -> None:
    proof = replace(KEPT, **changed)
    assert proof.verdict.startswith(said)
    assert proof.holds is (said == "It keeps what was trained.")


def test_the_sentence_of_a_merge_as_stored_has_what_it_is_compared_with() -> None:
    assert KEPT.sentence() == (
        "it keeps 90.0% (95 % interval 85.0% to 95.0%) of the adapter's gain: 3.0000 nats a token by the base, 1.0000"
        " with the adapter beside it, 1.2000 merged; KL 0.1 from base and adapter side by side (the base alone: 0.7),"
        " computed in fp32 over 1,234 tokens of 64 rows"
    )
    through = replace(KEPT, through=True).told({"codes": 200, "codes_changed": 3}).sentence()
    assert (
        "1.0000 as it was trained, 1.2000 merged, 1.50% of the codes changed; KL 0.1 from the trained model" in through
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt": 0.02}, "It serves what was exported."),
        ({"effect": 0.02}, "That proves nothing: what was learnt changes no more than rounding does."),
        ({"prompt": 0.021}, "It serves another model, or this one over another base."),
        ({"drawn": 0.021}, "It serves another model, or this one over another base."),
        ({"drawn": 1.0, "from_base": 0.02}, "It answers as the base alone."),
        ({"drawn": 1.0, "from_blind": 0.02}, "It ignores what the tower has learnt"),
        ({"drawn": 1.0, "from_blind": 0.03}, "It serves another model, or this one over another base."),
    ],
)
def test_a_server_is_proven_to_serve_the_export_or_what_it_serves_instead_is_said(
    changed: dict[str, float], said: str
) -> None:
    proof = replace(SERVED, **changed)
    assert proof.verdict.startswith(said)
    assert proof.holds is (said == "It serves what was exported.")


def test_the_sentence_of_a_server_has_its_figures() -> None:
    assert SERVED.sentence() == (
        "log-probabilities of one at http://here against transformers (and PEFT): 0.01 nats a token over 1,234 tokens,"
        " 0.02 over 56 that it drew, 0.3 at most (allowed 0.02 in the mean; the training's own effect is 0.5), on 8 rows"
    )


@pytest.mark.parametrize("proof", [EXPORTED, KEPT, SERVED])
def test_a_proof_comes_back_from_its_figures(proof: Proof | KeptProof | ServedProof) -> None:
    assert proof_of(asdict(proof)) == proof
