"""The configuration refuses what it cannot use, in words that name the setting, the value and what is allowed."""

import os
from typing import Annotated, Any, get_args

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter

from launcher.start.check import anchored
from trainer.config import Config, assignment, dump_config, fields, load_config, override, parse_config
from trainer.config.data import Images
from trainer.config.objective import RolloutSettings, Serve
from trainer.config.paths import absolute_path, check_files
from trainer.errors import ConfigError
from trainer.run import layout

MINIMAL = """\
run: {name: demo}
model: {base: /models/tiny}
data: {train: [{path: data/*.jsonl}]}
train: {steps: 10}
"""


def refusal(*overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_four_settings_are_a_whole_configuration():
    config = parse_config(MINIMAL)
    assert (config.quant.type, config.data.targets, config.optim.betas) == ("nf4", "assistant", (0.9, 0.999))


def test_an_override_is_yaml_at_a_dotted_name():
    config = parse_config(MINIMAL, ["train.steps=20", "tuning.targets=[q_proj, v_proj]", "cluster.ray.address=auto"])
    assert config.train.steps == 20
    assert config.tuning.targets == ["q_proj", "v_proj"]
    assert config.cluster.ray.address == "auto"


def test_an_override_leaves_the_original_as_it_was():
    config = parse_config(MINIMAL)
    assert override(config, "train.steps=3").train.steps == 3
    assert config.train.steps == 10


def test_an_override_leaves_open_what_the_base_and_the_machine_decide_later():
    config = override(parse_config(MINIMAL), "train.steps=3")
    assert (config.decided(in_4_bits=True).quant.type, config.leaves_type_open) == ("stored", True)
    said = override(parse_config(MINIMAL, ["quant.type=nf4", "model.dtype=bf16"]), "train.steps=3")
    assert (said.decided(in_4_bits=True).quant.type, said.leaves_type_open) == ("nf4", False)


@pytest.mark.parametrize(
    ("given", "overrides", "expected"),
    [
        ("train: {steps: 200}", ["train.epochs=2.5"], "train.epochs=2.5 replaces train.steps: 200"),
        ("train: {epochs: 3}", ["train.steps=7"], "train.steps=7 replaces train.epochs: 3"),
        ("train: {steps: 200}", ["train={epochs: 2}"], "train={'epochs': 2} replaces all of train in run.yaml, also steps"),
        ("train: {steps: 200}", ["train={steps: 2}"], None),
        ("train: {steps: 200}", ["train.epochs=null"], None),
        ("train: {steps: 1}\nquant: {double: true, cache: false}", ["quant.type=none"], "quant.type='none' replaces quant.double: true"),
        ("train: {steps: 1}\nquant: {double: true}", ["quant.type=fp4"], None),
        ("train: {steps: 1}\noptim: {warmup_ratio: 0.1}", ["optim.warmup_steps=7"], "optim.warmup_steps=7 replaces optim.warmup_ratio: 0.1"),
        ("train: {steps: 1}\noptim: {warmup_steps: 7}", ["optim.warmup_ratio=0.1"], "optim.warmup_ratio=0.1 replaces optim.warmup_steps: 7"),
        ("train: {steps: 1}\neval: {every: 5, sets: {a: {path: b}}}", ["eval.per_epoch=2"], "eval.per_epoch=2 replaces eval.every: 5"),
        ("train: {steps: 1}\neval: {per_epoch: 2, sets: {a: {path: b}}}", ["eval.every=5"], "eval.every=5 replaces eval.per_epoch: 2"),
    ],
)  # fmt: skip
def test_an_override_replaces_what_it_contradicts_of_the_file_and_says_so(
    given: str, overrides: list[str], expected: str | None
):
    said = list[str]()
    text = MINIMAL.replace("train: {steps: 10}", given)
    config = parse_config(text, overrides, "run.yaml", said.append)
    assert said == ([f"{expected}{'' if 'all of' in expected else ' of run.yaml'}."] if expected else [])
    again = override(config, *overrides)  # of a configuration that has every default written out
    assert again == config
    for assigned in overrides:
        key, _, value = assigned.partition("=")
        tree: Any = config.model_dump()
        for part in key.split("."):
            tree = tree[part]
        found = {name: tree[name] for name in yaml.safe_load(value)} if isinstance(tree, dict) else tree
        assert found == yaml.safe_load(value)


def test_data_that_is_held_out_and_data_of_its_own_replace_each_other():
    said = list[str]()
    held_out = parse_config(MINIMAL, ["data.held_out=0.1", "data.held_out_seed=3"])
    other = parse_config(dump_config(held_out), ["data.eval=[{path: b}]"], say=said.append)
    assert (other.data.held_out, other.data.held_out_seed) == (0, 0)
    assert [sentence.split(" replaces ")[1] for sentence in said] == [
        "data.held_out: 0.1 of config.",
        "data.held_out_seed: 3 of config.",
    ]
    assert parse_config(dump_config(other), ["data.held_out=0.2"]).data.eval == []


def test_a_setting_of_an_earlier_release_that_nobody_has_set_is_passed_over():
    assert parse_config(MINIMAL, ["data.loss_on=null"]) == parse_config(MINIMAL)


def test_overrides_that_contradict_each_other_are_refused():
    assert refusal("train.steps=1", "train.epochs=1").startswith("train.steps and train.epochs: both given.")


@pytest.mark.parametrize("value", ["/data #1: a", "null", "", "\U0001f600\n", "~", "'", 5, None, [{"path": "a: b"}]])
def test_an_assignment_gives_a_setting_this_very_value(value: object):
    config = parse_config(MINIMAL, [assignment("cluster.ray.runtime_env", {"any": value})])
    assert config.cluster.ray.runtime_env == {"any": value}


@pytest.mark.parametrize("name", ["data #1.jsonl", "a: b.jsonl", "\U0001f600.jsonl", "null"])
def test_a_path_that_yaml_would_read_otherwise_is_made_absolute_and_kept(name: str, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = parse_config(MINIMAL, [assignment("data.train", [{"path": name}]), assignment("run.store", name)])
    found = anchored(config)
    assert (found.data.train[0].path, found.run.store) == (str(tmp_path / name), str(tmp_path / name))


def test_dump_and_load_are_inverse():
    config = parse_config(MINIMAL, ["optim.betas=[0.8, 0.9]", "data.train_on.roles=all", "model.layers=2"])
    assert parse_config(dump_config(config)) == config
    assert "weight_decay" in dump_config(config), "defaults are written out"
    assert list(yaml.safe_load(dump_config(config))) == list(Config.model_fields), "a reader finds the run's name first"


def test_a_named_set_is_read_as_the_training_data_where_it_says_nothing_else():
    data = ["data.fields={messages: talk}", "data.template=a.jinja", "data.train_on.turns=last"]
    sets = ["eval.sets.same.path=a.jsonl", "eval.sets.text={path: b.jsonl, format: text, fields: {text: content}}"]
    config = parse_config(MINIMAL, [*data, *sets])
    same, text = (config.eval.sets[name].data(config.data) for name in ("same", "text"))
    kept = {"format", "fields", "template", "train_on"}
    assert same.model_dump(include=kept) == config.data.model_dump(include=kept)
    assert (text.format, text.fields, text.template, text.targets) == ("text", {"text": "content"}, None, "all")
    other = parse_config(
        MINIMAL,
        [
            "data.fields={messages: talk}",
            "data.held_out=5",
            "data.train_on.end=false",
            "eval.sets.text={path: b, format: text}",
        ],
    )
    text = other.eval.sets["text"].data(other.data)
    assert ([source.path for source in text.train], text.fields, text.held_out) == (["b"], {}, 0)
    assert text.train_on.end is False


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("quantt.type=nf4", "quantt: unknown setting. Did you mean 'quant'?"),
        ("tuning.rnk=8", "tuning.rnk: unknown setting. Did you mean 'rank'?"),
        ("train.lr=1e-4", "train.lr: unknown setting. Did you mean 'optim.lr'?"),
        ("run.zzzzzz=1", "run.zzzzzz: unknown setting. Allowed here: name, store, store_retry, store_timeout, seed."),
        ("data.train=[{path: a, wieght: 2}]", "data.train[0].wieght: unknown setting. Did you mean 'weight'?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(setting: str, expected: str):
    assert refusal(setting) == expected


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "quant.type=nf5",
            "quant.type: 'nf5' is not allowed. Allowed are ",
        ),
        (
            "tuning.rank=0",
            "tuning.rank: 0 is not allowed. Input should be greater than or equal to 1. Example: 16.",
        ),
        (
            "optim.lr=yes",
            "optim.lr: true is not allowed. Input should be a number, without zeros before it. Example: 0.0002.",
        ),
        ("tuning.rank=on", "tuning.rank: true is not allowed. Input should be a number"),
        ("train.steps=010", "train.steps: '010' is not allowed. Input should be a number, without zeros before it."),
        ("train.steps=1:30", "train.steps: '1:30' is not allowed. Input should be a valid integer"),
        ("model.layers=true", "model.layers: true is not allowed. Input should be a number"),
        ("quant.block_size=010", "quant.block_size: '010' is not allowed. Input should be a number"),
        ("cluster.gpus_per_worker=true", "cluster.gpus_per_worker: true is not allowed. Input should be a number"),
        ("optim.betas=[0.9, true]", "optim.betas: [0.9, True] is not allowed. Input should be a number"),
        (
            "cluster.ray.resources={a: true}",
            "cluster.ray.resources: {'a': True} is not allowed. Input should be a number",
        ),
        ("data.train=[{path: a, weight: true}]", "data.train[0].weight: true is not allowed. Input should be a number"),
        ("data.train=[]", "data.train: [] is not allowed. List should have at least 1 item"),
        ("data.train=[{path: a, weight: -1}]", "data.train[0].weight: -1 is not allowed."),
        (
            "tuning.targets=linear",
            "tuning.targets: 'linear' is not allowed. Input should be 'auto' or 'all-linear' or a list.",
        ),
        ("tuning.targets=[q_proj, 1]", "tuning.targets[1]: 1 is not allowed. Input should be text."),
        ("eval.sets.general.form=text", "eval.sets.general.form: unknown setting. Did you mean 'format'?"),
        ("eval.sets.general.format=text", "eval.sets.general.path: missing, and it has no default."),
        ("eval.sets.eval.path=a", "eval.sets: 'eval' is not allowed as a name."),
        (
            "eval.sets.a={path: b, format: text, fields: {messages: c}}",
            "eval.sets.a.fields: 'messages' is not a field of",
        ),
        ("data.train=[{path: a, take: 2.5}]", "take: 2.5 is not allowed. Give a whole number of rows, or a share"),
        (
            "data.train=[{path: a, take: 1.0}]",
            "take: 1.0 is not allowed. Leave it out for all rows, or give 1 for a single one.",
        ),
        ("data.train=[{path: a, take_seed: 2}]", "take_seed: has no effect without take."),
        ("tuning.targets=['re:(']", "tuning.targets: 're:(' is no regular expression"),
        ("tuning={method: full, train: ['re:(']}", "tuning.train: 're:(' is no regular expression"),
        ("tuning.layers=[4, 4]", "tuning.layers: [4, 4] is not allowed."),
        ("train.stop_when={no_better: 2}", "train.stop_when.no_better: the best checkpoint would not be kept."),
        ("train.stop_when={loss_steps: 2}", "train.stop_when.loss_steps: has no effect without loss_above."),
        ("eval.per_epoch=2", "eval.per_epoch: has no effect without data.eval, data.held_out or eval.sets."),
        ("eval={every: 5, per_epoch: 2}", "eval.every and eval.per_epoch: both given. Set one of them."),
        ("eval.per_epoch=-1", "eval.per_epoch: -1"),
        (
            "data.held_out=12.5",
            "data.held_out: 12.5 is not allowed. Give a whole number of rows, or a share of them below",
        ),
        ("data.held_out=1.0", "data.held_out: 1.0 leaves nothing to train on."),
        ("cluster.copies=true", "cluster.copies: has no effect without cluster.keeper. Set cluster.keeper: true too."),
        ("cluster.spares=1", "cluster.spares: has no effect without cluster.keeper. Set cluster.keeper: true too."),
        (
            "cluster={keeper: true, spares: 1, workers: [2, 4]}",
            "cluster.spares: 1 is not allowed with cluster.workers: [2, 4]. A spare machine keeps the number of ranks.",
        ),
        (
            "cluster={keeper: true, spares: 1, workers: 2, ray: {placement: SPREAD}}",
            "cluster.spares: 1 is not allowed with cluster.ray.placement: SPREAD, which puts ranks on all machines.",
        ),
        ("cluster={keeper: true, spares: -1}", "cluster.spares: -1 is not allowed."),
        ("eval.every=5", "eval.every: has no effect without data.eval, data.held_out or eval.sets."),
        ("train.sample_every=5", "train.sample_every: has no effect without eval.prompts."),
        ("data.fields=text", "data.fields: 'text' is not allowed. Input should be a section of names and values."),
        ("model=tiny", "model: 'tiny' is not allowed. Input should be a section of settings."),
        (
            "train.activation_checkpointing=some",
            (
                "train.activation_checkpointing: 'some' is not allowed. Give auto, all, none, or a number of layers, at"
                " least 0."
            ),
        ),
        ("train.activation_checkpointing=-1", "train.activation_checkpointing: -1 is not allowed."),
        ("train.tiled_mlp=maybe", "train.tiled_mlp: 'maybe' is not allowed. Give auto, true or false."),
        ("run.name=../x", "run.name: '../x' is not allowed."),
        (
            "run.name=my run",
            "run.name: 'my run' is not allowed. Name of the run, and of its folder in the store: up to 100",
        ),
        ("eval.prompts=''", "eval.prompts: '' is not allowed. String should have at least 1 character"),
        ("run.name=5", "run.name: 5 is not allowed. Input should be text. Example: llama-8b-support."),
        ("train.profile=[3, 2]", "train.profile: [3, 2] is not allowed. Give the first and the last step to trace"),
        ("train.profile=[0, 2]", "train.profile: [0, 2] is not allowed."),
        (
            "train.profile=[2, 11]",
            (
                "train.profile: [2, 11] is not allowed. Give the first and the last step to trace, counted from 1, at"
                " most train.steps: 10."
            ),
        ),
        ("train.profile=[2]", "train.profile"),
        ("cluster.slurm.gpu_type=h100", "cluster.slurm.gpu_type: has no effect without cluster.slurm.gpus_per_node."),
        (
            "cluster.slurm.memory_per_node=true",
            "cluster.slurm.memory_per_node: true is not allowed. Input should be text",
        ),
        ("cluster.slurm.signal_seconds=29", "cluster.slurm.signal_seconds: 29 is not allowed."),
        ("cluster.slurm.comment=' '", "cluster.slurm.comment: ' ' is not allowed. It is one line of printable text"),
        (r'cluster.slurm.setup=[a, "b\nc"]', r"cluster.slurm.setup: 'b\nc' is not allowed. It is one line of"),
        ("cluster.slurm.extra=['--mem 5']", "cluster.slurm.extra: '--mem 5' is not allowed. Give each option as"),
        (
            "cluster.ray.runtime_env={working_dir: .}",
            "cluster.ray.runtime_env: working_dir is the snapshot of your checkout and cannot be set.",
        ),
        ('data.train=[{path: a, replace: {"re:(": b}}]', "replace: 're:(': is no regular expression with this"),
        (r"data.train=[{path: a, replace: {'re:x': '\1'}}]", "replace: 're:x': is no regular expression with this"),
        (
            "cluster.ray.resources={disk: -.inf}",
            "cluster.ray.resources: {'disk': -inf} is not allowed. Numbers are finite",
        ),
        ("optim.betas=[0.9, 1]", "optim.betas: [0.9, 1.0] is not allowed. Both must be in [0, 1)."),
        ("optim.betas=[0.9, 1.5]", "optim.betas: [0.9, 1.5] is not allowed. Both must be in [0, 1)."),
        (
            "train=5",
            (
                "train: 5 is not allowed. Input should be a section of settings. Give its settings one by one. Example:"
                " train.steps=1000."
            ),
        ),
        (
            "data.train_on=all",
            "data.train_on: 'all' is not allowed. Input should be a section of settings. Give its settings",
        ),
        ("train={steps: 1, epochs: 1}", "train.steps and train.epochs: both given."),
        ("train={epochs: 0}", "train.epochs: 0 is not allowed. Input should be greater than 0. Example: 2.5."),
        (
            "data={train: [{path: a}], train_on: {roles: all, turns: last}}",
            "data.train_on.turns: last has no effect with roles: all. Name roles, or remove it.",
        ),
        (
            "data={train: [{path: a}], loss_on: last_assistant}",
            "data.loss_on: 'last_assistant' is said by data.train_on now. Write data.train_on.turns: last.",
        ),
        (
            "data={train: [{path: a}], loss_on: completion}",
            "data.loss_on: 'completion' is said by data.train_on now. Remove it, or choose by data.train_on.roles.",
        ),
        (
            "data={train: [{path: a}], format: chat, fields: {text: body}}",
            "data.fields: 'text' is not a field of data.format: chat.",
        ),
        (
            "data.train=[{path: a, format: text, fields: {prompt: b}}]",
            "fields: 'prompt' is not a field of data.format:",
        ),
        ("data.train_on.roles=[]", "data.train_on.roles: [] leaves nothing to train. Name a role, or remove it."),
        ("tuning.targets=[]", "tuning.targets: [] leaves nothing to learn. Name layers, or set all-linear."),
        ("data.fields={body: text}", "data.fields: 'body' is not a field of any data.format. Allowed are answer,"),
        ("optim.lr=.nan", "optim.lr: nan is not allowed."),
        ("optim.eps=.inf", "optim.eps: inf is not allowed. Numbers are finite here, and at most 4294967296."),
        ("timeouts.step=1e400", "timeouts.step: '1e400' is not allowed. Numbers are finite here"),
        ("run.store_retry=1e300", "run.store_retry: '1e300' is not allowed. Numbers are finite here"),
        ("train.steps=99999999999999", "train.steps: 99999999999999 is not allowed. Numbers are finite here"),
        (
            "cluster.ray.resources={a: .nan}",
            "cluster.ray.resources: {'a': nan} is not allowed. Numbers are finite here",
        ),
        ("cluster.ray.runtime_env={a: [.inf]}", "cluster.ray.runtime_env: {'a': [inf]} is not allowed. Numbers are"),
        ("run.name=data", "run.name: 'data' is not allowed. The store keeps what runs share in a folder of this name."),
        ("run.name=bases", "run.name: 'bases' is not allowed."),
        ('run.name="a\\n"', "run.name: 'a\\n' is not allowed."),
        ("run.name={name: 1, name: 2}", "override 'run.name={name: 1, name: 2}', line 1, column 11 is not YAML"),
        ("train.steps=0b_", "override 'train.steps=0b_', line 1, column 1 is not YAML: '0b_' cannot be read as"),
        (f"run.name=[{'x' * 5000}]", "run.name: ['xxxxxx"),
        ("a." * 5000 + "b=1", "override 'a.a.a."),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_with_setting_value_and_remedy(setting: str, expected: str):
    message = refusal(setting)
    assert message.startswith(expected)
    assert "\n" not in message
    assert len(message) < 400


def test_the_folders_that_a_store_shares_are_no_names_of_runs():
    for shared in (layout.dataset("x"), layout.bases("x"), layout.environment("x")):
        assert "a folder of this name" in refusal(f"run.name={shared.partition('/')[0]}")


@pytest.mark.parametrize("roles", ["all", "whole"])
def test_last_turns_are_those_of_named_roles_alone(roles: str):
    assert f"data.train_on.turns: last has no effect with roles: {roles}" in refusal(
        f"data.train_on={{roles: {roles}, turns: last}}"
    )


def test_fractions_leave_something_to_the_sources_without_one():
    def mixed(*fractions: float | None) -> list[str]:
        sources = [{"path": f"{at}.jsonl"} | ({"fraction": it} if it else {}) for at, it in enumerate(fractions)]
        return [assignment("data.train", sources)]

    assert [source.fraction for source in parse_config(MINIMAL, mixed(0.5, 0.25, None)).data.train] == [0.5, 0.25, None]
    for wrong in ((0.5, 0.5, None), (0.75, 0.5, None), (0.25, 0.25), (0.5,)):
        said = f"data.train: the fractions {', '.join(str(one) for one in wrong if one)} leave nothing to the other"
        assert said in refusal(*mixed(*wrong))


@pytest.mark.parametrize("share", ["weight: 2", "fraction: 0.5"])
def test_sources_that_are_evaluated_have_no_shares(share: str):
    given = f"data.eval=[{{path: a.jsonl}}, {{path: b.jsonl, {share}}}]"
    assert "data.eval[1]: weight and fraction have no effect" in refusal(given)


def test_a_setting_without_effect_is_refused():
    for name in ("double", "cache"):
        message = refusal("quant.type=none", f"quant.{name}=true")
        assert message.startswith(f"quant.{name}: true has no effect with quant.type: none.")


def test_every_mistake_is_named_at_once():
    message = refusal("quant.type=nf5", "tuning.rank=0")
    assert [line.split(":")[0] for line in message.splitlines()] == ["quant.type", "tuning.rank"]


def test_of_very_many_mistakes_twenty_are_named():
    message = refusal(text=MINIMAL + "".join(f"x{number}: 1\n" for number in range(1000)))
    assert len(message.splitlines()) == 21
    assert message.endswith("... and 980 more like these.")
    for number, more in ((20, False), (21, True)):
        message = refusal(text=MINIMAL + "".join(f"x{at}: 1\n" for at in range(number)))
        assert message.endswith("... and 1 more like these.") is more


def test_a_missing_setting_is_named_with_an_example():
    message = refusal(text=MINIMAL.replace("{base: /models/tiny}", "{}"))
    assert message == "model.base: missing, and it has no default. Example: /models/Llama-3.1-8B."


@pytest.mark.parametrize("bad", ["train.steps", "=3"])
def test_an_override_without_key_or_value_is_refused(bad: str):
    assert refusal(bad) == f"override {bad!r}: expected key=value. Example: train.steps=20."


def test_an_override_below_a_value_is_refused():
    assert refusal("run.name.first=x") == "override 'run.name.first=x': 'name' is a value, not a section."


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError, match=r"none\.y.*No such file"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"the configuration 'a\\x00' cannot be read: .*null"):
        load_config("a\0")


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("run: {name: é}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml is not text in UTF-8 \(byte 12\)\. Save it as UTF-8\."):
        load_config(path)


def test_text_that_is_not_yaml_is_refused_with_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run:\n  name: [a\ntrain: {}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml, line 3, column \d+ is not YAML"):
        load_config(path)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- list\n"])
def test_yaml_that_is_no_tree_is_refused(text: str):
    assert "its top level must be sections" in refusal(text=text)


def _all_fields():
    def walk(model: type[BaseModel], prefix: str):
        for path, field in fields(model, prefix):
            yield path, field
            for argument in get_args(field.annotation):
                if isinstance(argument, type) and issubclass(argument, BaseModel):
                    yield from walk(argument, f"{path}[].")

    yield from walk(Config, "")


@pytest.mark.parametrize(("path", "field"), [pytest.param(path, field, id=path) for path, field in _all_fields()])
def test_every_setting_has_a_description_and_a_valid_example(path: str, field):
    assert field.description, f"{path} has no description"
    assert field.examples, f"{path} has no example"
    allowed: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    for example in field.examples:
        as_written = yaml.safe_load(yaml.safe_dump(example))
        TypeAdapter(allowed).validate_python(as_written)


def test_the_json_schema_describes_every_section():
    schema = Config.model_json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["$defs"]["Train"]["properties"]["global_batch"]["unit"] == "rows"
    methods = schema["$defs"]["Tuning"]["properties"]["method"]["oneOf"]
    assert [one["const"] for one in methods] == sorted(one["const"] for one in methods)
    assert next(one["description"] for one in methods if one["const"] == "dora"), "an editor shows it beside the name"


@pytest.mark.parametrize(
    ("engine", "gpus"), [("own", 0), ("serve", 6), (["http://gpu-1:8000"], 0)], ids=["own", "serve", "addresses"]
)
def test_only_servers_that_start_with_the_run_take_gpus(engine: Any, gpus: int) -> None:
    settings = RolloutSettings(engine=engine, serve=Serve(replicas=3, gpus=2))
    assert settings.serving_gpus == gpus


def test_a_chapter_of_answers_is_what_its_updates_learn_from():
    settings = RolloutSettings(updates=4)
    assert [settings.chapter(step) for step in (0, 3, 4, 8)] == [0, 0, 1, 2]
    assert [settings.first_step(chapter) for chapter in (0, 1, 2)] == [0, 4, 8]
    assert [settings.chapters(steps) for steps in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]


def test_answers_lag_as_far_as_a_server_of_another_process_may():
    def lag(**given: Any) -> int:
        return RolloutSettings(updates=4, **given).lag

    assert [lag(engine="own"), lag(engine="serve"), lag(engine="serve", max_lag=0), lag(engine="serve", max_lag=9)] == [
        0,
        4,
        0,
        9,
    ]


@pytest.mark.parametrize("option", ["--port=1", "--served-model-name=x", "--served_model_name=x", "--api_key"])
def test_options_that_servers_are_started_with_are_not_given_again(option: str):
    assert f"rollout.serve.options: {option} is not allowed" in refusal(f"rollout.serve.options=[{option}]")


@pytest.mark.parametrize("workers", ["0", "[0, 2]", "[3, 2]", "[1, 2, 3]", "[2]", "[1, true]", "2.5"])
def test_workers_are_a_number_or_a_range_from_one(workers: str):
    assert "is not allowed. Give a whole number from 1, or [fewest, most]" in refusal(f"cluster.workers={workers}")


def test_workers_at_the_edge_are_a_number_and_a_range():
    both = [parse_config(MINIMAL, [f"cluster.workers={given}"]).cluster for given in ("1", "[1, 1]", "[1, 3]")]
    assert [(one.fewest_workers, one.most_workers) for one in both] == [(1, 1), (1, 1), (1, 3)]


def test_the_best_checkpoints_are_those_of_evaluations_however_often_they_are():
    for often in ("every: 5", "per_epoch: 2"):
        best = parse_config(MINIMAL, ["data.held_out=0.1", f"eval={{{often}}}", "checkpoint.keep_best=1"])
        assert best.checkpoint.keep_best == 1
    assert "checkpoint.keep_best: has no effect" in refusal("data.held_out=0.1", "checkpoint.keep_best=1")


def test_a_path_may_begin_at_home_and_a_folder_is_read_and_a_pipe_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_path("~/rows.jsonl", "data.train") == tmp_path / "rows.jsonl"
    check_files([tmp_path, tmp_path / "none"], "data.train")
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"^data.train: .*/pipe cannot be read: it is no file, but a pipe"):
        check_files([tmp_path, pipe], "data.train")


def test_ranks_that_share_rows_are_a_number_that_stays():
    assert "cluster.workers: [2, 4] lets the number of ranks change" in refusal(
        "cluster.workers=[2, 4]", "sharding.sequence_parallel=2"
    )
    assert "cluster.workers: 3 is no multiple of sharding.sequence_parallel: 2" in refusal(
        "cluster.workers=3", "sharding.sequence_parallel=2"
    )
    parse_config(MINIMAL, ["cluster.workers=4", "sharding.sequence_parallel=2"])
    parse_config(MINIMAL, ["cluster.workers=[2, 4]"])


@pytest.mark.parametrize(
    "given",
    [
        "data.train=[{path: a, take: 1}]",
        "train.activation_checkpointing=0",
        "optim.betas=[0, 0]",
        "data.train=[{path: a, skip: 1, take_seed: 2}]",
        "data={train: [{path: a}], min_length: 2048, sequence_length: 2048}",
        "cluster={keeper: true, spares: 1, workers: [2, 2]}",
        "data={train: [{path: a}], format: prompt_completion, train_on: {roles: [assistant]}}",
        "data={train: [{path: a}], format: pictures, images: {min_pixels: 700, max_pixels: 700}}",
        "data.held_out=1",
        "cluster.copies=false",
        "cluster.slurm={memory_per_node: 2T, time: '2-00:00:00', signal_seconds: 30}",
        "cluster.slurm={memory_per_node: 64000, time: '90', extra: [-x, --exclusive]}",
    ],
)
def test_a_value_at_the_edge_of_what_is_allowed_is_taken(given: str):
    parse_config(MINIMAL, [given])


@pytest.mark.parametrize(
    ("layers", "setting", "kept"), [(4, "0", 0), (4, "3", 3), (4, "9", 4), (4, "all", 0), (4, "none", 4)]
)
def test_so_many_of_the_last_layers_keep_their_activations(layers: int, setting: str, kept: int):
    config = parse_config(MINIMAL, [f"train.activation_checkpointing={setting}"])
    assert config.train.kept_layers(layers) == kept


@pytest.mark.parametrize(
    ("limits", "size", "expected"),
    [
        ({"max_pixels": 100}, (10, 10), (10, 10)),
        ({"max_pixels": 100}, (20, 15), (11, 8)),
        ({"max_pixels": 100}, (1, 100_000), (1, 100)),
        ({"max_pixels": 100}, (100_000, 1), (100, 1)),
        ({"min_pixels": 100}, (10, 10), (10, 10)),
        ({"min_pixels": 100}, (3, 7), (7, 16)),
        ({"min_pixels": 50, "max_pixels": 100}, (6, 12), (6, 12)),
    ],
)
def test_a_picture_keeps_its_proportions_and_a_pixel_between_its_limits(
    limits: dict[str, int], size: tuple[int, int], expected: tuple[int, int]
):
    assert Images.model_validate(limits).limited(size) == expected


def test_what_decides_the_tokens_of_pictures_is_where_they_are_and_not_from_where_a_run_is_started(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert Images(root="pictures").decisive == {"root": str(tmp_path / "pictures")}
    assert Images(root="s3://bucket/pictures", read_ahead=0).decisive == {"root": "s3://bucket/pictures"}


def test_a_setting_that_may_be_written_in_two_ways_is_one():
    assert parse_config(MINIMAL, ["data.today='20260630'"]).data.today == "2026-06-30"
    one, other = (
        parse_config(MINIMAL, [f"data.train_on.roles={roles}"]).data.beyond_targets
        for roles in ("[tool, assistant]", "[assistant, tool]")
    )
    assert one == other == {"roles": ["assistant", "tool"]}


def test_saves_by_the_epoch_take_the_place_of_those_by_steps_unless_both_are_given():
    def steps(*given: str) -> int:
        return parse_config(MINIMAL, given).checkpoint.every_steps

    assert steps() > 0
    assert steps("checkpoint.per_epoch=2") == 0
    assert steps("checkpoint={per_epoch: 2, every_steps: 7}") == 7
    assert steps("checkpoint.per_epoch=0") == steps()
