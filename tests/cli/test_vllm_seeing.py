"""A real vLLM is shown the pictures of a run's rows, and serves what the run exports: beside its base, or merged.

`export --verify --server` finds it right, and finds an adapter that changes nothing, one whose tower is ignored, and
another picture. `evaluate --server` and `generate --server` give what the ranks give.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.conftest import Capstan
from tests.material import Workshop, commit
from tests.needs import need
from tests.real_vllm import TARGETS, VLLM, vllm
from tests.seeing import make_pictured, seeing_base, trained_over
from trainer.base.find.media import Shown
from trainer.base.find.media.still import STILL
from trainer.export.proof import models
from trainer.export.proof.verify import prove_served
from trainer.export.write.adapter import export_adapter
from trainer.store.store import open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]

# vLLM wants heads of 32, and takes the sections of M-RoPE as interleaved only where the settings say so.
_TURNED = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
_SHOWN = ("--trust-request-chat-template", "--limit-mm-per-prompt", '{"image": 2}', "--max-num-seqs", "8")
# Its projection of patches is called proj, too, and cannot have an adapter there.
_OF_TOWER = ["qkv", "linear_fc1", "linear_fc2", *(f"visual.blocks.{layer}.attn.proj" for layer in range(3))]


class Seeing:
    """A base that sees, and runs over rows with pictures whose adapters are exported to folders of their names."""

    def __init__(self, folder: Path) -> None:
        need(None if (VLLM / ".installed").exists() else "there is no vLLM: `make vllm` installs one")
        self.folder, self.workshop = folder, Workshop(folder)
        self.base = seeing_base(folder / "sees", "qwen3_vl", head_dim=32, rope_parameters=_TURNED)
        self.rows, self.asked = make_pictured(folder / "rows", 6), make_pictured(folder / "asked", 5, seed=9)
        self.common = f"--store={folder}/store"

    def commit(self, name: str, *settings: str) -> None:
        of_rows = (f"data.eval=[{{path: {self.asked}}}]", "data.format=pictures", "data.images.max_pixels=900")
        targets = f"tuning.targets=[{', '.join(TARGETS)}]"
        config = self.workshop.config(name, *trained_over(self.base, self.rows), *of_rows, targets, *settings)
        run = self.workshop.store.sub(name)
        commit(run, config, dataset=self.workshop.prepare(config).train)
        export_adapter(run, open_store(str(self.folder / name)))

    def verified(self, capstan: Capstan, name: str, url: str, *options: str) -> Any:
        folder = str(self.folder / (f"{name}-merged" if options else name))
        return capstan("export", name, folder, self.common, *options, "--verify", "--server", url, timeout=900)

    def serves(self, *names: str) -> list[str]:
        return ["--lora-modules", *(f"{name}={self.folder}/{name}" for name in names), *_SHOWN]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    here = Seeing(tmp_path_factory.mktemp("seeing"))
    here.commit("words")
    here.commit("eyes", "tuning.towers=lora")
    return here


def test_a_real_server_beside_its_base_is_shown_pictures(
    seeing: Seeing, tmp_path: Path, capstan: Capstan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with vllm(seeing.base, tmp_path / "vllm.log", *seeing.serves("words", "eyes")) as url:
        found = seeing.verified(capstan, "words", url)
        assert found.returncode == 0, found.stdout + found.stderr
        assert "log-probabilities of words" in found.stdout
        assert "3 of them with pictures" in found.stdout
        alone = seeing.verified(capstan, "words", f"{url}#base")
        assert (alone.returncode, "It answers as the base alone" in alone.stderr) == (1, True), alone.stderr
        # Without its option this server ignores the tower's part of an adapter.
        ignored = seeing.verified(capstan, "eyes", url)
        assert (ignored.returncode, "--enable-tower-connector-lora" in ignored.stderr) == (1, True), ignored.stderr
        assert "It ignores what the tower has learnt" in ignored.stderr

        evaluate = ("evaluate", "words", seeing.common, "--trust-run", "--json")
        theirs, ours = (capstan(*evaluate, *more, timeout=900) for more in (("--server", url, "--step=4"), ()))
        assert theirs.returncode == ours.returncode == 0, theirs.stderr + ours.stderr
        for side in ("base", "adapter"):
            there, here = (json.loads(one.stdout)["sets"]["eval"][side]["loss"] for one in (theirs, ours))
            assert there == pytest.approx(here, abs=1e-4), side

        prompts = tmp_path / "prompts.jsonl"
        told = [f"{seeing.folder}/asked/{name}.png" for name in ("1-0", "2-0", "2-1")]
        rows = [{"prompt": "what is it?"}, {"messages": [{"role": "user", "content": "and the ant?"}]}]
        prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        answers = list[list[str]]()
        for image in told:
            say = (
                "generate",
                "words",
                seeing.common,
                "--trust-run",
                "--json",
                f"--prompts={prompts}",
                f"--image={image}",
            )
            theirs, ours = (capstan(*say, "--max-tokens=12", *more, timeout=900) for more in (("--server", url), ()))
            assert theirs.returncode == ours.returncode == 0, theirs.stderr + ours.stderr
            answers += [[one["adapter"] for one in json.loads(side.stdout)["answers"]] for side in (theirs, ours)]
            assert answers[-1] == answers[-2], image
        assert len({tuple(one) for one in answers}) > 1, "a picture changes no answer"

        plain = STILL.part

        def turned(file: Shown) -> dict[str, Any]:
            return plain(Shown(file.shape, file.content.transpose(Image.Transpose.ROTATE_180)))

        monkeypatch.setattr(models, "aside", lambda device, work, *arguments: work(*arguments))
        monkeypatch.setattr(STILL, "part", turned)
        run, adapter = seeing.workshop.store.sub("words"), open_store(str(seeing.folder / "words"))
        exchanged = prove_served(run, 4, adapter, f"{url}#words", whole_model=False)
        assert not exchanged.holds
        assert exchanged.prompt > 100 * 1e-5


def test_a_real_server_takes_what_the_tower_has_learnt_if_it_is_told_to(
    seeing: Seeing, tmp_path: Path, capstan: Capstan
) -> None:
    options = (*seeing.serves("eyes"), "--enable-tower-connector-lora", "--lora-target-modules", *TARGETS, *_OF_TOWER)
    with vllm(seeing.base, tmp_path / "vllm.log", *options) as url:
        found = seeing.verified(capstan, "eyes", url)
        assert found.returncode == 0, found.stdout + found.stderr


def test_a_real_server_is_shown_pictures_by_a_merge_that_has_a_tower(
    seeing: Seeing, tmp_path: Path, capstan: Capstan
) -> None:
    merge = ("--format", "merged")
    written = capstan("export", "eyes", f"{seeing.folder}/eyes-merged", seeing.common, *merge, timeout=900)
    assert written.returncode == 0, written.stderr
    with vllm(seeing.folder / "eyes-merged", tmp_path / "vllm.log", *_SHOWN) as url:
        found = seeing.verified(capstan, "eyes", f"{url}#base", *merge)
        assert found.returncode == 0, found.stdout + found.stderr
