"""MLflow. The server, or the database, and its credentials come from the environment: MLFLOW_TRACKING_URI and so on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.run.folder import leaves
from trainer.run.trackers import Page, ServiceKind, StepPoints

_ID = "capstan.id"
_CURVE = "train/loss"
_METRICS_A_REQUEST = 1000
_PARAMETERS_A_REQUEST = 100
_ENDS = {"finished": "FINISHED", "stopped": "KILLED"}


class Mlflow:
    """One run in MLflow for all starts, found by a tag.

    MLflow would store twice what it gets twice, so this tracker asks MLflow for what it has.
    """

    def __init__(self, page: Page) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._client.get_experiment_by_name(page.project)
        place = experiment.experiment_id if experiment else self._client.create_experiment(page.project)
        found = self._client.search_runs([place], f"tags.`{_ID}` = '{page.id}'", max_results=1)
        run = found[0] if found else self._client.create_run(place, run_name=page.name, tags=_tags(page))
        self._run: str = run.info.run_id
        self._client.update_run(self._run, "RUNNING")
        self._keep_settings(page.settings, run.data.params)
        history = self._client.get_metric_history(self._run, _CURVE)
        self.shown: int = max((metric.step for metric in history), default=page.shown)

    def _keep_settings(self, settings: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """Store the settings as parameters.

        MLflow never changes parameters, so a new value of a resumed run becomes a tag.
        """
        from mlflow.entities import Param, RunTag

        values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in leaves(settings)}
        for part in _parts([Param(name, value) for name, value in values.items() if name not in known]):
            self._client.log_batch(self._run, params=part)
        changed = {name: value for name, value in values.items() if known.get(name, value) != value}
        for part in _parts([RunTag(f"changed.{name}", value) for name, value in changed.items()]):
            self._client.log_batch(self._run, tags=part)

    def show(self, rows: Sequence[StepPoints]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(curve, value, round(row.time * 1000), row.step)
            for row in rows
            for curve, value in row.points.items()
        ]
        for part in _parts(metrics, _METRICS_A_REQUEST):
            self._client.log_batch(self._run, metrics=part)

    def close(self, outcome: str | None) -> None:
        self._client.set_terminated(self._run, _ENDS.get(outcome or "", "FAILED"))


def _tags(page: Page) -> dict[str, str]:
    """Return MLflow's tags, which have values.

    The user's tags are words: `group` and each word become names of tags.
    """
    group = {"group": page.group} if page.group else {}
    return {_ID: page.id, **group, **dict.fromkeys(page.tags, "true")}


def _parts(items: list[Any], most: int = _PARAMETERS_A_REQUEST) -> Iterator[list[Any]]:
    return (items[begin : begin + most] for begin in range(0, len(items), most))


SERVICES = {"mlflow": ServiceKind(Mlflow, "mlflow")}
