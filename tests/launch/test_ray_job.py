"""launch/ray.sh: its YAML is a RayJob as KubeRay's CRD has it, and its command is one that `omni-jax` takes."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.launch.test_scripts import parsed, run, strict, tools  # noqa: F401 (a fixture)
from tests.repository import ROOT

JOB = shlex.split("--name embed --image images/omni:1 --bucket b --decoders 32")
SLICE = shlex.split("--accelerator tpu-v6e-slice --topology 4x4 --chips 4 --slices 2")
EMBED = ["embed", "--model", "gs://b/omni7b", "--manifest", '/bucket/it\'s "mine" \\.jsonl', "--out", "/bucket/clips.npz"]
PREPARE = ["prepare", "--manifest", "/bucket/clips.jsonl", "--out", "/bucket/shards"]


@pytest.fixture(scope="module")
def schema() -> Any:
    """KubeRay's schema of ray.io/v1 RayJob, without descriptions and status; what it says several times is in $defs."""
    return strict(json.loads((Path(__file__).parent / "rayjob_v1.schema.json").read_text()))


def job(*words: str) -> Any:
    text = run("ray.sh", *words)
    assert "{{" not in text
    return yaml.safe_load(text)


def command(found: Any) -> Any:
    """Returns the arguments that the head's shell hands to `omni-jax`."""
    line, end = found["spec"]["entrypoint"].rsplit(" || ", 1)
    assert end == "test $? -eq 1"
    return parsed(shlex.split(line))


@pytest.mark.costly
@pytest.mark.parametrize(("topology", "chips", "hosts"), [("4x4", 4, 4), ("2x4", 8, 1), ("2x2", 4, 1), ("1x1", 4, 1)])
def test_embedding_makes_a_rayjob_of_cpu_nodes_and_slices(schema: Any, topology: str, chips: int, hosts: int) -> None:
    found = job(*JOB, *SLICE, "--topology", topology, "--chips", str(chips), "--dry-run", "--", *EMBED)
    jsonschema.validate(found, schema)
    decode, embed = found["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (decode["minReplicas"], decode["maxReplicas"]) == (1, 32) and (embed["minReplicas"], embed["maxReplicas"]) == (1, 2)
    assert embed["numOfHosts"] == hosts
    (container,) = embed["template"]["spec"]["containers"]
    of_host = int(container["resources"]["limits"]["google.com/tpu"])
    assert of_host * hosts == math.prod(map(int, topology.split("x")))
    assert "google.com/tpu" not in decode["template"]["spec"]["containers"][0]["resources"]["limits"]
    args = command(found)
    assert (args.ray, args.actors, args.actor_resources) == ("auto", 2 * hosts, {"TPU": of_host})
    assert args.manifest == EMBED[4] and str(args.model) == EMBED[2]


def test_preparing_makes_a_rayjob_without_chips(schema: Any) -> None:
    found = job(*JOB, "--dry-run", "--", *PREPARE)
    jsonschema.validate(found, schema)
    (decode,) = found["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert decode["groupName"] == "decode" and command(found).ray == "auto"


def test_the_head_notices_a_lost_node_within_the_promised_time() -> None:
    head = job(*JOB, "--dry-run", "--", *PREPARE)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    told = {variable["name"]: int(variable["value"]) for variable in head["env"]}
    limits = (told["RAY_health_check_period_ms"], told["RAY_health_check_timeout_ms"])
    assert max(limits) * told["RAY_health_check_failure_threshold"] + told["RAY_health_check_period_ms"] <= 30_000


def test_the_version_of_ray_is_that_of_the_image() -> None:
    (locked,) = re.findall(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert job(*JOB, "--dry-run", "--", *PREPARE)["spec"]["rayClusterSpec"]["rayVersion"] == locked
    assert '"ray[default]"' in (ROOT / "launch/Dockerfile").read_text()


@pytest.mark.costly
def test_the_schema_refuses_what_the_cluster_would(schema: Any) -> None:
    for path, field in ((("spec",), "backofLimit"), (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec"), "volumess")):
        found = job(*JOB, "--dry-run", "--", *PREPARE)
        place = found
        for name in path:
            place = place[name]
        place[field] = 1
        with pytest.raises(jsonschema.ValidationError, match=field):
            jsonschema.validate(found, schema)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([*JOB[2:], "--", *PREPARE], "--name is missing"),
        ([*JOB], "nothing to run"),
        ([*JOB, "--", *EMBED], "embed needs them"),
        ([*JOB, *SLICE, "--", *PREPARE], "prepare decodes on CPU nodes alone"),
        ([*JOB, "--", "train"], "use launch/gke.sh for other commands"),
        ([*JOB, "--decoders", "many", "--", *PREPARE], "--decoders takes a whole number"),
        ([*JOB, *SLICE, "--chips", "3", "--", *EMBED], "not so many whole hosts"),
        ([*JOB, "--", *PREPARE], "kubectl is not on PATH"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments: list[str], line: str) -> None:
    said = run("ray.sh", *arguments, status=2)
    assert said.count("\n") == 1 and said.startswith("launch/ray.sh: ") and line in said
