"""The scripts of launch/: what they would run is what `omni-jax` takes, their YAML is a JobSet, and what cannot be is said in a line."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from omni_jax.cli.main import build_parser
from omni_jax.planning.chips import CHIPS
from tests.repository import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
ENVIRONMENT: dict[str, str] = {}
TRAIN = ["train", "--config", "configs/omniretriever_7b.py", "--workdir", "gs://b/runs/a b", "--config.mesh.fsdp=16"]
VM = shlex.split("--name omni --zone z --type v5litepod-16 --version v2 --source gs://b/o.tar.gz --workdir gs://b/run")
GKE = shlex.split("--name omni7b --image images/omni:1 --bucket b --accelerator tpu-v5-lite-podslice --topology 4x4")
ODD = '--config.model.base=a "b" \\c'


@pytest.fixture(scope="module", autouse=True)
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with all that the scripts may call: no script finds gcloud or kubectl, even where they are installed."""
    folder = tmp_path_factory.mktemp("tools")
    for name in ("bash", "grep", "dirname", "mkdir", "cat"):
        (folder / name).symlink_to(shutil.which(name) or name)
    sleep = folder / "sleep"
    sleep.write_text("#!/usr/bin/env bash\n")
    sleep.chmod(0o755)
    ENVIRONMENT["PATH"] = str(folder)
    return folder


