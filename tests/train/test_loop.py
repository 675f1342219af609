"""What happens between updates: rows, checkpoints, evaluations, alarms and stops, with a step that computes next to nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from omni_jax.configs import tiny
from omni_jax.train import RunConfig, TrainState
from omni_jax.train.checkpoint import Checkpoints, list_steps
from omni_jax.train.loop import COLLAPSED, COUNTS, DIGEST, LoopCallbacks, Row, Watch, digest_of, train
from omni_jax.train.metrics import MetricsWriter, collapsed_in_row, evaluated
from omni_jax.types import InputError
from tests.train.states import assert_equal, state

pytestmark = pytest.mark.jit

RUN = dataclasses.replace(
    RunConfig.from_config(tiny.get_config().to_dict() | {"checkpoint": {"every": 3, "keep": 9}}),
    stop=dataclasses.replace(RunConfig.from_config(tiny.get_config()).stop, skipped_in_row=3, collapsed_in_row=2),
)


@dataclasses.dataclass(frozen=True)
class Update:
    """An update's data; the batch is its number."""

    batch: Any
    ids: tuple[tuple[str, ...], ...]
    errors: tuple[tuple[str, str], ...] = ()
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTS, 0) | {"used_tokens": 3, "total_tokens": 4})


class Numbers:
    """Data whose batches are numbers; it fails at one of them."""

    def __init__(self, broken: int | None = None):
        self.broken, self.made = broken, []

    def batches(self, start: int, stop: int) -> Generator[Update]:
        for number in range(start, stop):
            if number == self.broken:
                raise InputError("data workers died 4 times in a row")
            self.made.append(number)
            yield Update(
                {"number": jnp.int32(number)}, ids=((f"r{number}", "r"),), errors=(("r7", "cannot be read"),) if number == 1 else ()
            )


