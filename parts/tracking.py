"""Send a run of train.py to MLflow as well as to log.jsonl: `--track=mlflow`.

    pip install -r requirements-mlflow.txt
    python train.py config/shapes.py --track=mlflow
    mlflow ui                                              # then open http://127.0.0.1:5000

MLFLOW_TRACKING_URI says where runs go; the default is MLflow's own, `mlflow.db` in the working
directory. Training never fails because of tracking, though it does not start if its experiment or
run was deleted. A run that cannot be started is not tracked, and metrics that cannot be sent wait
until the next evaluation; one line on stderr says so.
"""

import atexit
import os
import sys
import time
from pathlib import Path

from parts.common import UserError, extras, write_text


class Tracker:
    """A run called `name`, in the experiment MLFLOW_EXPERIMENT_NAME or else "nanocaption".

    `kind` is "mlflow", or "none" for a tracker that does nothing, as in all processes but the
    first. The settings become parameters. The run's id is kept in `run_dir`, so that `resume`
    continues the same run. Without settings, files are added to that run, and nothing else of it
    changes. Raise UserError if MLflow is not installed, or if the run was deleted there.
    """

    def __init__(self, kind: str, settings: dict | None, run_dir: Path, name="", resume=False):
        self.run_id = None
        self.waiting = []  # metrics to send
        self.failed = False
        if kind == "none":
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # By default, MLflow tries for minutes to reach a server that is down.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        extras("mlflow", "sqlalchemy", file="requirements-mlflow.txt")
        import mlflow
        from sqlalchemy.exc import SQLAlchemyError

        self.mlflow = mlflow
        self.errors = (mlflow.MlflowException, SQLAlchemyError, OSError)  # OSError: the network
        self.attempt(self.start, settings, run_dir / "mlflow_run", name, resume)

    def start(self, settings: dict | None, id_file: Path, name: str, resume: bool) -> None:
        self.client = self.mlflow.MlflowClient()
        trains = settings is not None
        if trains and not (resume and id_file.is_file()):
            self.create(settings, id_file, name)
        if not id_file.is_file():
            raise UserError(f"{id_file} not found: train with --track=mlflow first")
        run_id = id_file.read_text(encoding="utf-8").strip()
        if self.client.get_run(run_id).info.lifecycle_stage == "deleted":
            restore = f"restore it (mlflow runs restore --run-id {run_id}), or delete {id_file}"
            raise UserError(f"tracking: this run was deleted in MLflow: {restore}")
        if trains:
            self.client.update_run(run_id, "RUNNING")
            atexit.register(self.close, "FAILED")  # if an error ends the script before `close`
        self.run_id = run_id  # only now is there a run to send to

    def create(self, settings: dict, id_file: Path, name: str) -> None:
        """Make a run of these settings, and write its id to the file."""
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "nanocaption")
        known = self.client.get_experiment_by_name(title)
        if known and known.lifecycle_stage == "deleted":
            restore = f"restore it (mlflow experiments restore -x {known.experiment_id})"
            choose = "choose another name with MLFLOW_EXPERIMENT_NAME"
            raise UserError(
                f"tracking: experiment {title} was deleted in MLflow: {restore}, or {choose}"
            )
        experiment = self.mlflow.set_experiment(title).experiment_id
        run_id = self.client.create_run(experiment, run_name=name).info.run_id
        params = [self.mlflow.entities.Param(key, str(x)) for key, x in settings.items()]
        self.client.log_batch(run_id, params=params)
        write_text(id_file, run_id + "\n")

    def attempt(self, call, *args) -> None:
        """Call a function that needs MLflow. Report the first failure, and ignore the others."""
        try:
            call(*args)
        except self.errors as error:
            if not self.failed:
                reason = " ".join(str(error).split())[:200]
                print(f"tracking failed, the script continues: {reason}", file=sys.stderr)
            self.failed = True

    def log(self, row: dict) -> None:
        """Send a row of log.jsonl: its numbers as metrics at its step, its samples as a file."""
        if not self.run_id:
            return
        now = time.time_ns() // 10**6
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step":
                metric = self.mlflow.entities.Metric(key, float(value), now, row["step"])
                self.waiting.append(metric)
        # Each failure may take a time-out: after the first, try at evaluations only.
        if not self.failed or "val_loss" in row:
            self.attempt(self.send, row)

    def send(self, row: dict) -> None:
        while self.waiting:
            self.client.log_batch(self.run_id, metrics=self.waiting[:1000])  # MLflow's limit
            del self.waiting[:1000]
        if row.get("samples"):
            text = "\n".join(row["samples"]) + "\n"
            self.client.log_text(self.run_id, text, f"samples/{row['step']:07d}.txt")

    def artifact(self, path: Path) -> None:
        """Keep a copy of a file, such as ckpt.pt or gallery.html, with the run."""
        if self.run_id:
            self.attempt(self.client.log_artifact, self.run_id, str(path))

    def close(self, status: str = "FINISHED") -> None:
        """Send the metrics that wait, and end the run; one stopped by a signal is KILLED."""
        if self.run_id:
            self.attempt(self.send, {})
            self.attempt(self.client.set_terminated, self.run_id, status)
            self.run_id = None
