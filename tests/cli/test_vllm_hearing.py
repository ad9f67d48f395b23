"""A real vLLM serves the merge of a run over sounds, and hears the sounds of its rows and of a prompt.

This vLLM takes no adapters for Qwen2-Audio, so it serves the merged model.
"""

import json
from base64 import b64encode
from pathlib import Path

import pytest

from tests.cli.conftest import Capstan
from tests.hearing import hearing_base, make_sounding
from tests.material import Workshop, commit
from tests.needs import need
from tests.real_vllm import VLLM, vllm
from tests.seeing import trained_over

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]


def test_a_real_server_hears_the_sounds_of_a_run(tmp_path: Path, capstan: Capstan) -> None:
    reads = (VLLM / ".installed").exists() and any(VLLM.glob("lib/python3*/site-packages/soundfile.py"))
    need(None if reads else "there is no vLLM that reads sounds: `make vllm` installs one")
    workshop, common = Workshop(tmp_path), f"--store={tmp_path}/store"
    # vLLM wants heads of 32, and the 30 seconds of every published base.
    base = hearing_base(tmp_path / "hears", seconds=30, num_attention_heads=2, num_key_value_heads=1)
    rows, asked = make_sounding(tmp_path / "rows", 6), make_sounding(tmp_path / "asked", 5, seed=9)
    of_rows = (f"data.eval=[{{path: {asked}}}]", "data.format=pictures", "data.sequence_length=160")
    config = workshop.config("ears", *trained_over(base, rows), *of_rows)
    commit(workshop.store.sub("ears"), config, dataset=workshop.prepare(config).train)
    merge = (f"{tmp_path}/merged", common, "--format", "merged")
    written = capstan("export", "ears", *merge, timeout=900)
    assert written.returncode == 0, written.stderr
    options = ("--no-enable-lora", "--trust-request-chat-template", "--limit-mm-per-prompt", '{"audio": 2}')
    with vllm(tmp_path / "merged", tmp_path / "vllm.log", *options, "--max-num-seqs", "8") as url:
        found = capstan("export", "ears", *merge, "--verify", "--server", f"{url}#base", timeout=900)
        assert found.returncode == 0, found.stdout + found.stderr
        assert "3 of them with sounds" in found.stdout
        prompts, one = tmp_path / "prompts.jsonl", tmp_path / "one.txt"
        sounds = [f"{tmp_path}/asked/{name}.wav" for name in ("1-0", "2-0", "2-1")]
        data = [f"data:;base64,{b64encode(Path(sound).read_bytes()).decode()}" for sound in sounds]
        prompts.write_text("".join(json.dumps({"prompt": "what?", "audios": [uri]}) + "\n" for uri in data))
        one.write_text("what?\n")
        say = ("generate", "ears", common, "--trust-run", "--json", "--max-tokens=12")
        asks = [(f"--prompts={prompts}", "--server", f"{url}#base"), (f"--prompts={prompts}",)]
        asks.append((f"--prompts={one}", f"--audio={sounds[0]}", "--server", f"{url}#base"))
        told = [capstan(*say, *ask, timeout=900) for ask in asks]
        assert all(answer.returncode == 0 for answer in told), [answer.stderr for answer in told]
        there, here, first = ([one["adapter"] for one in json.loads(answer.stdout)["answers"]] for answer in told)
        assert there == here
        assert first == there[:1]
        assert len(set(there)) > 1, "a sound changes no answer"
