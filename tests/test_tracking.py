"""Tracking: what was sent is read back from MLflow, and a tracker that fails stops nothing."""

import functools
import importlib.util
import sys

import pytest

from parts.common import UserError
from parts.tracking import Tracker

needs_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None,
    reason="needs pip install -r requirements-mlflow.txt",
)


def test_none_does_nothing_and_imports_nothing(tmp_path):
    before = set(sys.modules)
    tracker = Tracker("none", {"seed": 1}, tmp_path, "run")
    tracker.log({"step": 1, "loss": 2.0, "samples": ["a dog"]})
    tracker.artifact("no such file")
    tracker.close()
    assert list(tmp_path.iterdir()) == [] and set(sys.modules) == before


def test_without_mlflow_the_error_names_the_requirements(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="pip install -r requirements-mlflow.txt"):
        Tracker("mlflow", {}, tmp_path, "run")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An MLflow database in an empty working directory, as by default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")


@needs_mlflow
def test_a_run_is_read_back_and_an_unreachable_server_stops_nothing(
    store, tmp_path, monkeypatch, capsys
):
    from mlflow import MlflowClient

    tracker = Tracker("mlflow", {"seed": 1337, "compile": None}, tmp_path / "out", "shapes")
    tracker.log({"step": 10, "loss": 3.5, "lr": 1e-3})
    tracker.log({"step": 20, "loss": 2.5, "lr": 2e-3})
    tracker.log({"step": 20, "CIDEr": 0.5, "samples": ["a dog", "un café"]})
    (tmp_path / "ckpt.pt").write_bytes(b"weights")
    tracker.artifact(tmp_path / "ckpt.pt")
    tracker.close("KILLED")

    resumed = Tracker("mlflow", {"seed": 1338}, tmp_path / "out", "shapes", resume=True)
    resumed.log({"step": 30, "loss": float("nan")})
    log_batch = resumed.client.log_batch
    attempts = []

    def unreachable(run_id, metrics):
        attempts.append(metrics[-1].step)
        raise ConnectionError("the server\nis unreachable")

    monkeypatch.setattr(resumed.client, "log_batch", unreachable)
    resumed.log({"step": 40, "loss": 1.5})
    resumed.log({"step": 50, "loss": 1.25})
    assert attempts == [40]  # step 50 did not wait for another time-out
    monkeypatch.setattr(resumed.client, "log_batch", log_batch)
    resumed.log({"step": 60, "loss": 1.0})
    assert len(resumed.waiting) == 3
    resumed.log({"step": 60, "val_loss": 2.0})  # an evaluation sends what has waited
    assert not resumed.waiting
    resumed.log({"step": 70, "loss": 0.5})
    resumed.close()  # so does the end
    warning = "tracking failed, the script continues: the server is unreachable"
    assert [line for line in capsys.readouterr().err.splitlines() if "failed" in line] == [warning]

    client = MlflowClient()
    experiment = client.get_experiment_by_name("nanocaption")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "shapes" and run.info.status == "FINISHED"
    assert run.data.params == {"seed": "1337", "compile": "None"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history if m.step != 30] == [
        (10, 3.5), (20, 2.5), (40, 1.5), (50, 1.25), (60, 1.0), (70, 0.5)
    ]  # fmt: skip
    assert [m.value for m in client.get_metric_history(run.info.run_id, "CIDEr")] == [0.5]
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"ckpt.pt", "samples"}
    copy = client.download_artifacts(run.info.run_id, "samples/0000020.txt", str(tmp_path))
    with open(copy, encoding="utf-8") as file:
        assert file.read() == "a dog\nun café\n"


@needs_mlflow
def test_a_file_is_added_to_a_run_and_nothing_else_of_it_changes(store, tmp_path):
    """sample.py's gallery marked a run as finished while it was still training."""
    from mlflow import MlflowClient

    training = Tracker("mlflow", {"seed": 1}, tmp_path / "out", "shapes")
    client = MlflowClient()
    before = client.get_run(training.run_id).info
    (tmp_path / "gallery.html").write_text("page")
    Tracker("mlflow", None, tmp_path / "out").artifact(tmp_path / "gallery.html")
    assert [f.path for f in client.list_artifacts(training.run_id)] == ["gallery.html"]
    assert client.get_run(training.run_id).info == before and before.status == "RUNNING"


@needs_mlflow
def test_a_file_of_a_run_never_tracked_makes_no_run(store, tmp_path):
    """A run without a name and settings was made for it."""
    from mlflow import MlflowClient

    with pytest.raises(UserError, match="out/mlflow_run not found: train with --track=mlflow fir"):
        Tracker("mlflow", None, tmp_path / "out")
    assert MlflowClient().get_experiment_by_name("nanocaption") is None


@needs_mlflow
def test_a_run_that_an_error_ends_has_failed(store, tmp_path, monkeypatch):
    """It stayed RUNNING for good."""
    from mlflow import MlflowClient

    at_exit = []
    monkeypatch.setattr(
        "parts.tracking.atexit.register", lambda *call: at_exit.append(functools.partial(*call))
    )
    for close, status in ((False, "FAILED"), (True, "FINISHED")):
        tracker = Tracker("mlflow", {}, tmp_path / status, "shapes")
        run_id = tracker.run_id
        if close:
            tracker.close()
        at_exit.pop()()
        assert MlflowClient().get_run(run_id).info.status == status


@needs_mlflow
def test_what_was_deleted_in_mlflow_is_told_before_training(store, tmp_path, monkeypatch):
    """A whole run went untracked, and the one line said not what to do."""
    from mlflow import MlflowClient

    Tracker("mlflow", {}, tmp_path / "out", "run").close()
    run_id = (tmp_path / "out/mlflow_run").read_text().strip()
    client = MlflowClient()
    client.delete_run(run_id)
    with pytest.raises(UserError, match=f"deleted in MLflow: restore it .*{run_id}.*mlflow_run$"):
        Tracker("mlflow", {}, tmp_path / "out", "run", resume=True)
    client.delete_experiment(client.get_experiment_by_name("nanocaption").experiment_id)
    with pytest.raises(
        UserError, match="nanocaption was deleted .*name with MLFLOW_EXPERIMENT_NAM"
    ):
        Tracker("mlflow", {}, tmp_path / "out", "run")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    Tracker("mlflow", {}, tmp_path / "out", "run").close()


@needs_mlflow
@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nothing://x"])
def test_a_run_that_cannot_be_started_is_one_line_and_training_continues(
    tmp_path, monkeypatch, capsys, uri
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = Tracker("mlflow", {"seed": 1}, tmp_path, "run")
    tracker.log({"step": 1, "loss": 2.0, "samples": ["a dog"]})
    tracker.artifact("ckpt.pt")
    tracker.close()
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("tracking failed, the script continues: ")
