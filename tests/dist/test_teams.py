"""A world of ranks and the teams in it: each collective reaches those that it is for, and no others."""

from tests.dist import teams
from tests.dist.launch import launch


def test_a_rank_makes_its_own_group_alone_and_waits_for_no_other() -> None:
    """Of 1,024 ranks each would else take part in the making of 128 groups, and where torch has a barrier after each,
    wait for all others as often.
    """
    barrier = {"TORCH_DIST_INIT_BARRIER": "1"}
    assert launch(4, teams.groups_apart, extra_environment=barrier) == [[2, 4, 2]] * 4


def test_the_collectives_of_a_team_stay_in_it() -> None:
    found = launch(4, teams.two_teams)
    for rank, one in enumerate(found):
        first = rank // 2 * 2
        assert one["of the team"] == [first, first + 1]
        assert one["of the world"] == [0, 1, 2, 3]
        assert (one["total of the team"], one["total of the world"]) == (2 * first + 3, 10)
        assert (one["first of the team"], one["first of the world"]) == (first, 0)
        assert one["objects"] == [f"rank {first}", f"rank {first + 1}"]
    assert [one["on the first"] for one in found] == [0, 0, *["the second team has another mistake."] * 2]


def test_an_optimizer_adds_up_over_its_team() -> None:
    assert launch(4, teams.optimizers_of_teams) == [11.0, 11.0, 1100.0, 1100.0]