def run(script: str, *arguments: str, status: int = 0) -> str:
    """Returns what a script said: stdout where it went well, stderr where it did not."""
    environment = dict(ENVIRONMENT)
    done = subprocess.run([LAUNCH / script, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def parsed(words: list[str]) -> Any:
    """Returns the arguments as `omni-jax` reads them; it raises for one that it does not know."""
    assert words[0] == "omni-jax"
    return build_parser(words[1]).parse_args(words[1:])


def unquoted(line: str) -> list[str]:
    return shlex.split(line)


def hosts_words(words: list[str]) -> list[list[str]]:
    """Returns the commands that host.sh would run when started with these words."""
    assert words[0].endswith("launch/host.sh")
    lines = run("host.sh", "--dry-run", *words[1:]).splitlines()
    assert lines[0] == "export OMNI_JAX_COORDINATOR=auto"
    return [unquoted(line) for line in lines[1:] if not line.startswith("export ")]


def libtpu_args(words: list[str]) -> list[str]:
    """Returns the options in LIBTPU_INIT_ARGS of a host whose host.sh is started with these words."""
    said = run("host.sh", "--dry-run", *words[1:]).splitlines()
    exported = [unquoted(line)[1] for line in said if line.startswith("export LIBTPU_INIT_ARGS=")]
    return exported[0].split("=", 1)[1].split() if exported else []


def gke_words(accelerator: str, *more: str) -> list[str]:
    """Returns the words that a host's container starts with."""
    topology = "2x2x4" if accelerator == "tpu7x" else "4x4"
    text = run("gke.sh", *GKE, "--accelerator", accelerator, "--topology", topology, *more, "--dry-run", "--", *TRAIN)
    return yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]


def test_there_are_scripts_and_all_can_be_started() -> None:
    assert {path.name for path in SCRIPTS} == {"gke.sh", "host.sh", "local.sh", "ray.sh", "tpu_vm.sh"}
    assert all(path.stat().st_mode & 0o111 for path in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    tool = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([tool if tool.exists() else shutil.which("shellcheck") or "shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_option_is_in_the_text_at_the_top(script: Path) -> None:
    text = script.read_text()
    top = text[: text.index("set -euo")]
    taken = set(re.findall(r"--[a-z][a-z-]+", " ".join(re.findall(r"^    (--[a-z |\-]+)\)", text, re.MULTILINE))))
    assert taken and taken <= set(re.findall(r"--[a-z][a-z-]+", top))


def test_local_prints_a_command_for_each_process() -> None:
    lines = run("local.sh", "--dry-run", "--processes", "3", "--devices", "4", "--", *TRAIN).splitlines()
    assert len(lines) == 3
    for index, line in enumerate(lines):
        words = unquoted(line)
        told = dict(word.split("=", 1) for word in words[1 : words.index("omni-jax")])
        assert told == {
            "OMNI_JAX_COORDINATOR": "127.0.0.1:8476",
            "OMNI_JAX_PROCESSES": "3",
            "OMNI_JAX_PROCESS": str(index),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
        }
        assert parsed(words[words.index("omni-jax") :]).overrides == ["mesh.fsdp=16"]


def test_a_host_tries_the_machine_first() -> None:
    smoke, train = hosts_words(["launch/host.sh", "--workdir", "gs://b/run", "--slices", "2", "--", *TRAIN])
    assert parsed(smoke).slices == 2 and str(parsed(smoke).workdir) == "gs://b/run"
    assert str(parsed(train).workdir) == "gs://b/runs/a b"
    (alone,) = hosts_words(["launch/host.sh", "--no-smoke", "--", *TRAIN])
    assert alone == ["omni-jax", *TRAIN]


def test_tpu_vm_asks_installs_runs_and_gives_back() -> None:
    before = "gcloud storage cp -r 'gs://b/my shards' ."
    lines = run("tpu_vm.sh", *VM, "--spot", "--delete", "--before", before, "--slices", "2", "--dry-run", "--", *TRAIN).splitlines()
    commands = [unquoted(line) for line in lines if not line.startswith("#")]
    assert all(words[:4] == ["gcloud", "compute", "tpus", "queued-resources"] for words in commands)
    create, install, prepare, start, delete = (words[4:] for words in commands)
    assert create[:2] == ["create", "omni"] and "--spot" in create
    assert create[create.index("--node-count") + 1] == "2"
    on_hosts = [words[-1] for words in (install, prepare, start)]
    for words in (install, prepare, start):
        assert words[:2] == ["ssh", "omni"] and {"--worker=all", "--node=all"} <= set(words)
    assert "gs://b/o.tar.gz" in on_hosts[0] and ".[tpu,gcs]" in on_hosts[0]
    assert on_hosts[1].endswith(before)
    words = unquoted(on_hosts[2].split("PATH=$PWD/.venv/bin:$PATH ")[1])
    smoke, train = hosts_words(words)
    assert parsed(smoke).slices == 2 and train == ["omni-jax", *TRAIN]
    assert delete[:2] == ["delete", "omni"]


GCLOUD = """#!/usr/bin/env bash
# A cloud that takes the slice away during the first run.
echo "$4 ${*: -1}" >> "$LOG"
runs=$(grep -c host.sh "$LOG")
case $4 in
  describe) if [[ -e $LOG.slice ]]; then cat "$LOG.slice"; else exit 1; fi ;;
  create) echo ACTIVE > "$LOG.slice" ;;
  delete) rm "$LOG.slice" ;;
  ssh) if [[ $* == *host.sh* && $runs == 1 ]]; then echo SUSPENDED > "$LOG.slice" && exit 255; fi ;;
esac
"""


def test_tpu_vm_asks_again_for_what_was_taken_away(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rm").symlink_to(shutil.which("rm") or "rm")
    cloud, log = tmp_path / "gcloud", tmp_path / "log"
    cloud.write_text(GCLOUD)
    cloud.chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{tmp_path}:{tools}")
    monkeypatch.setitem(ENVIRONMENT, "LOG", str(log))
    run("tpu_vm.sh", *VM, "--delete", "--", *TRAIN)
    called = [line.split()[0] for line in log.read_text().splitlines()]
    done = [word for word in called if word != "describe"]
    assert done == ["create", "ssh", "ssh", "delete", "create", "ssh", "ssh", "delete"]


@pytest.mark.jit
@pytest.mark.parametrize(
    ("slices", "topology", "chips", "hosts"), [(1, "4x4", 4, 4), (2, "16x16", 4, 64), (1, "2x2", 4, 1), (1, "1x1", 4, 1)]
)
def test_gke_makes_a_jobset(slices: int, topology: str, chips: int, hosts: int) -> None:
    words = [*GKE[:-1], topology, "--slices", str(slices), "--chips", str(chips), "--dry-run", "--", *TRAIN, ODD]
    text = run("gke.sh", *words)
    assert "{{" not in text
    found = yaml.safe_load(text)
    schema = json.loads((Path(__file__).parent / "jobset_v1alpha2.schema.json").read_text())
    jsonschema.validate(found, strict(schema))
    (job,) = found["spec"]["replicatedJobs"]
    assert job["replicas"] == slices
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == hosts
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] * hosts == math.prod(map(int, topology.split("x")))
    smoke, train = hosts_words(container["command"])
    assert parsed(smoke).slices == slices and str(parsed(smoke).workdir) == "gs://b/runs/omni7b"
    assert train == ["omni-jax", *TRAIN, ODD]


def test_a_v7x_job_runs_with_the_options_it_was_compiled_with() -> None:
    wanted = [f"--{name}={str(value).lower()}" for name, value in CHIPS["v7x"].compiler]
    words = gke_words("tpu7x")
    assert words[words.index("--libtpu") + 1].split() == wanted  # and so the dry run shows them
    assert libtpu_args(words) == wanted and len(hosts_words(words)) == 2
    for accelerator in ("tpu-v4-podslice", "tpu-v5-lite-podslice", "tpu-v5p-slice", "tpu-v6e-slice"):
        assert libtpu_args(gke_words(accelerator)) == []


def test_what_is_set_in_libtpu_init_args_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = CHIPS["v7x"].compiler
    monkeypatch.setitem(ENVIRONMENT, "LIBTPU_INIT_ARGS", f"--xla_other=3 --{second[0]}")
    mine = ["--xla_other=3", f"--{second[0]}"]
    assert libtpu_args(gke_words("tpu-v6e-slice")) == mine  # gke.sh takes it to the hosts
    words = gke_words("tpu7x")
    for on_host, kept in (("", mine), (f"--{first[0]}=true", [f"--{first[0]}=true", *mine])):
        monkeypatch.setitem(ENVIRONMENT, "LIBTPU_INIT_ARGS", on_host)
        assert libtpu_args(words) == (kept if on_host else [*kept, f"--{first[0]}=false"])


def strict(schema: Any) -> Any:
    """Returns the schema with fields that it does not name refused, as the cluster's API refuses them."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    return made


@pytest.mark.costly
def test_the_schema_refuses_what_the_cluster_would() -> None:
    schema = strict(json.loads((Path(__file__).parent / "jobset_v1alpha2.schema.json").read_text()))
    found = yaml.safe_load(run("gke.sh", *GKE, "--dry-run", "--", *TRAIN))
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 4
    with pytest.raises(jsonschema.ValidationError, match="paralelism"):
        jsonschema.validate(found, schema)


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("local.sh", ["--processes", "two", "--", "train"], "--processes takes a whole number"),
        ("local.sh", ["--processes", "0", "--", "train"], "--processes must be 1 or more"),
        ("local.sh", [], "nothing to run"),
        ("local.sh", ["train"], "unknown option train"),
        ("local.sh", ["--", "train"], "omni-jax is not on PATH"),
        ("host.sh", ["--", "train"], "--workdir is missing"),
        ("host.sh", ["--workdir", "gs://b", "--slices", "0", "--", "train"], "--slices takes"),
        ("host.sh", ["--workdir", "gs://b", "--libtpu", "--no-smoke", "--", "train"], "--libtpu takes options of libtpu"),
        ("tpu_vm.sh", [*VM[2:], "--", "train"], "--name is missing"),
        ("tpu_vm.sh", [*VM[:-1], "runs", "--", "train"], "every host must see it"),
        ("tpu_vm.sh", [*VM, "--type", "tpu7x-16", "--", "train"], "use launch/gke.sh"),
        ("tpu_vm.sh", [*VM, "--", "train"], "gcloud is not on PATH"),
        ("gke.sh", [*GKE[:-1], "4by4", "--", "train"], "write 4x4"),
        ("gke.sh", [*GKE, "--chips", "3", "--", "train"], "not so many whole hosts"),
        ("gke.sh", [*GKE, "--name", "Omni_7B", "--", "train"], "small letters"),
        ("gke.sh", [*GKE, "--image", 'a" b', "--", "train"], "letters, digits"),
        ("gke.sh", [*GKE, "--", "train"], "kubectl is not on PATH"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(script: str, arguments: list[str], line: str) -> None:
    said = run(script, *arguments, status=2)
    assert said.count("\n") == 1 and said.startswith(f"launch/{script}: ") and line in said


def test_the_image_holds_what_the_command_needs() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]}
    assert {"omni_jax", "conversion", "configs", "launch", "requirements.lock", "requirements-tpu.lock", "pyproject.toml"} <= copied
    assert all((ROOT / name).exists() for name in copied)
    assert "--require-hashes -r requirements.lock" in text and re.search(r"^USER (?!root)", text, re.MULTILINE)
