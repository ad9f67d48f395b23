"""A run's settings are resolved once: all that they name is found, and all that does not fit is said."""

import pytest

from tests.material import Workshop
from trainer.base.find.locate import resolve_base
from trainer.errors import ConfigError
from trainer.plan.resolve import Resolved, resolve
from trainer.run import environment
from trainer.state.optimizer.optimizer import find_optimizer


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("resolve"), "speck")


def test_everything_that_the_settings_name_is_found(workshop: Workshop) -> None:
    config = workshop.config("any", "optim.name=adafactor", "objective.name=dpo", "data.format=preference")
    found = resolve(config)
    assert found.config is config
    assert found.base.name == str(workshop.base)
    assert found.method.identity == {"method": "lora", "rank": 8, "alpha": 16.0}
    assert found.objective.identity == {"name": "dpo"}
    assert found.optimizer is find_optimizer(config.optim)
    assert found.reference == "adapter_off"
    identity = found.identity("data")
    assert (identity.dataset, identity.optimizer, identity.adapter) == ("data", "adafactor", found.method.identity)
    assert identity.base["fingerprint"] == found.base.fingerprint


def test_all_that_does_not_fit_is_said_at_once(workshop: Workshop) -> None:
    config = workshop.config("any", "tuning={method: full}", "objective.name=dpo", "data.sequence_length=100000")
    with pytest.raises(ConfigError) as raised:
        resolve(config)
    said = str(raised.value).splitlines()
    assert len(said) >= 3
    for setting in ("data.sequence_length", "quant.type", "data.format"):
        assert any(sentence.startswith(setting) for sentence in said), setting


def test_a_base_that_is_known_is_not_looked_for_again(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    base = resolve_base(workshop.config("any").model)
    monkeypatch.setattr("trainer.plan.resolve.resolve_base", lambda model: pytest.fail("looked for again"))
    assert resolve(workshop.config("any"), base).base is base
    assert Resolved.of(workshop.config("any"), base).base is base


def test_a_package_that_is_not_installed_is_left_out_of_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package"))
    assert environment.versions().keys() == {"torch"}