class Step:
    """Adds the batch to every parameter; from `bad` on nothing is finite, from `flat` on embeddings are equal."""

    def __init__(self, bad: int = 99, flat: int = 99):
        self.bad, self.flat = bad, flat

    def __call__(self, before: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        number = int(batch["number"])
        missed = number >= self.bad
        added = 0 if missed else number
        after = dataclasses.replace(
            before,
            step=before.step + 1,
            trainable={name: x + added for name, x in before.trainable.items()},
            skipped=before.skipped + missed,
            skipped_in_row=(before.skipped_in_row + 1) * missed,
        )
        cosine = 1.0 if number >= self.flat else 0.1
        values = {"loss": float("nan") if missed else 2.0, "grad_norm": 1.0, "mean_cosine": cosine, "effective_rank": 5.0}
        return after, {
            **{name: jnp.float32(value) for name, value in values.items()},
            "skipped": after.skipped,
            "skipped_in_row": after.skipped_in_row,
        }


class World:
    """A workdir with everything around a loop, and what the loop said."""

    def __init__(
        self, folder: Path, stop_after: int | None = None, killed_evaluating: int | None = None, stopped_evaluating: int | None = None
    ):
        self.folder, self.lines, self.seen, self.evaluated, self.done = folder, [], [], [], False
        self._stop_after, self._killed_evaluating, self._stopped_evaluating = stop_after, killed_evaluating, stopped_evaluating

    def run(
        self,
        step: Step,
        total: int = 7,
        run: RunConfig = RUN,
        data: Numbers | None = None,
        evaluates: bool = False,
        figures: dict[str, float] | None = None,
    ) -> TrainState:
        checkpoints = Checkpoints(self.folder / "checkpoints", run.checkpoint.keep)
        first = checkpoints.restore(state(0, fill=0.0)) or state(0, fill=0.0)
        writer = MetricsWriter(self.folder, int(first.step))

        def evaluate(number: int, trainable: Any) -> dict[str, float] | None:
            self.evaluated.append(number)
            if number == self._stopped_evaluating:
                return None
            if number == self._killed_evaluating:
                raise KeyboardInterrupt
            return {"AVG-all": float(trainable["bridge/norm/scale"][0])} if figures is None else figures

        def update(number: int, row: Row) -> None:
            self.seen.append(number)

        callbacks = LoopCallbacks(
            row=writer.write,
            saving=writer.sync,
            log=self.lines.append,
            update=update,
            replaced=lambda n, name, reason: self.lines.append(f"update {n}: {name}: {reason}"),
            stopping=lambda: self._stop_after is not None and len(self.seen) >= self._stop_after,
            evaluate=evaluate if evaluates else None,
            evaluated=lambda number: evaluated(self.folder, number),
            collapsed=lambda number: collapsed_in_row(self.folder, number),
        )
        try:
            data = data or Numbers()
            settings = {"mesh": None, "run": run, "total": total, "data": data.batches, "checkpoints": checkpoints, "callbacks": callbacks}
            last, self.done = train(step, first, {}, **settings)  # type: ignore[arg-type]
            return last
        finally:
            writer.close()
            checkpoints.close()

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni_jax.train.loop.place_update", lambda batch, mesh: batch)


def test_a_run_from_beginning_to_end(tmp_path: Path) -> None:
    run = dataclasses.replace(RUN, evaluation=dataclasses.replace(RUN.evaluation, every=2), log=dataclasses.replace(RUN.log, every=3))
    world = World(tmp_path)
    last = world.run(Step(), run=run, evaluates=True)
    assert (int(last.step), float(last.trainable["bridge/norm/scale"][0])) == (7, sum(range(7)))
    assert list_steps(tmp_path / "checkpoints") == [2, 3, 4, 6, 7]
    assert world.evaluated == [2, 4, 6, 7] and world.seen == list(range(1, 8))
    assert [r["step"] for r in world.rows() if "loss" in r] == [3, 6, 7]
    assert [(r["step"], r[DIGEST]) for r in world.rows() if DIGEST in r] == [(n, digest_of([[f"r{n - 1}", "r"]])) for n in range(1, 8)]
    assert [r["eval/AVG-all"] for r in world.rows() if "eval/AVG-all" in r] == [1.0, 6.0, 15.0, 21.0]
    assert world.lines == ["update 2: r7: cannot be read"]


def test_the_counts_of_every_update_stand_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same counts stand behind each update; the run is stopped and goes on."""
    monkeypatch.setattr("omni_jax.train.loop.process_sum", lambda counts: [2 * count for count in counts])
    run = dataclasses.replace(RUN, log=dataclasses.replace(RUN.log, every=3))
    World(tmp_path, stop_after=3).run(Step(), run=run)
    world = World(tmp_path)
    world.run(Step(), run=run)
    counts = {"silent": 0, "repaired": 0, "truncated": 0, "used_tokens": 6, "total_tokens": 8}
    assert [{name: row[name] for name in counts} for row in world.rows()] == [counts] * 7
    assert [row["replaced"] for row in world.rows()] == [0, 2, 0, 0, 0, 0, 0]
    assert [row["step"] for row in world.rows() if "loss" in row] == [3, 6, 7]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("data/used_tokens")] == [3, 6, 7]


def test_a_run_that_was_stopped_goes_on_and_has_each_row_once(tmp_path: Path) -> None:
    stopped = World(tmp_path / "a", stop_after=3)
    assert int(stopped.run(Step()).step) < 7
    (tmp_path / "a" / "metrics.jsonl").open("a").write('{"step": 6, "loss": 1}\n{"step": 5, "lo')  # as a killed run leaves it
    again, whole = World(tmp_path / "a"), World(tmp_path / "b")
    assert_equal(again.run(Step()), whole.run(Step()))
    assert [row["step"] for row in again.rows()] == list(range(1, 8))
    board = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss/total")] == list(range(1, 8))


@pytest.mark.parametrize("number", [4, 7])
def test_an_evaluation_in_which_a_run_was_killed_is_made_when_it_goes_on(tmp_path: Path, number: int) -> None:
    run = dataclasses.replace(RUN, evaluation=dataclasses.replace(RUN.evaluation, every=2))
    with pytest.raises(KeyboardInterrupt):
        World(tmp_path, killed_evaluating=number).run(Step(), run=run, evaluates=True)
    again = World(tmp_path)
    again.run(Step(), run=run, evaluates=True)
    assert again.evaluated == [n for n in (2, 4, 6, 7) if n >= number]
    assert [row["step"] for row in again.rows() if "eval/AVG-all" in row] == [2, 4, 6, 7]
    World(tmp_path).run(Step(), run=run, evaluates=True)
    assert [row["step"] for row in again.rows() if "eval/AVG-all" in row] == [2, 4, 6, 7]


@pytest.mark.parametrize("stop", [{"stopped_evaluating": 7}, {"stop_after": 7}])
def test_a_run_without_its_last_evaluation_is_not_done_until_it_is_made(tmp_path: Path, stop: dict[str, int]) -> None:
    cut, told_to_stop, again = World(tmp_path, **stop), World(tmp_path, stop_after=0), World(tmp_path)
    assert int(cut.run(Step(), evaluates=True).step) == 7 and list_steps(tmp_path / "checkpoints")[-1] == 7
    told_to_stop.run(Step(), evaluates=True)
    again.run(Step(), evaluates=True)
    assert [world.done for world in (cut, told_to_stop, again)] == [False, False, True]
    assert (told_to_stop.evaluated, again.evaluated) == ([], [7])
    told_to_stop.run(Step(), evaluates=True)
    assert told_to_stop.done  # nothing was left to do


def test_an_evaluation_without_usable_records_is_not_missing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.run(Step(), evaluates=True, figures={})
    assert world.evaluated == [7] and world.done


def test_a_stop_before_the_first_update_saves(tmp_path: Path) -> None:
    world = World(tmp_path, stop_after=0)
    assert int(world.run(Step()).step) == 0 and list_steps(tmp_path / "checkpoints") == [0]
    assert int(World(tmp_path).run(Step()).step) == 7


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    World(tmp_path).run(Step())
    data = Numbers()
    assert int(World(tmp_path).run(Step(), data=data).step) == 7 and data.made == []


def test_updates_that_are_not_finite_are_told_and_stop_the_run(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(InputError, match="3 steps in a row, up to step 7, had no finite loss and gradient") as caught:
        world.run(Step(bad=4), total=20)
    assert "\n" not in str(caught.value)
    note = [f"step {n} was skipped: loss nan, gradient norm 1; {n - 4} in all, {n - 4} in a row" for n in (5, 6, 7)]
    assert world.lines[1:] == note
    assert [row["loss"] for row in world.rows()][-1] is None  # JSON has no NaN
    restored = Checkpoints(tmp_path / "checkpoints", 9).restore(state(0))
    assert restored is not None and float(restored.trainable["bridge/norm/scale"][0]) == 6.0


def test_collapsed_embeddings_warn_or_stop(tmp_path: Path) -> None:
    world = World(tmp_path / "warn")
    world.run(Step(flat=2))
    assert [line for line in world.lines if "warning" in line] == [
        "warning: embeddings have been collapsed for 2 steps, up to step 4 (mean cosine 1.000, effective rank 5.00)"
    ]
    strict = dataclasses.replace(RUN, stop=dataclasses.replace(RUN.stop, collapse="stop"))
    with pytest.raises(InputError, match="embeddings have been collapsed for 2 steps, up to step 4"):
        World(tmp_path / "stop").run(Step(flat=2), run=strict)


@pytest.mark.parametrize("every", [1, 3])
def test_counts_in_a_row_go_on_with_a_run(tmp_path: Path, every: int) -> None:
    """Stopped within the updates that end it, two collapsed or three skipped ones, whose rows are whole or not."""
    run = dataclasses.replace(RUN, stop=dataclasses.replace(RUN.stop, collapse="stop"), log=dataclasses.replace(RUN.log, every=every))
    flat, bad = tmp_path / "flat", tmp_path / "bad"
    assert int(World(flat, stop_after=4).run(Step(flat=4), run=run).step) == 5
    for _ in range(2):  # nothing is saved when it stops: it goes on from the same checkpoint
        with pytest.raises(InputError, match="embeddings have been collapsed for 2 steps, up to step 6"):
            World(flat).run(Step(flat=4), run=run)
    assert [row[COLLAPSED] for row in World(flat).rows()] == [0, 0, 0, 0, 1, 2]
    assert int(World(bad, stop_after=4).run(Step(bad=3), run=run).step) == 5
    with pytest.raises(InputError, match="3 steps in a row, up to step 6, had no finite loss"):
        World(bad).run(Step(bad=3), run=run)


def test_a_run_that_goes_on_collapsed_is_warned_once_more(tmp_path: Path) -> None:
    World(tmp_path, stop_after=4).run(Step(flat=2))
    world = World(tmp_path)
    world.run(Step(flat=2), total=9)
    assert [line for line in world.lines if "warning" in line] == [
        "warning: embeddings have been collapsed for 4 steps, up to step 6 (mean cosine 1.000, effective rank 5.00)"
    ]
    assert [row[COLLAPSED] for row in world.rows()] == [0, 0, *range(1, 8)]


def test_embeddings_that_collapse_again_are_told_again(tmp_path: Path) -> None:
    note: list[str] = []
    watch = Watch(RUN.stop, note.append)
    for number, cosine in enumerate((1, 1, 1, 0, 1, 1), 1):
        row: Row = {"loss": 2.0, "mean_cosine": cosine, "effective_rank": 5.0, "skipped_in_row": 0}
        watch(number, row | {COLLAPSED: watch.count(row)})
    assert [line.split(" (")[0] for line in note] == [
        f"warning: embeddings have been collapsed for 2 steps, up to step {number}" for number in (2, 6)
    ]


def test_counts_of_a_run_begun_by_an_older_version_start_anew(tmp_path: Path) -> None:
    World(tmp_path, stop_after=3).run(Step(flat=2))
    rows = [{name: value for name, value in row.items() if name != COLLAPSED} for row in World(tmp_path).rows()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    World(tmp_path).run(Step(flat=2))
    assert [row.get(COLLAPSED) for row in World(tmp_path).rows()] == [None] * 3 + [1, 2, 3, 4]


def test_the_digest_of_a_batch_tells_clips_and_their_order() -> None:
    batch = [["a", "b"], ["c", "d"]]
    others = ([["b", "a"], ["c", "d"]], [["c", "d"], ["a", "b"]], [["a", "b"], ["c", "e"]], [["a", "b", "c", "d"]])
    assert 0 < digest_of(batch) == digest_of([list(micro) for micro in batch]) < 2**48
    assert len({digest_of(batch), *map(digest_of, others[:3])}) == 4
    assert digest_of(others[3]) == digest_of(batch)  # the order counts, the size of a micro-batch does not


def test_what_was_trained_is_saved_when_the_data_fail(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data workers died"):
        World(tmp_path).run(Step(), data=Numbers(broken=5))
    assert list_steps(tmp_path / "checkpoints")[-1] == 5
    assert int(World(tmp_path).run(Step()).step) == 7
