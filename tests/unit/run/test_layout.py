"""The keys of a run's folder: what an earlier version wrote must be found under the same names."""

from collections.abc import Callable

import pytest

from trainer.run import layout

KEYS = [
    (layout.metrics(12), "metrics/000012.jsonl"),
    (layout.added_record(12, "x"), "metrics/000012.jsonl.added-x"),
    (layout.rank_log(12, 345), "logs/000012/rank-00345.log"),
    (layout.sidecar_log(12, "rollout"), "logs/000012/rollout.log"),
    (layout.server("one"), "servers/one"),
    (layout.owner(3), "owners/000003.json"),
    (layout.settings(12), "settings/000012.yaml"),
    (layout.slurm_attempt(2), "slurm/attempts/000002.json"),
    (layout.tracker("wandb"), "trackers/wandb.json"),
    (layout.checkpoint(40), "checkpoints/step-000000040/"),
    (layout.shard(40, layout.attempt(12, 3), 7), "checkpoints/step-000000040/000012-000003/shard-00007.safetensors"),
    (layout.manifest(40), "checkpoints/step-000000040/manifest.json"),
    (layout.damaged_manifest(40, 12), "checkpoints/step-000000040/manifest.damaged-000012.json"),
    (layout.doubt(40, 12), "checkpoints/step-000000040/doubt-000012.json"),
    (layout.adapter(40), "checkpoints/step-000000040/adapter"),
    (layout.rollouts("0f"), "rollouts/0f"),
    (layout.chapter_of_rollouts(4), "chapter-000000004"),
    (layout.published(40), "adapters/step-000000040/PUBLISHED"),
    (layout.evaluation(40), "evaluations/step-000000040.json"),
    (layout.samples(40), "samples/step-000000040.jsonl"),
    (layout.profile(40), "profiles/step-000000040.json.gz"),
    (layout.kept_text("0f"), "text/0f"),
    (layout.bases("0f"), "bases/0f"),
    (layout.features("0f"), "bases/features-0f"),
    (layout.pictures(255), "pictures/00000000000000ff"),
    (layout.dataset("0f"), "data/0f/"),
    (layout.environment("0f"), "environments/0f.json"),
    (layout.environment_archive("0f", "me"), "environments/0f-me.tar.zst"),
]
CONSTANTS = {
    "CONFIG": "config.yaml",
    "STOP": "STOP",
    "RESTART": "RESTART",
    "NO_MORE_DATA": "NO-MORE-DATA",
    "PREPARING": "PREPARING",
    "SUBMITTED": "submitted.yaml",
    "RANKS_BEGUN": "RANKS-BEGUN",
    "DRIVER_LOG": "logs/driver.log",
    "TENSORBOARD": "tensorboard/",
    "BASE_HASHES": "base.json",
    "SWEEP": "sweep.json",
    "SLURM_JOB": "slurm/job.json",
}


def test_every_key_is_where_it_always_was() -> None:
    assert [key for key, _ in KEYS] == [expected for _, expected in KEYS]
    assert {name: getattr(layout, name) for name in CONSTANTS} == CONSTANTS


@pytest.mark.parametrize(
    ("read", "key", "found"),
    [
        (layout.generation_of, "metrics/000012.jsonl", 12),
        (layout.generation_of, "metrics/000012.jsonl.added-x", None),
        (layout.records_of, "metrics/000012.jsonl", 12),
        (layout.records_of, "metrics/000012.jsonl.added-x", 12),
        (layout.owner_of, "owners/000003.json", 3),
        (layout.step_of_folder, "step-000000040", 40),
        (layout.step_of_folder, "step-40", None),
        (layout.shard_step, "checkpoints/step-000000040/000012-000003/shard-00007.safetensors", 40),
        (layout.shard_step, "checkpoints/step-000000040/000012-000003/shard-123456.safetensors", 40),
        (layout.shard_step, "checkpoints/step-000000040/manifest.json", None),
        (layout.attempt_of, "checkpoints/step-000000040/000012-000003/shard-00007.safetensors", "000012-000003"),
        (layout.attempt_of, "checkpoints/step-000000040/1000000-1234567/shard-00007.safetensors", "1000000-1234567"),
        (layout.attempt_of, "checkpoints/step-000000040/manifest.json", None),
        (layout.published_step, "adapters/step-000000040/PUBLISHED", 40),
        (layout.published_step, "adapters/step-000000040/adapter_config.json", None),
        (layout.step_of_result, "evaluations/step-000000040.json", 40),
        (layout.step_of_result, "samples/step-000000040.jsonl", 40),
        (layout.step_of_result, "samples/step-000000040.txt", None),
    ],
)
def test_what_a_key_says_is_read(read: Callable[[str], int | str | None], key: str, found: int | str | None) -> None:
    assert read(key) == found
