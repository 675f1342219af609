# Every target does its own set-up. A machine needs Python 3.11 (test-newest: 3.13), make and a package index, nothing else.
# .venv holds requirements.lock and this project; .venv-reference and .venv-tpu lie on top of it and add torch or libtpu alone, so that
# the plain environment stays what a user installs. .venv-lowest lies on it too, with the lowest versions that pyproject.toml allows;
# .venv-newest has the newest ones, for Python 3.13, and stands alone.

PYTHON ?= python3.11
PYTEST_ARGS ?=
# Workers of pytest-xdist, one a core; PYTEST_ARGS="-n 0" does without. A file stays on one worker, so that its fixtures are made once.
WORKERS = -n auto --dist loadfile --no-loadscope-reorder
# As on a user's machine: every optimization, and no program from another test.
FULL = --compiler full
# glibc asks for large pages: each update of the demo takes and gives back 400 MB, and the kernel would fill a hundred thousand small ones.
PAGES = GLIBC_TUNABLES=glibc.malloc.hugetlb=1
# Without bytecode each worker would parse and rewrite all test files, and each command all of the project.
unexport PYTHONDONTWRITEBYTECODE
# Of tens of thousands of modules few are imported, and an import writes its own bytecode.
PIP = -m pip install --quiet --disable-pip-version-check --no-deps --no-compile
SETUP = .venv/.installed
REFERENCE = .venv-reference/.installed
TPU = .venv-tpu/.installed
DOCS = .venv-docs/.installed
LOWEST = .venv-lowest/.installed
NEWEST = .venv-newest/.installed
# The one of PATH, or pyenv's newest where that is a shim without a version.
PYTHON313 ?= $(shell for p in python3.13 $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.13.*/bin/python3.13 2>/dev/null | sort -rV); \
	do "$$p" -c "import ensurepip" >/dev/null 2>&1 && { command -v "$$p"; break; }; done)
# Tests in which each dependency is used for what it is there for; of long files, those that no other test here stands for.
GRADIENTS = tests/train/test_golden_run.py::test_golden_losses_and_every_gradient
EMBED = tests/cli/test_embed.py::test_golden_
STACK = tests/config tests/features tests/media tests/tokens tests/conversion/test_safetensors_io.py tests/conversion/test_round_trip.py \
	tests/data/test_shards.py tests/data/test_pipeline.py tests/model/test_golden_encoder.py tests/retrieval/test_report.py \
	tests/retrieval/test_search.py tests/train/test_checkpoint.py tests/train/test_metrics.py tests/train/test_optimizer.py $(GRADIENTS) \
	$(EMBED)rows_from_media_files_through_the_command_line $(EMBED)demo_prints_the_table_and_the_difference \
	$(EMBED)vectors_of_clips_in_one_file_are_those_of_loose_files_bit_for_bit \
	tests/serve tests/conversion/test_hub.py tests/test_dependencies.py

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-ablation test-fast test-jit test test-slow test-reference test-tpu test-lowest test-newest python313 test-all docs test-docs bench \
	torture report-check serve-check pods-table lint format lock lock-docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(SETUP)  ## create .venv with the pinned packages and the project

