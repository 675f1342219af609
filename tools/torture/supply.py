"""Part `supply`: what is installed is pinned by hash, nothing of a download is run as code, and no command asks the network."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests import repository
from tests.train import tiny_run
from tools import licences
from tools.torture import commands
from tools.torture.outcome import Outcome, begun

# In a process of its own, because an audit hook cannot be taken off: refuses every look-up of a host and every connection but local ones.
_OFFLINE = """
import sys
sys.path.insert(0, {root!r})
from tests.offline import refuse_network
refuse_network()
from omni_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
# Calls that run what they are given, or load it as objects.
_RUNS = {"eval", "exec", "compile", "pickle.load", "pickle.loads", "torch.load", "marshal.loads", "dill.load", "joblib.load", "yaml.load"}
# Where one is right: the pipe between this project's own processes.
_ALLOWED = {("omni_jax/media/workers.py", "pickle.load"), ("omni_jax/media/workers.py", "pickle.loads")}


def run(seed: int, minutes: float, *, offline: bool = True) -> Outcome:
    """Returns what was tried and lost."""
    with begun("supply", seed, minutes) as (outcome, _, folder):
        locks(outcome)
        sources(outcome)
        if offline:
            commands_offline(outcome, folder)
    return outcome


def locks(outcome: Outcome) -> None:
    """Every pin of the lock that users install has hashes, and every pinned package a licence."""
    text = (repository.ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    pinned = [line for line in text.splitlines() if line and not line.startswith("#")]
    bare = [line.split()[0] for line in pinned if not re.search(r"--hash=sha256:[0-9a-f]{64}", line)]
    outcome.expect(not bare, f"without a hash: {bare}")
    outcome.tried.append(("pins with the hashes of their files", len(pinned)))
    unknown = [name for name in licences.pins() if licences.licence(name) == "not stated"]
    outcome.expect(not unknown, f"packages without a stated licence: {unknown}")
    outcome.expect(licences.PAGE.read_text(encoding="utf-8") == licences.page(), "licences.md differs; run python -m tools.licences")
    outcome.tried.append(("licences listed in docs/reports/licences.md", len(licences.pins())))


def sources(outcome: Outcome) -> None:
    """No call of the product trusts remote code, unpickles, evaluates or allows pickles in arrays."""
    files = repository.sources(*repository.PRODUCT)
    for file in files:
        where = str(file.relative_to(repository.ROOT))
        for node in ast.walk(repository.tree(file)):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            outcome.expect(name not in _RUNS or (where, name) in _ALLOWED, f"{where}:{node.lineno} calls {name}")
            for keyword in node.keywords:
                if keyword.arg in ("trust_remote_code", "allow_pickle"):
                    plain = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                    outcome.expect(plain, f"{where}:{node.lineno} {keyword.arg}={ast.unparse(keyword.value)}")
            if name.endswith(".from_pretrained") and "Tokenizer" in name and name != "Tokenizer.from_pretrained":
                given = {k.arg for k in node.keywords}
                outcome.expect({"trust_remote_code", "local_files_only"} <= given, f"{where}:{node.lineno} {name} may ask a hub")
    outcome.tried.append(("files of the product read for code that runs downloads", len(files)))


def commands_offline(outcome: Outcome, folder: Path) -> None:
    """Every command that reads or writes a user's files, in processes that may not look up or connect to any host."""
    config = tiny_run.make_files(folder)
    clips, fields = folder / "clips" / "train.jsonl", ("frames=2", "pixels=3136", "audio_seconds=1")
    short = [f"--config.{change}" for change in ("steps=1", "data.workers=1", "evaluation.manifest=")]
    golden, model = commands.golden(), folder / "model"
    adapter = ["--adapter", str(golden.adapter_dir)]
    usual = ["--model", str(model), *commands.settings()]
    file, tables = str(folder / "e.npz"), "text,video,audio,av,tv,at"
    steps = [
        ["convert", "to-jax", "--base", str(golden.checkpoint), *adapter, "--out", str(model)],
        ["embed", *usual, "--manifest", str(golden.manifest), "--out", file, "--tables", tables],
        ["eval", file, "--html", str(folder / "e.html"), "--compare", "published"],
        ["search", *usual, "--index", file, "--text", "a whistle"],
        ["export", file, "--to", "faiss", "--out", str(folder / "faiss")],
        ["prepare", "--manifest", str(clips), "--out", str(folder / "more"), *(part for field in fields for part in ("--set", field))],
        ["train", "--config", str(config), "--workdir", str(folder / "run"), *short],
        ["convert", "to-torch", "--model", str(model), "--base-out", str(folder / "base"), "--adapter-out", str(folder / "adapter")],
    ]
    code = _OFFLINE.format(root=str(commands.ROOT))
    for step in steps:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", code, *step], capture_output=True, text=True, env=environment, timeout=commands.LIMIT_S
        )
        outcome.expect(done.returncode == 0, f"{step[0]} without network: status {done.returncode}, {json.dumps(done.stderr[-300:])}")
    outcome.tried.append(("commands run with every other host refused", len(steps)))
