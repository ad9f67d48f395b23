"""Writes what `capstan plan` prints into the walk-throughs and the README: behind each block with the command, a block
with its output, of which the README has what comes before the tables.

python -m tests.plan_pages            write the pages
python -m tests.plan_pages --check    exit 1 when a page is not what would be written
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launcher.config_docs import write_or_check
from tests.pages import ROOT, blocks_of
from tests.unit.base.test_published_models import MODELS
from tests.unit.plan.test_plan import LLAMA_70B

_MOE = MODELS["Qwen3-235B-A22B"].config
# Each page, the page that has its configuration, and the config.json that the Hub has of its base.
PAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "docs/walkthrough-70b.md": ("docs/walkthrough-70b.md", LLAMA_70B),
    "docs/walkthrough-moe.md": ("docs/walkthrough-moe.md", _MOE),
    "README.md": ("docs/walkthrough-moe.md", _MOE),
}
_PLANNED = re.compile(r"(```sh\ncapstan (plan [^\n]+)\n```\n\n```text\n)(.*?)(```\n)", re.DOTALL)
_REVISION = "0" * 40
_ROWS = 20_000


def render(name: str) -> str:
    """The page, with what each plan of it prints now."""
    configured, base = PAGES[name]
    with tempfile.TemporaryDirectory() as folder:
        environment = _lay_out(ROOT / configured, Path(folder), base)

        def printed(found: re.Match[str]) -> str:
            whole = _printed(found[2], folder, environment)
            return found[1] + (whole if name == configured else whole.partition("\n\n")[0] + "\n") + found[4]

        return _PLANNED.sub(printed, (ROOT / name).read_text(encoding="utf-8"))


def _lay_out(page: Path, folder: Path, base: dict[str, Any]) -> dict[str, str]:
    """The page's configuration and some data in `folder`, and the base's config.json as the Hub's cache keeps it;
    returns the environment.
    """
    (shown,) = (block.text for block in blocks_of(page) if block.language == "yaml")
    (folder / shown.split()[1]).write_text(shown, encoding="utf-8")
    (hub_id,) = re.findall(r"model: \{base: ([^}]+)\}", shown)
    cached = folder / "hub" / f"models--{hub_id.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(_REVISION)
    (cached / "snapshots" / _REVISION).mkdir(parents=True)
    (cached / "snapshots" / _REVISION / "config.json").write_text(json.dumps(base))
    # An instruction-tuned base has a chat template; which one does not matter to a plan.
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (cached / "snapshots" / _REVISION / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "data").mkdir()
    messages = [{"role": "user", "content": "word " * 250}, {"role": "assistant", "content": "word " * 250}]
    (folder / "data/train.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * _ROWS)
    offline = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    offline["XDG_STATE_HOME"] = str(folder / "state")  # what `capstan doctor` has measured here is not the page's
    return {**os.environ, **offline, "COLUMNS": "110", "PYTHONPATH": str(ROOT)}


def _printed(command: str, folder: str, environment: dict[str, str]) -> str:
    arguments = [sys.executable, "-m", "launcher.cli", *command.split()]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    if done.returncode:
        raise AssertionError(f"capstan {command} ends with {done.returncode}: {done.stderr}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


if __name__ == "__main__":
    ends = [
        write_or_check(ROOT / name, lambda name=name: render(name), "tests.plan_pages", "`capstan plan`")
        for name in PAGES
    ]
    sys.exit(max(ends))
