"""Sends a run of train.py to a tracker beside log.jsonl: `--track=mlflow`.

    pip install -r requirements-mlflow.txt
    python train.py config/shapes.py --track=mlflow
    mlflow ui                                              # then open http://127.0.0.1:5000

Runs go where MLFLOW_TRACKING_URI says, a server or a database, and else to MLflow's own default,
`mlflow.db` here. Training never fails because tracking does: a run that cannot be started is not
tracked, and metrics that cannot be sent are kept and sent later; either is said on one line.
"""

import os
import sys
import time
from pathlib import Path

from configurator import UserError

PAUSE = 60  # seconds before a tracker that failed is tried again


class Tracker:
    """A run called `name`, in the experiment MLFLOW_EXPERIMENT_NAME or else nanocaption.

    Args:
        kind: "mlflow", or "none", with which every call does nothing.
        settings: what is recorded as parameters.
        run_dir: the run's folder; MLflow's id of the run is kept there, in `mlflow_run`.
        resume: go on with the run whose id that is, if there is one.

    With several processes only the first makes one that is not "none". Raises UserError where
    MLflow is not installed.
    """

    def __init__(
        self, kind: str, settings: dict, run_dir: Path | str, name: str, resume: bool = False
    ):
        self.run, self.waiting, self.after, self.warned = None, [], 0.0, False
        if kind == "none":
            return
        # MLflow would report its use to its makers, and try for minutes to reach a server that is
        # away.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        try:
            import mlflow
            from sqlalchemy.exc import SQLAlchemyError
        except ImportError as error:
            raise UserError(
                f"{error.name} is missing: pip install -r requirements-mlflow.txt"
            ) from None
        # What MLflow raises itself, or lets through from its database; requests' are OSErrors.
        self.mlflow = mlflow
        self.failures = (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError)
        self.send(self.start, settings, Path(run_dir) / "mlflow_run", name, resume)

    def start(self, settings: dict, seen: Path, name: str, resume: bool) -> None:
        self.client = self.mlflow.MlflowClient()
        if resume and seen.is_file():
            run = seen.read_text(encoding="utf-8").strip()
            self.client.update_run(run, "RUNNING")
        else:
            wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", "nanocaption")
            known = self.client.get_experiment_by_name(wanted)
            experiment = known.experiment_id if known else self.client.create_experiment(wanted)
            run = self.client.create_run(experiment, run_name=name).info.run_id
            params = [self.mlflow.entities.Param(k, str(v)) for k, v in settings.items()]
            self.client.log_batch(run, params=params)
            seen.parent.mkdir(parents=True, exist_ok=True)
            seen.write_text(run + "\n", encoding="utf-8")
        self.run = run  # from here on there is a run to send to

    def send(self, call, *args, **named) -> bool:
        """Whether `call` succeeded. After a failure nothing is tried for a while."""
        if time.monotonic() < self.after:
            return False
        try:
            call(*args, **named)
        except self.failures as error:
            if not self.warned:
                reason = " ".join(str(error).split())[:200]
                print(f"tracking failed, training goes on: {reason}", file=sys.stderr)
            self.after, self.warned = time.monotonic() + PAUSE, True
            return False
        return True

    def log(self, row: dict) -> None:
        """A row of log.jsonl: its numbers become metrics at its step, its samples a text file."""
        if not self.run:
            return
        step, now = row["step"], time.time_ns() // 10**6
        self.waiting += [
            self.mlflow.entities.Metric(name, float(value), now, step)
            for name, value in row.items()
            if isinstance(value, int | float) and name != "step"
        ]
        self.flush()
        if row.get("samples"):
            text = "\n".join(row["samples"]) + "\n"
            self.send(self.client.log_text, self.run, text, f"samples/{step:07d}.txt")

    def flush(self) -> None:
        while self.waiting and self.send(
            self.client.log_batch, self.run, metrics=self.waiting[:1000]
        ):
            del self.waiting[:1000]

    def artifact(self, path: Path | str) -> None:
        """Keeps a copy of a file, such as ckpt.pt or gallery.html, with the run."""
        if self.run:
            self.after = 0.0  # rare enough to be tried whatever failed before
            self.send(self.client.log_artifact, self.run, str(path))

    def close(self, status: str = "FINISHED") -> None:
        """Sends what is waiting and ends the run; a run stopped by a signal is KILLED."""
        if self.run:
            self.after = 0.0
            self.flush()
            self.send(self.client.set_terminated, self.run, status)