$(SETUP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not on PATH; install Python 3.11 or run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x .venv/bin/python || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing requirements.lock"
	@.venv/bin/python $(PIP) -r requirements.lock
	@.venv/bin/python $(PIP) --no-build-isolation -e .
	@touch $@

# Lays an environment on top of .venv: packages installed here are found first, all others there.
define overlay
	@echo "installing $(2) into $(1)"
	@rm -rf $(1)
	@$(PYTHON) -m venv $(1)
	@echo "import site; site.addsitedir('$(CURDIR)/.venv/lib/python3.11/site-packages')" > $(1)/lib/python3.11/site-packages/base.pth
	@$(1)/bin/python $(PIP) -r $(2)
	@touch $(1)/.installed
endef

$(REFERENCE): requirements-reference.lock $(SETUP)
	$(call overlay,.venv-reference,requirements-reference.lock)

$(TPU): requirements-tpu.lock $(SETUP)
	$(call overlay,.venv-tpu,requirements-tpu.lock)

$(DOCS): requirements-docs.lock $(SETUP)
	$(call overlay,.venv-docs,requirements-docs.lock)

$(LOWEST): requirements-lowest.lock $(SETUP)
	$(call overlay,.venv-lowest,requirements-lowest.lock)

$(NEWEST): requirements-newest.lock
	@$(MAKE) --silent python313 >/dev/null
	@echo "installing requirements-newest.lock into .venv-newest"
	@rm -rf .venv-newest
	@$(PYTHON313) -m venv .venv-newest
	@.venv-newest/bin/python $(PIP) -r requirements-newest.lock
	@echo "$(CURDIR)" > .venv-newest/lib/python3.13/site-packages/project.pth
	@touch $@

python313:  # where Python 3.13 is
	@test -n "$(PYTHON313)" || { echo "make: no Python 3.13 on PATH or in pyenv; install one or run make PYTHON313=/path/to/python3.13" >&2; exit 2; }
	@echo $(PYTHON313)

demo: $(SETUP)  ## compare a tiny checkpoint with PyTorch, then train a small model on synthetic clips and score clips it never saw
	$(PAGES) .venv/bin/omni-jax demo

demo-ablation: $(SETUP)  ## what each loss buys on small synthetic clips, over five seeds: omni-jax ablate
	$(PAGES) .venv/bin/omni-jax demo --ablation

test-fast: $(SETUP)  ## what compiles nothing and takes no seconds
	.venv/bin/python -m pytest $(WORKERS) -m "not jit and not costly and not slow and not reference and not tpu and not docs" $(PYTEST_ARGS)

test-jit: $(SETUP)  ## the rest of make test: what compiles, or takes seconds
	.venv/bin/python -m pytest $(WORKERS) -m "(jit or costly) and not slow and not reference and not tpu and not docs" $(PYTEST_ARGS)

test: $(SETUP)  ## the default tests, both of the above; no torch, no libtpu, no network
	.venv/bin/python -m pytest $(WORKERS) -m "not slow and not reference and not tpu and not docs" $(PYTEST_ARGS)

test-slow: $(SETUP)  ## kills, several processes, long parity
	.venv/bin/python -m pytest $(WORKERS) -m "slow and not reference and not tpu and not docs" $(PYTEST_ARGS)

test-reference: $(REFERENCE)  ## against torch, transformers' torch model and PEFT; object stores on loopback; recorded outputs, compiled in full
	.venv-reference/bin/python -m pytest $(WORKERS) $(FULL) -m "reference or exact" $(PYTEST_ARGS)

test-tpu: $(TPU)  ## compile for TPU, with no TPU attached
	.venv-tpu/bin/python -m pytest $(WORKERS) --dist worksteal $(FULL) -m "tpu and not reference" $(PYTEST_ARGS)

test-lowest: $(LOWEST)  ## the tests that use each dependency, with the lowest allowed versions
	.venv-lowest/bin/python -m pytest -m "not slow and not reference and not tpu and not docs" $(WORKERS) $(STACK) $(PYTEST_ARGS)

test-newest: $(NEWEST)  ## the same on Python 3.13 with the newest allowed versions
	.venv-newest/bin/python -m pytest -m "not slow and not reference and not tpu and not docs" $(WORKERS) $(STACK) $(PYTEST_ARGS)

test-all: test test-slow test-reference test-tpu test-docs  ## all five

docs: $(DOCS)  ## build the documentation into site/, offline; a broken link fails
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict $(DOCS_ARGS)

test-docs: $(DOCS)  ## run the notebook, and try what the build of the documentation refuses
	.venv-docs/bin/python -m pytest -m docs tests/documentation $(PYTEST_ARGS)

bench: $(REFERENCE)  ## speed and memory, as ratios with the torch model
	.venv-reference/bin/python -m tools.benchmarks $(BENCH_ARGS)

torture: $(SETUP)  ## try to break everything, at most 75 minutes; results go to docs/reports/reliability.md
	.venv/bin/python -m tools.torture $(TORTURE_ARGS)

report-check: $(SETUP)  ## use a report in a headless Chromium (needs one on PATH; REPORT_ARGS="page.html --out shots")
	.venv/bin/python -m tools.browser.check_report $(REPORT_ARGS)

serve-check: $(SETUP)  ## use the page of omni-jax serve in a headless Chromium (needs one on PATH; SERVE_ARGS="--out shots")
	.venv/bin/python -m tools.browser.check_serve $(SERVE_ARGS)

pods-table: $(TPU)  ## compile the 7B programs for TPU pods at full effort, some hours; the table goes to docs/reports/pods_table.json
	.venv-tpu/bin/python -m tools.pods_table $(PODS_ARGS)

lint: $(SETUP)  ## ruff (rules and format) and pyright
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --project .

format: $(SETUP)  ## format, and fix what ruff can fix
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock: $(SETUP)  ## write requirements.lock from .venv with hashes, after an upgrade there
	@.venv/bin/python -m tools.locking requirements.lock

lock-docs: $(DOCS)  ## the same for requirements-docs.lock and .venv-docs
	@.venv-docs/bin/python -m pip uninstall --quiet --yes setuptools  # venv puts it there; .venv has the pinned one
	@.venv/bin/python -m tools.locking requirements-docs.lock $(wildcard .venv-docs/lib/python3.11/site-packages)

clean:  ## remove environments, caches and outputs
	rm -rf .venv .venv-reference .venv-tpu .venv-docs .venv-lowest .venv-newest site .pytest_cache .ruff_cache .hypothesis build dist demo_out bench_out
