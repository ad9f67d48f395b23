"""Writes docs/recipes.md from the table of recipes: what each is for, and what its plan says.

python -m tests.recipes_page            write the page
python -m tests.recipes_page --check    exit 1 when the page is not what would be written
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.config_docs import write_or_check
from launcher.init.recipes import FILES, Recipe, recipe_text, table, write_data
from launcher.plan.planning import Planned, plan_run
from tests.pages import ROOT
from trainer.config import parse_config
from trainer.plan.forecast import UTILISATION
from trainer.run.lines import duration

PAGE = ROOT / "docs" / "recipes.md"
_TOKENS = 10_000_000
_NOT_COUNTED = {"grpo": "without sampling", "distillation": "without the teacher"}
"""What the time of a goal leaves out."""

_HEADER = f"""\
# Recipes

<!-- Written by `python -m tests.recipes_page` from launcher/init/recipes.yaml: change that. -->

A recipe is a configuration to start from. It has a base, a goal, and settings that fit certain GPUs. A comment gives
the reason for each setting.

```sh
capstan recipe                                                               # lists them
capstan recipe smollm2-135m-chat -o my-run.yaml --data sample-data           # writes one, and small data for a first try
capstan train my-run.yaml
```

Then name your own file under `data.train`, and change the settings as you like. `capstan plan my-run.yaml` shows the
memory and time that the changed recipe needs. If there is no recipe for your base or your GPUs, use `capstan init`.
It makes a configuration for any base, your data and your GPUs.

In the tables, *memory* is what one GPU needs according to the recipe's plan. *Time* is the plan's estimate for
{_TOKENS // 10**6} million tokens. The estimate assumes that the GPU reaches
{UTILISATION * 100:.0f} % of the peak on its data sheet. If a plan has no estimate, the cell is empty. With the
[small data](#small-data-for-a-first-try), a run of a recipe for a CPU takes minutes. If the machine has a GPU, the run
uses it.
"""

_DATA = """\
## Small data for a first try

`capstan recipe --data DIR` writes these files into DIR. Most rows deal with some 120 sailing terms and their meanings,
so you can easily test whether a model has learnt them.

| file | rows | for |
|---|---|---|
"""


def plans(folder: Path, names: Mapping[str, Recipe]) -> Iterator[tuple[str, Planned]]:
    """Yield the plan of each recipe for the GPUs that it names, over the small data in `folder`, without the Hub."""
    for name, recipe in names.items():
        on_cpu = ["cluster.gpus_per_worker=0", "model.dtype=fp32"] if recipe.on_cpu else []
        config = parse_config(recipe_text(name, str(folder)), [f"run.store={folder / 'runs'}", *on_cpu])
        yield name, plan_run(config, None if recipe.on_cpu else recipe.gpu, None)


def render() -> str:
    """The whole page."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = table()
    with tempfile.TemporaryDirectory() as place:
        rows = {name: len(list(made())) for name, (_, made) in FILES.items()}
        write_data(Path(place), force=False)
        planned = dict(plans(Path(place), found.recipes))
    parts = [_HEADER]
    for goal, about in found.goals.items():
        parts.append(f"## {about.title}\n\nThe model {about.about}. Rows: {about.rows} ({about.data}).\n")
        lines = ["| recipe | base | planned for | memory | time |", "|---|---|---|---|---|"]
        for name, recipe in found.recipes.items():
            if recipe.goal == goal:
                lines.append(
                    f"| `{name}` | {recipe.base} | {recipe.machine} | {_memory(planned[name])} |"
                    f" {_time(recipe, planned[name])} |"
                )
        parts.append("\n".join(lines) + "\n")
    used = {name: ", ".join(about.title for about in found.goals.values() if about.data == name) for name in FILES}
    listed = [f"| `{name}` | {rows[name]} {about} | {used[name]} |" for name, (about, _) in FILES.items()]
    return "\n".join([*parts, _DATA + "\n".join(listed) + "\n"])


def _memory(planned: Planned) -> str:
    needed = planned.plan.memory_per_gpu.total / 2**30
    return f"{needed:.1f} of {planned.gpu.memory / 2**30:.0f} GiB" if planned.gpu else f"{needed:.1f} GiB"


def _time(recipe: Recipe, planned: Planned) -> str:
    if planned.forecast is None:
        return ""
    apart = f", {_NOT_COUNTED[recipe.goal]}" if recipe.goal in _NOT_COUNTED else ""
    together = planned.forecast.tokens_per_second * planned.plan.batch.world_size
    return f"{duration(_TOKENS / together)}{apart}"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, render, "tests.recipes_page", "launcher/init/recipes.yaml"))
