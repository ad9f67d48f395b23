"""The functions that the ranks of tests/dist/test_seams.py run."""

from pathlib import Path

from trainer import tuning
from trainer.config import parse_config
from trainer.data.compile.prepare import Datasets
from trainer.rank import run_rank
from trainer.tuning import objective

TOYS = Path(__file__).parents[1] / "toys"


def train_with_toys(config_text: str, fingerprint: str, how: str) -> None:
    """`run_rank` with the toy methods and objectives beside the project's own. `how`: start or resume."""
    tuning.__path__.append(str(TOYS / "tuning"))
    objective.__path__.append(str(TOYS / "objective"))
    run_rank(parse_config(config_text), Datasets(fingerprint, None), resume=how == "resume")
