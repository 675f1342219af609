"""What is said where a cluster cannot be used, and what an actor asks a cluster for."""

from __future__ import annotations

import io
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omni_jax.cli.main import main
from omni_jax.cli.progress import Progress
from omni_jax.engines import ray_cluster
from omni_jax.engines.ray_cluster import check_address, check_code, code_stamp
from omni_jax.engines.ray_models import capacity, wanted
from omni_jax.engines.ray_workers import leave_the_slice
from omni_jax.types import InputError
from tests.train.tiny_run import free_port

PREPARE = ["prepare", "--manifest", "clips.jsonl", "--out", "shards"]
EMBED = ["embed", "--model", "omni7b", "--manifest", "clips.jsonl", "--out", "clips.npz"]


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def web() -> Iterator[str]:
    """The address of a server that is no cluster."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_address_that_does_not_answer_is_said_at_once(
    silent: str, web: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    for command in (PREPARE, EMBED):
        line = one_line([*command, "--ray", nobody], capsys)
        assert f"--ray {nobody}: does not answer (Connection refused)" in line and "start the cluster or check the address" in line
    assert "no Ray cluster answers there; give the port of 'ray start --head'" in one_line([*PREPARE, "--ray", web], capsys)
    monkeypatch.setattr(ray_cluster, "CONNECT_S", 0.2)
    assert f"--ray {silent}: does not answer (timed out)" in one_line([*PREPARE, "--ray", silent], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*PREPARE, "--ray", "somewhere"], "give local, auto, or HOST:PORT of the cluster's head"),
        ([*PREPARE, "--ray", "head:99999"], "give local, auto, or HOST:PORT of the cluster's head"),
        ([*PREPARE, "--ray", "ray://head:10001"], "the command must run on a node of the cluster"),
        ([*PREPARE, "--ray", "auto", "--workers", "4"], "a cluster decodes on all CPUs that it has; leave it out, or choose --ray local"),
        ([*PREPARE, "--ray", "local", "--workers", "0"], "give 1 or more"),
        ([*EMBED, "--actors", "4"], "--actors: is for models on a cluster; add --ray ADDRESS or leave it out"),
        ([*EMBED, "--ray", "local", "--actor-resources", "TPU"], "'TPU' is not NAME=N,... with numbers above 0, as TPU=4"),
        ([*EMBED, "--ray", "local", "--actor-resources", "TPU=0"], "'TPU=0' is not NAME=N,... with numbers above 0, as TPU=4"),
    ],
)
def test_arguments_that_do_not_go_together_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in one_line(arguments, capsys)


def test_a_missing_ray_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    line = one_line([*PREPARE, "--ray", "auto"], capsys)
    assert line == "omni-jax: ray is not installed; --ray needs it: run pip install 'omni-jax[ray]'"


def test_a_node_with_other_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_code(code_stamp())
    with pytest.raises(
        InputError, match=r"^node \S+ has omni_jax \S+ \(\w{8}\), the command 0\.0\.1 \(abc\); install the same on all nodes$"
    ):
        check_code("0.0.1 (abc)")


def test_local_and_auto_are_looked_for_by_ray_itself() -> None:
    check_address("local")
    check_address("auto")


def cluster(*nodes: dict[str, float]) -> Any:
    """A stand-in for `ray` that knows its nodes alone."""
    return SimpleNamespace(
        nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {"TPU": 9}}]
    )


def test_an_actor_asks_for_what_the_nodes_have() -> None:
    slices = cluster({"CPU": 64}, {"CPU": 8, "TPU": 4}, {"CPU": 8, "TPU": 4})
    assert wanted(slices, {}) == {"TPU": 4} and capacity(slices, {"TPU": 4}) == 2 and capacity(slices, {"TPU": 1}) == 8
    assert wanted(cluster({"CPU": 8, "GPU": 8}), {}) == {"GPU": 1} and capacity(cluster({"CPU": 8, "GPU": 8}), {"GPU": 1}) == 8
    assert wanted(cluster({"CPU": 2}, {"CPU": 2}), {}) == {} and capacity(cluster({"CPU": 2}, {"CPU": 2}), {}) == 2
    assert wanted(slices, {"TPU": 1}) == {"TPU": 1}  # what is asked for comes first
    assert capacity(cluster({"CPU": 2}), {"TPU": 4}) == 1  # and is asked for where an autoscaler may have it


def test_a_host_of_several_takes_its_own_chips_for_the_whole() -> None:
    environment = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
    leave_the_slice(environment, ["0", "1", "2", "3"])
    assert environment == {
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1",
    }
    alone = {"TPU_WORKER_HOSTNAMES": "localhost"}
    leave_the_slice(alone, ["0"])
    assert alone == {"TPU_WORKER_HOSTNAMES": "localhost"}


def test_counts_reach_the_progress_line_and_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.util import metrics

    exported: dict[str, float] = {}

    class Metric:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self._name = name
            assert description and tag_keys == ("command",)

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert tags == {"command": "embed"}
            exported[self._name] = exported.get(self._name, 0) + value

        def set(self, value: float, tags: dict[str, str]) -> None:
            exported[self._name] = value

    monkeypatch.setattr(metrics, "Counter", Metric)
    monkeypatch.setattr(metrics, "Gauge", Metric)
    progress = Progress(10, "embed", stream=io.StringIO())
    counters = ray_cluster.Counters("embed", progress)
    counters.add(clips=4, skipped=1, silent=0)
    counters.add(clips=3, bytes=2_500_000_000)
    counters.tick("2 models")
    assert progress.detail == "1 skipped, 0 silent, 2.50 GB, 2 models"
    assert exported.pop("omni_jax_clips_per_second") > 0
    assert exported == {"omni_jax_clips": 7, "omni_jax_skipped": 1, "omni_jax_bytes": 2_500_000_000}


def test_nothing_but_the_engines_knows_ray() -> None:
    from tests import repository

    knowing = {
        found.file.relative_to(repository.ROOT).as_posix()
        for file in repository.sources(*repository.PRODUCT)
        for found in repository.imports(file)
        if found.name.split(".")[0] == "ray"
    }
    assert knowing and all(Path(name).parent.as_posix() == "omni_jax/engines" for name in knowing)
