"""Arms, intervals and costs of an ablation, without training."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.ablation.arms import parse_arms
from omni_jax.ablation.intervals import paired, student
from omni_jax.ablation.runs import slug
from omni_jax.cli.main import main
from omni_jax.types import InputError


def test_arms_are_sums_of_losses_and_named_config_fields() -> None:
    arms = parse_arms("L_A,all", ["half=L_A+L_D --config.losses.weights.distillation=0.5", "micro = --config.losses.negatives=micro"])
    assert [arm.name for arm in arms] == ["L_A", "all", "half", "micro"]
    zero = {f"losses.weights.{name}=0.0" for name in ("tuple", "distillation", "joint", "siglip")}
    assert set(arms[0].changes) == {*zero, "losses.weights.pairwise=1.0"}
    assert "losses.weights.siglip=0.0" in arms[1].changes and sum(change.endswith("=1.0") for change in arms[1].changes) == 3
    assert arms[2].changes[-1] == "losses.weights.distillation=0.5"
    assert arms[3].changes == ("losses.negatives=micro",)


@pytest.mark.parametrize(
    ("losses", "named", "said"),
    [
        ("L_A,L_X", [], r"--arms L_A,L_X: there is no loss 'L_X'; add up L_T, L_D, L_A, L_J, L_S, or write all"),
        ("L_A", [], "at least two"),
        ("L_A,L_A", [], "arm 'L_A' is given twice"),
        ("L_A", ["x"], "write NAME=SETTINGS"),
        ("L_A", ["--config.seed=1"], "write NAME=SETTINGS"),
        ("L_A", ["x='L_A"], "check its quotes"),
        ("L_A", ["x=steps=3"], "there is no loss 'steps=3'"),
    ],
)
def test_arms_that_do_not_exist_are_named(losses: str, named: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_arms(losses, named)


def test_different_names_are_different_folders() -> None:
    assert len({slug(name) for name in ("a b", "a_b", "a/b", "a%2Fb", "..")}) == 5 and "/" not in slug("a/b")


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30])
def test_the_quantile_is_students(freedom: int) -> None:
    from scipy import stats  # takes a second, which each worker would wait for

    assert student(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


@pytest.mark.parametrize("seeds", [2, 5])
def test_intervals_hold_a_known_difference_as_often_as_they_say(seeds: int) -> None:
    """What a seed gives both arms is large; the difference is 1.5 points, of a spread that an interval has to find out."""
    rng, held, trials = np.random.default_rng(0), 0, 4000
    for _ in range(trials):
        common = 10 * rng.standard_normal(seeds)
        first, second = common + rng.standard_normal(seeds), common + 1.5 + 2 * rng.standard_normal(seeds)
        low, high = paired(first, second).interval
        held += low <= 1.5 <= high
    assert 0.93 <= held / trials <= 0.97


def test_a_star_is_an_interval_that_leaves_out_zero_and_one_seed_has_none() -> None:
    assert paired([1, 2, 3], [2.0, 3.1, 4.05]).apart and not paired([1, 2, 3], [2, 1, 3]).apart
    assert paired([1, 2, 3], [2, 3, 4]).interval == pytest.approx((1, 1))
    with pytest.raises(InputError, match="at least 2"):
        paired([1], [2])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "L_A,L_Q"], "there is no loss 'L_Q'"),
        (["--warm-losses", "L_A+L_Q"], "--warm-losses L_A+L_Q: there is no loss 'L_Q'"),
        (["--seeds", "1"], "--seeds 1: an interval over seeds needs at least 2"),
        (["--arm", "x=--config.nowhere=1", "--arms", "L_A"], "nowhere"),
        (["--start", "base"], "use --start random or warm"),
        (["--config.model.base=x", "--config.model.architecture=None"], "use --start base or warm"),
        (["--config.data.train=shards"], "has no held-out clips; name them with --config.evaluation.manifest="),
        (["--config.data.workers=1", "--equal", "cpu_time"], "set --config.data.workers=0"),
        (["--clips", "1", "8"], "each must be at least 2"),
        (["--config.evaluation.truncate_dims=(4,4)"], "evaluation.truncate_dims=(4, 4): must be different positive numbers"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments: list[str], said: str) -> None:
    assert main(["ablate", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
