"""metrics.csv: a row a step, continued by a resumed run."""

import pytest

from offramp.errors import CheckpointError
from offramp.training.metrics_file import MetricsFile, read_metrics


def test_values_of_a_step_share_a_row_and_new_columns_appear(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, first_step=1)
    file.write(10, {"loss": 2.0})
    file.write(20, {"loss": 1.5})
    file.write(20, {"validation_ppl_2": 4.0})
    assert path.read_text().splitlines() == ["step,loss,validation_ppl_2", "10,2.0,", "20,1.5,4.0"]


def test_a_resumed_run_replaces_the_steps_that_it_takes_again(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, first_step=1)
    for step in (10, 20, 30):
        file.write(step, {"loss": float(step)})
    with path.open("a") as torn:
        torn.write("40")  # killed in the middle of a row
    again = MetricsFile(path, first_step=21)
    again.write(30, {"loss": 0.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [
        ("10", "10.0"),
        ("20", "20.0"),
        ("30", "0.0"),
    ]


def test_a_row_is_on_disk_when_it_is_written(tmp_path):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, first_step=1)
    for number, values in enumerate(({"loss": 2.0}, {"validation_ppl_2": 4.0}, {"lr": 0.1})):
        file.write(20, values)
        [row] = read_metrics(path)
        assert len(row) == number + 2
    file.write(30, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(path)] == ["20", "30"]


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(CheckpointError, match="a column step"):
        read_metrics(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="readable CSV"):
        read_metrics(path)
