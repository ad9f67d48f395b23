"""Who is wrong, by what all ranks have computed of one row."""

import pytest

from trainer.train.every.probe import RankAnswer, RankAnswers, Verdict, judge, spread, usual_spread

RIGHT, WRONG = RankAnswer((7, 8), (3.0, 4.0)), RankAnswer((7, 9), (3.0, 4.5))
NEARLY = RankAnswer((6, 8), (3.0, 4.000001))


def answers(*ranks: RankAnswer | tuple[RankAnswer, ...], kinds: str = "") -> list[RankAnswers]:
    """The answers of ranks, each of one pass or more, and each of the kind of its letter."""
    letters = kinds or "a" * len(ranks)
    return [
        RankAnswers(letters[rank], f"n{rank}", passes if isinstance(passes[0], RankAnswer) else (passes,))  # type: ignore[arg-type]
        for rank, passes in enumerate(ranks)
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (answers(RIGHT, RIGHT, RIGHT), Verdict()),
        (answers(RIGHT, WRONG, RIGHT), Verdict((1,))),
        (answers(RIGHT, NEARLY, RIGHT), Verdict((1,))),
        (answers(RIGHT, WRONG), Verdict((0, 1), undecided=True)),
        (answers((RIGHT, RIGHT, RIGHT), (WRONG, RIGHT, RIGHT)), Verdict((1,))),
        (answers((RIGHT, RIGHT, RIGHT), (WRONG, WRONG, WRONG)), Verdict((0, 1), undecided=True)),
        (answers((RIGHT, WRONG)), Verdict((0,), undecided=True)),
        (answers((RIGHT, RIGHT)), Verdict()),
        (answers(RIGHT, RIGHT, WRONG, WRONG, kinds="aabb"), Verdict()),
        (answers(RIGHT, RIGHT, WRONG, WRONG, RIGHT, WRONG, kinds="aabbab"), Verdict()),
        (answers(RIGHT, RIGHT, RIGHT, WRONG, WRONG, RIGHT, kinds="aaabbb"), Verdict((5,))),
    ],
)
def test_whoever_has_other_bits_than_most_of_its_kind_is_wrong(given: list[RankAnswers], expected: Verdict) -> None:
    assert judge(given, 0.0) == expected


def test_where_kernels_give_other_bits_norms_may_differ_by_what_was_measured() -> None:
    bound = 16 * spread(answers((RIGHT, NEARLY), (RIGHT, RIGHT)))
    assert 1e-7 < bound < 1e-4
    assert judge(answers(RIGHT, NEARLY, RIGHT), bound) == Verdict()
    assert judge(answers(RIGHT, WRONG, NEARLY), bound) == Verdict((1,))
    assert judge(answers(RIGHT, RankAnswer((0, 0), (3.0, float("nan"))), RIGHT), bound) == Verdict((1,))


def test_where_norms_differ_nobody_is_blamed_by_half_of_the_ranks_or_by_itself() -> None:
    low, high = RankAnswer((1, 8), (3.0, 3.0)), RankAnswer((2, 8), (3.0, 5.0))
    assert judge(answers(low, RIGHT, RIGHT, high), 0.01) == Verdict((0, 1, 2, 3), undecided=True)
    assert judge(answers(low, RIGHT, RIGHT, RIGHT, high), 0.01) == Verdict((0, 4))
    assert judge(answers((RIGHT, WRONG)), 0.01) == Verdict((0,), undecided=True)


def test_equal_bits_need_no_bound() -> None:
    assert spread(answers((RIGHT, RIGHT), (RIGHT, RIGHT))) == 0.0


def test_a_spread_is_a_share_of_the_gradient_and_never_below_what_norms_can_tell() -> None:
    assert spread(answers((RIGHT, WRONG))) == pytest.approx(0.5 / (9 + 4.5**2) ** 0.5)
    other_bits = RankAnswer((6, 8), RIGHT.norms)
    assert spread(answers((RIGHT, other_bits))) == 1e-7


@pytest.mark.parametrize(
    ("given", "differ"),
    [
        (answers((RIGHT, NEARLY, RIGHT), (RIGHT, RIGHT, NEARLY), (RIGHT, RIGHT, RIGHT)), True),
        (answers((RIGHT, NEARLY, RIGHT), (RIGHT, RIGHT, NEARLY)), True),
        (answers((RIGHT, NEARLY, RIGHT), (RIGHT, RIGHT, RIGHT), (RIGHT, RIGHT, RIGHT)), False),
        (answers((RIGHT, WRONG, RIGHT), (RIGHT, RIGHT, RIGHT)), False),
        (answers((RIGHT, NEARLY, RIGHT)), False),
    ],
)
def test_kernels_whose_bits_differ_later_on_are_known_by_most_ranks_differing_from_themselves(
    given: list[RankAnswers], differ: bool
) -> None:
    bound = 16 * usual_spread(given)
    assert (bound > 0) == differ
    assert bool(judge(given, bound).wrong) != differ


def test_of_two_ranks_the_steadier_one_says_what_is_usual() -> None:
    apart = spread(answers((RIGHT, WRONG)))
    assert apart > 0
    assert usual_spread(answers((RIGHT, WRONG), (RIGHT, WRONG))) == apart
    assert usual_spread(answers((RIGHT, WRONG), (RIGHT, RIGHT))) == 0
    assert usual_spread(answers((RIGHT, WRONG))) == 0, "alone"
