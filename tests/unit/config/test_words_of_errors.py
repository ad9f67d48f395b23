"""What messages quote and list: whole where it is short, and cut at one place where it is long."""

import pickle

import pytest

from trainer import errors
from trainer.errors import SlowMachine, counted, few, first_line, shown


def test_a_value_of_a_hundred_characters_is_quoted_whole_and_a_longer_one_is_cut() -> None:
    assert shown("x" * 98) == f"'{'x' * 98}'"
    assert shown("x" * 99) == f"'{'x' * 96}..."
    assert len(shown("x" * 99)) == 100


def test_eight_names_are_listed_and_of_more_their_number() -> None:
    assert few("abcdefgh") == "a, b, c, d, e, f, g, h"
    assert few("abcdefghi") == "a, b, c, d, e, f, g, h and 1 more"
    assert few("abcdefghij") == "a, b, c, d, e, f, g, h and 2 more"
    assert few("") == "none"


@pytest.mark.parametrize(
    ("count", "words"),
    [(1, "1 row"), (0, "0 rows"), (1024, "1,024 rows"), (2.5, "2.5 rows"), (10.0, "10 rows"), (1.0, "1 row")],
)
def test_one_thing_is_counted_in_the_singular_and_thousands_have_a_comma(count: float, words: str) -> None:
    assert counted(count, "row") == words


def test_the_first_line_of_an_error_is_a_part_of_a_sentence() -> None:
    assert first_line(ValueError("\n it broke.\nand more")) == "it broke"
    assert first_line(ValueError()) == "ValueError"


EXIT_CODES = {
    1: "CapstanError",
    2: "ConfigError BaseOutOfReach",
    3: "DataError",
    4: "DoesNotFit",
    5: "NonFiniteLoss",
    6: "StorageError Unreachable SlowDown NotFound AlreadyExists Damaged Superseded",
    7: "NothingToResume NothingCommitted",
    8: "WrongBytes",
    75: "Stopped Interrupted MachineLeaves SlowMachine",
}


def test_scripts_and_schedulers_find_each_error_at_the_exit_code_of_its_kind() -> None:
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    found = {name: kind.exit_code for name, kind in kinds.items() if issubclass(kind, errors.CapstanError)}
    assert found == {name: code for code, names in EXIT_CODES.items() for name in names.split()}


def test_a_slow_machine_is_named_in_another_process_too() -> None:
    found = pickle.loads(pickle.dumps(SlowMachine("rank 3 is slow.", [3], ["node2"])))
    assert (str(found), found.ranks, found.machines) == ("rank 3 is slow.", [3], ["node2"])
