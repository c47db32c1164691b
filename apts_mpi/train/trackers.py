"""Loggers to MLflow and Weights & Biases, both into the directory of the run and without a server."""

from __future__ import annotations

import importlib
from typing import Any

from apts_mpi.errors import InvalidInput
from apts_mpi.train.logger import Logger, LoggerSetting, Record, scalars, tagged


def package(name: str) -> Any:
    """An optional package, or `InvalidInput` where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidInput(
            f"logger: the package of {name!r} cannot be imported ({error}); pip install apts_mpi[{name}], or choose "
            "another logger"
        ) from error


class MLflow(Logger):
    """A run of MLflow in ``mlflow.db`` of the run directory, with the options as parameters; a resumed one is another.

    That has the metrics of all iterations, those before it was resumed among them.
    """

    @classmethod
    def check(cls) -> None:
        """See `Logger`."""
        package("mlflow")

    def __init__(self, setting: LoggerSetting) -> None:
        super().__init__(setting)
        tracking = package("mlflow.tracking")
        place = (setting.directory / "mlflow.db").absolute()
        # Not mlflow's own functions: their state is the process's, which may have runs of its own.
        self._client = tracking.MlflowClient(tracking_uri=f"sqlite:///{place}")
        self._run = self._client.create_run("0", run_name=setting.directory.name).info.run_id
        for name, value in setting.configuration.items():
            self._client.log_param(self._run, name, value)
        for record in setting.earlier:
            self._log(record)

    def _log(self, record: Record) -> None:
        for name, value in tagged(record).items():
            self._client.log_metric(self._run, name, value, step=record["iteration"])

    def on_iteration(self, record: Record) -> None:
        """See `Logger`."""
        self._log(record)

    def on_epoch(self, record: Record) -> None:
        """See `Logger`."""
        self._log(record)

    def on_end(self, summary: Record) -> None:
        """See `Logger`."""
        self._client.set_tag(self._run, "reason", summary["reason"])
        self._client.set_terminated(self._run)


class WandB(Logger):
    """A run of Weights & Biases, offline, in ``wandb`` of the run directory; ``wandb sync`` sends it later.

    A resumed run is a new one there, with the metrics of all iterations.
    """

    @classmethod
    def check(cls) -> None:
        """See `Logger`."""
        package("wandb")

    def __init__(self, setting: LoggerSetting) -> None:
        super().__init__(setting)
        wandb = package("wandb")
        self._run = wandb.init(
            dir=setting.directory,
            name=setting.directory.name,
            project="apts_mpi",
            mode="offline",
            config=dict(setting.configuration),
            reinit="create_new",
            # It would take over standard output, and write there.
            settings=wandb.Settings(console="off", silent=True),
        )
        for record in setting.earlier:
            self._log(record)

    def _log(self, record: Record) -> None:
        self._run.log(tagged(record), step=record["iteration"])

    def on_iteration(self, record: Record) -> None:
        """See `Logger`."""
        self._log(record)

    def on_epoch(self, record: Record) -> None:
        """See `Logger`."""
        self._log(record)

    def on_end(self, summary: Record) -> None:
        """See `Logger`."""
        self._run.summary.update({**dict(scalars(summary)), "reason": summary["reason"]})

    def close(self) -> None:
        """See `Logger`."""
        self._run.finish()
