"""Every line that `python -m tests.mutations` breaks is there, once, so that a change of it takes the mutation
along.
"""

from pathlib import Path

import pytest

from tests import mutations, random_mutations
from tests.mutations import MUTATIONS, ROOT, Mutation
from tests.random_mutations import Change


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_line_that_a_mutation_changes_is_there_once(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1


def test_random_changes_are_over_all_packages_and_each_file_with_one_is_still_python() -> None:
    changes = random_mutations.drawn(60, 1)
    assert changes == random_mutations.drawn(60, 1) != random_mutations.drawn(60, 2)
    assert len({"/".join(change.file.split("/")[:2]) for change in changes}) > 25
    for change in changes:
        source = (ROOT / change.file).read_text(encoding="utf-8")
        assert change.applied(source) != source
        compile(change.applied(source), change.file, "exec")


def test_what_could_notice_a_change_begins_with_the_tests_of_its_module() -> None:
    near, *others = random_mutations.nearest("trainer/data/order/order.py")
    assert "tests/unit/data/test_data_order.py" in near
    assert "tests/unit/launcher/test_retry.py" not in near
    assert "tests/unit/launcher/test_retry.py" in {test for stage in others for test in stage}
    *_, behind, _ = random_mutations.nearest("trainer/export/proof/verify.py")
    assert "tests/dist/test_merge.py" in behind, "which proves by tests/dist/proofs.py"
    source = (ROOT / "trainer/data/order/order.py").read_text(encoding="utf-8").splitlines()
    line = next(at for at, text in enumerate(source, 1) if "bisect_left(rooms" in text)
    assert random_mutations.nearest("trainer/data/order/order.py", line)[0][0] == "tests/unit/data/test_data_order.py"


@pytest.mark.long
def test_tests_that_pass_and_leave_a_process_notice_nothing(tmp_path: Path) -> None:
    """Such a process is the server that ranks are forked from."""
    leaving = "import multiprocessing, time\ndef test_one():\n    multiprocessing.Process(target=time.sleep, args=(60,)).start()\n"
    (tmp_path / "test_left.py").write_text(leaving)
    (tmp_path / "test_wrong.py").write_text("def test_two():\n    assert False\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = long\n")
    assert mutations.first_failed(tmp_path, ("test_left.py",)) == ""
    assert mutations.first_failed(tmp_path, ("test_wrong.py",)) == "test_wrong.py::test_two"


_PRODUCT = "def double(number):\n    return 2 * number\n"
_DOUBLES = "from product import double\ndef test_doubles():\n    assert double(2) == 4 and double(3) == 6\n"
_NEVER = "def test_never():\n    assert False\n"
_LATER = """from pathlib import Path
def test_later():
    tried = Path("tried")
    before = tried.exists()
    tried.touch()
    assert before
"""
_ENDS = "import os\nfrom product import double\nif double(3) != 6:\n    os._exit(3)\ndef test_nothing():\n    pass\n"


@pytest.mark.long
@pytest.mark.parametrize(
    ("tests", "noticed", "by"),
    [
        ((_DOUBLES,), True, "test_0.py::test_doubles"),
        ((_NEVER, _LATER, _DOUBLES), True, "test_2.py::test_doubles"),
        ((_NEVER, _LATER), False, "NOT NOTICED"),
        ((_ENDS,), True, "pytest ended with 3"),
        (("import nothing_of_this_name\n",), None, "UNDECIDED: test_0.py fails without it, too"),
    ],
)
def test_what_notices_a_change_fails_again_with_it_and_passes_without_it(
    tmp_path: Path, tests: tuple[str, ...], noticed: bool | None, by: str
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = long\n")
    (tmp_path / "product.py").write_text(_PRODUCT)
    for number, source in enumerate(tests):
        (tmp_path / f"test_{number}.py").write_text(source)
    change = Change("product.py", 2, _PRODUCT.index("2"), "2", "(3)")
    stage = tuple(f"test_{number}.py" for number in range(len(tests)))
    assert (verdict := mutations._verdict(change, tmp_path, [stage]))[0] is noticed, verdict
    assert verdict[1].startswith(by)
    assert (tmp_path / "product.py").read_text() == _PRODUCT


def test_a_number_that_only_orders_kinds_puts_one_behind_all_others() -> None:
    source = "VERBS = {'ls': Command(ls, 'ls', 70)}\nFORMATS = {'text': RowFormat(('text',), place=65)}\nSIZE = 64\n"
    found = list(random_mutations.changes("verbs.py", source))
    assert [(change.old, change.new) for change in found] == [("70", "(1070)"), ("65", "(1065)"), ("64", "(65)")]
