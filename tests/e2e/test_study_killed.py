"""A study that was killed, or lost a worker, ends with the study.json of one left alone."""

import os
import random
import subprocess
import sys
import time

import pytest

STUDY = """
import sys
from dataclasses import replace
from pathlib import Path
from offramp.studies.study.config import StudyConfig
from offramp.studies.study.plan import Recipe
from offramp.studies.study.studies import STUDIES
from offramp.studies.study.study import run_study
from offramp.studies.study.workers import Workers

class Watcher:
    def on_plan(self, name, total, tokens): pass
    def on_timing(self, passes, tokens): pass
    def on_decoding(self, policies, prompt_tokens, new_tokens): pass
    def on_progress(self, progress): pass
    def on_done(self, name): pass

study = STUDIES["objectives"]
model = replace(
    study.model, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
    num_key_value_heads=2, head_dim=8, intermediate_size=32, exit_layers=(1,),
)
tiny = replace(
    study, name="tiny", tokenizer="characters", model=model,
    training=replace(study.training, seq_len=16, batch_size=4, warmup_steps=0),
    tokens=12_800, test_tokens=200, static_layers=(1, 3), seeds=3,
    recipes=(Recipe(label="half", training={"loss_weights": "asymmetric:0.5"}),),
)
out = Path(sys.argv[2])
ray = sys.argv[3] if len(sys.argv) > 3 else None
workers = Workers(folder=out / "runs", jobs=2, ray=ray)
run_study(tiny, StudyConfig(corpus=sys.argv[1]), out, watcher=Watcher(), workers=workers)
"""


def start(corpus, out, *ray):
    command = [sys.executable, "-c", STUDY, str(corpus), str(out), *ray]
    return subprocess.Popen(command, start_new_session=True)


def wait_for_the_workers(process):
    """Until none of its process group is left."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("workers outlive the study")


@pytest.mark.slow
def test_three_kills_change_nothing(tmp_path):
    corpus = tmp_path / "text.txt"
    corpus.write_text("The exits of a model stand after its blocks. " * 80)
    assert start(corpus, tmp_path / "alone").wait(240) == 0
    expected = (tmp_path / "alone" / "study.json").read_bytes()
    runs = len(list((tmp_path / "alone" / "runs").iterdir()))

    out, chance, found = tmp_path / "killed", random.Random(0), [0]
    for _ in range(3):
        process = start(corpus, out)
        deadline = time.monotonic() + 120
        while len(list(out.glob("runs/[0-9a-f]*"))) <= found[-1] and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.wait()
        wait_for_the_workers(process)
        found.append(len(list(out.glob("runs/[0-9a-f]*"))))
    assert found == sorted({*found})  # each time it got further,
    assert found[-1] < runs  # and was killed before it was done
    assert start(corpus, out).wait(240) == 0
    assert (out / "study.json").read_bytes() == expected
    assert not list(out.glob("runs/.*.tmp"))


@pytest.fixture
def cluster(monkeypatch):
    """A head that does no work, and two workers of one core."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    workers = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster, workers
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_cluster_that_loses_a_worker_changes_nothing(tmp_path, cluster):
    nodes, workers = cluster
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The exits of a model stand after its blocks. " * 80)
    assert start(corpus, tmp_path / "alone").wait(240) == 0
    expected = (tmp_path / "alone" / "study.json").read_bytes()
    runs = len(list((tmp_path / "alone" / "runs").iterdir()))

    out = tmp_path / "ray"
    process = start(corpus, out, nodes.address)
    deadline = time.monotonic() + 180
    while not list(out.glob("runs/[0-9a-f]*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # both work at the next runs
    nodes.remove_node(workers[1], allow_graceful=False)
    found = len(list(out.glob("runs/[0-9a-f]*")))
    assert process.wait(240) == 0
    assert 1 <= found < runs  # it was lost before all was done
    assert (out / "study.json").read_bytes() == expected
