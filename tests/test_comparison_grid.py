"""Learning-rate grids and budgets of a comparison, with fake runs whose loss is a function of the rate."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedamole.comparison import run
from fedamole.comparison.file import Comparison, load_comparison
from fedamole.comparison.learning_rates import Choice, chosen, narrowness, widened
from fedamole.comparison.run import outlook, preview, progress, run_comparison
from fedamole.comparison.trials import Trial, TrialListener
from fedamole.errors import ConfigError, RunError
from fedamole.methods import METHODS
from fedamole.reporting.results import read_scenarios
from tests.test_comparison import written

FIVE = [1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1]
Loss = Callable[[Trial, str], float]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, tiny: Path) -> Write:
    def write(methods: Sequence[str], variants: str = "", **settings: Any) -> Path:
        return written(tmp_path, tiny, [*methods], variants, **{"name": "c", "overrides": None, **settings})

    return write


def finish(trial: Trial, loss: Loss) -> None:
    """Write the files of a finished run of one client and one round."""
    trial.path.mkdir(parents=True)
    tables = trial.config.tables()
    (trial.path / "config.toml").write_text(tomli_w.dumps(tables))
    base = {"weights": "w", "tokenizer": "t", "targets": "x"}
    about = {"format": 1, "fedamole": "0", "id": "x", "method": trial.config.method_name, "base": base}
    (trial.path / "run.json").write_text(json.dumps(about))
    (trial.path / "manifest.json").write_text(json.dumps({"clients": ["a"]}))
    lines: list[dict[str, Any]] = [{"round": 0, "client": "a", "split": "train", "steps": 1, "bytes_down": 1}]
    rows: dict[str, Any] = {}
    for variant in ("base", "majority", *trial.variants.values()):
        value = loss(trial, variant) if variant in trial.variants.values() else 9.0
        round_ = 0 if variant in trial.variants.values() else -1
        lines.append({"round": round_, "client": "a", "split": "validation", "method": variant, "loss": value})
        values = {"a": {"score": 1.0, "loss": value}}
        rows[variant] = {"best_round": 0, "mean": 1.0, "worst": 1.0, "spread": 0.0, "last_mean": 1.0, "clients": values}
    (trial.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    costs = dict.fromkeys(("bytes_down_per_client_round", "bytes_up_per_client_round", "peak_memory_mib"), 1.0)
    summary = {"format": 1, "method": trial.config.method_name, "rounds": 1, "rows": rows, **costs}
    summary |= {"seconds_update": 1.0, "seconds_evaluate": 1.0}
    (trial.path / "summary.json").write_text(json.dumps(summary))


class FakeRuns:
    """Replaces `run_trials`: finishes trials at once and records their names; interrupts after `most` of them."""

    def __init__(self, loss: Loss, most: int = 1000) -> None:
        self.loss, self.most = loss, most
        self.names: list[str] = []

    def __call__(self, trials: Sequence[Trial], workers: int, listener: TrialListener) -> None:
        for trial in trials:
            if trial.state != "finished":
                if len(self.names) == self.most:
                    raise KeyboardInterrupt
                finish(trial, self.loss)
                self.names.append(trial.name)


def best_at(rate: float) -> Loss:
    return lambda trial, variant: abs(math.log10(trial.config.training.learning_rate / rate))


def test_a_finished_grid_without_a_method_that_was_added_later_is_refused(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_trials", FakeRuns(best_at(1e-2)))
    assert run_comparison(load_comparison(write(["fedit"], learning_rates=FIVE)), TrialListener()) == []
    comparison = load_comparison(write(["fedit", "fedit_ft"], learning_rates=FIVE))
    with pytest.raises(RunError, match=r"fedit-lr0\.001: the finished run has no scores of fedit_ft, only of base"):
        list(comparison.all_trials())


def rates_of(comparison: Comparison) -> list[float]:
    [arm] = comparison.arms
    return list(comparison.grid_trials(arm))


@pytest.mark.parametrize(
    ("best", "widen", "grid", "choice"),
    [
        (1e-2, 4, FIVE, Choice(1e-2, False)),
        (1e-1, 4, [*FIVE, 0.316], Choice(0.1, False)),
        (1.0, 4, [*FIVE, 0.316, 1.0, 3.16], Choice(1.0, False)),
        (1e-3, 4, [3.16e-4, *FIVE], Choice(1e-3, False)),
        (1e6, 4, [*FIVE, 0.316, 1.0, 3.16, 10.0], Choice(10.0, True)),
        (1e-9, 2, [1e-4, 3.16e-4, *FIVE], Choice(1e-4, True)),
        (1e6, 0, FIVE, Choice(0.1, True)),
    ],
)
def test_a_grid_is_widened_while_the_best_rate_is_at_an_edge(
    best: float, widen: int, grid: list[float], choice: Choice, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRuns(best_at(best))
    monkeypatch.setattr(run, "run_trials", fake)
    path = write(["fedit"], learning_rates=FIVE, widen=widen, seeds=[0, 1])
    assert run_comparison(load_comparison(path), TrialListener()) == []
    comparison = load_comparison(path)
    [arm] = comparison.arms
    assert rates_of(comparison) == pytest.approx(grid, rel=1e-12)
    assert comparison.chosen(arm) == {"fedit": choice}
    assert len(fake.names) == len(grid) + 1, "the first seed's trial is the grid's run"
    [scenario] = read_scenarios(comparison.results())
    assert {(result.learning_rate, result.at_edge) for result in scenario.methods["fedit"]} == {tuple(choice)}


def test_a_widened_grid_resumes_after_an_interrupt(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after each number of trials in turn, the comparison comes to the same grid and trains nothing twice."""
    path, names = write(["fedit", "fedit_ft"], learning_rates=FIVE), list[str]()
    for _ in range(30):
        fake = FakeRuns(best_at(1.0), most=1)
        monkeypatch.setattr(run, "run_trials", fake)
        try:
            run_comparison(load_comparison(path), TrialListener())
            break
        except KeyboardInterrupt:
            names += fake.names
            comparison = load_comparison(path)
            waiting = progress(comparison)["new"]
            assert waiting == 1
            assert any(line["action"].startswith("wait ") for line in preview(comparison))
    assert rates_of(load_comparison(path)) == pytest.approx([*FIVE, 0.316, 1.0, 3.16])
    assert len(names + fake.names) == len(set(names + fake.names)) == 8
    assert progress(load_comparison(path)) == {"finished": 1, "failed": 0, "unfinished": 0, "new": 0}


def test_the_outlook_counts_cells_and_takes_the_mean_time(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of five rates are done in 120 s each; three and three seeds are left: 6 * 120 / 2 workers = 6 minutes."""
    monkeypatch.setattr(run, "run_trials", FakeRuns(best_at(1e-2), most=2))
    path = write(["fedit"], learning_rates=FIVE, seeds=[0, 1, 2], workers=2)
    assert outlook(load_comparison(path)) == "0 trials are finished, 8 are left, and wider grids may add some"
    with pytest.raises(KeyboardInterrupt):
        run_comparison(load_comparison(path), TrialListener())
    for summary in load_comparison(path).folder.rglob("summary.json"):
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"seconds_update": 119.0}))
    assert outlook(load_comparison(path)) == (
        "2 trials are finished, 6 are left, and wider grids may add some; at 120 s each (mean of the finished ones), "
        "the rest takes about 6 minutes"
    )


def test_two_methods_of_one_run_widen_it_both_ways(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"fedit": 0.1, "fedit_ft": 1e-3}
    fake = FakeRuns(lambda trial, variant: abs(math.log10(trial.config.training.learning_rate / best[variant])))
    monkeypatch.setattr(run, "run_trials", fake)
    path = write(["fedit", "fedit_ft"], learning_rates=FIVE)
    run_comparison(load_comparison(path), TrialListener())
    comparison = load_comparison(path)
    assert rates_of(comparison) == pytest.approx([3.16e-4, *FIVE, 0.316])
    assert comparison.chosen(comparison.arms[0]) == {"fedit": (0.1, False), "fedit_ft": (1e-3, False)}
    names = [f"tiny/{name}-s0" for name in ("fedit", "fedit_ft")]
    assert [trial.name for trial in comparison.trials(comparison.arms[0])] == names
    assert len(fake.names) == 7


def test_rates_at_which_a_run_diverges_are_infinitely_bad(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 0.01 on the loss is not a number: the best of the others is chosen, and nothing is added above."""

    def loss(trial: Trial, variant: str) -> float:
        rate = trial.config.training.learning_rate
        return math.nan if rate >= 0.01 else 1 / rate

    monkeypatch.setattr(run, "run_trials", FakeRuns(loss))
    path = write(["fedit"], learning_rates=FIVE)
    run_comparison(load_comparison(path), TrialListener())
    comparison = load_comparison(path)
    assert rates_of(comparison) == FIVE
    assert comparison.chosen(comparison.arms[0]) == {"fedit": (3.16e-3, False)}


def test_a_search_over_several_seeds_takes_the_lowest_mean_loss(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """With seed 0 alone 0.1 is the best rate; with seed 1 it is much worse. The chosen rate's runs are used again."""

    def loss(trial: Trial, variant: str) -> float:
        rate = trial.config.training.learning_rate
        return 1.0 if rate == 0.1 and trial.seed == 1 else abs(math.log10(rate / 0.1)) / 10

    fake = FakeRuns(loss)
    monkeypatch.setattr(run, "run_trials", fake)
    path = write(["fedit"], learning_rates=FIVE, seeds=[0, 1, 2], search_seeds=2, widen=1)
    run_comparison(load_comparison(path), TrialListener())
    comparison = load_comparison(path)
    [arm] = comparison.arms
    assert comparison.chosen(arm) == {"fedit": (3.16e-2, False)}
    grid = [f"tiny/grid/fedit-lr{rate!r}{seed}" for rate in FIVE for seed in ("", "-s1")]
    assert fake.names == [*grid, "tiny/fedit-s2"]
    first, second, third = comparison.trials(arm)
    assert [trial.config.training.learning_rate for trial in (first, second, third)] == [3.16e-2] * 3
    assert (second.path / "run.json").exists()
    alone = load_comparison(write(["fedit"], learning_rates=FIVE, seeds=[0, 1, 2], widen=0))
    assert alone.chosen(alone.arms[0]) == {"fedit": (0.1, True)}


def test_where_all_rates_diverge_lower_ones_are_tried() -> None:
    tried = widened([0.1, 1.0], 2, lambda rates: [chosen(dict.fromkeys(rates, math.inf)).rate])
    assert tried == pytest.approx([1e-3, 1e-2, 0.1, 1.0])
    assert chosen(dict.fromkeys(tried, math.inf)) == (1e-3, True)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([], ""),
        (FIVE, ""),
        ([1e-5, 1e-4, 1e-3, 1e-2, 1e-1], ""),
        ([5e-3, 2e-2], "2 values from 0.005 to 0.02 are a narrow grid"),
        ([1e-3, 2e-3, 4e-3, 8e-3, 1e-2], "5 values from 0.001 to 0.01"),
        ([1e-4, 1e-2, 1.0], "3 values from"),
        ([1e-3], "1 value from"),
    ],
)
def test_a_narrow_grid_gives_a_warning(
    rates: list[float], expected: str, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(["fedit"], learning_rates=rates)
    load_comparison(path)
    assert bool(caplog.text) == bool(expected) == bool(narrowness(rates))
    assert expected in caplog.text
    assert not expected or str(path) in caplog.text


def test_one_rate_is_not_widened_and_is_at_an_edge(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_trials", FakeRuns(best_at(1e-2)))
    path = write(["fedit"], learning_rates=[1e-2])
    run_comparison(load_comparison(path), TrialListener())
    assert load_comparison(path).chosen(load_comparison(path).arms[0]) == {"fedit": (1e-2, True)}


# --- budgets --------------------------------------------------------------------------------------------------


def budgets(comparison: Comparison) -> dict[str, str]:
    return {name: arm.tables["training"]["budget"] for arm in comparison.arms for name in arm.variants}


def test_both_budgets_add_an_arm_where_they_differ(write: Write) -> None:
    variants = '[variants.own]\nname = "ditto"\nproximal = 0.5\n'
    path = write(["fedit", "own", "fedrep_ft", "fedrep"], variants, budget="both", reference="own-paper")
    comparison = load_comparison(path)
    assert comparison.methods == (
        "fedit",
        "own",
        "own-paper",
        "fedrep_ft",
        "fedrep_ft-paper",
        "fedrep",
        "fedrep-paper",
    )
    assert comparison.reference == "own-paper"
    assert [list(arm.variants) for arm in comparison.arms] == [
        ["fedit"],
        ["own"],
        ["own-paper"],
        ["fedrep", "fedrep_ft"],
        ["fedrep-paper", "fedrep_ft-paper"],
    ]
    paper = {name for name, budget in budgets(comparison).items() if budget == "paper"}
    assert paper == {"own-paper", "fedrep-paper", "fedrep_ft-paper"}
    trials = {trial.name: trial.config for trial in comparison.all_trials()}
    assert trials["tiny/own-paper-s0"].training.budget == "paper"
    assert trials["tiny/own-paper-s0"].tables()["method"] == trials["tiny/own-s0"].tables()["method"]


@pytest.mark.parametrize("budget", ["steps", "paper"])
def test_one_budget_for_all(budget: str, write: Write) -> None:
    comparison = load_comparison(write(["fedit", "ditto"], budget=budget))
    assert budgets(comparison) == {"fedit": budget, "ditto": budget}
    assert comparison.methods == ("fedit", "ditto")


def test_the_budget_of_the_runs_is_set_in_one_place(write: Write, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sets training.budget itself; remove it; set `budget` instead"):
        load_comparison(write(["fedit"], overrides=["training.budget=paper"]))
    (tmp_path / "own.toml").write_text(f'extends = "{tiny}/config.toml"\n[training]\nbudget = "paper"\n')
    path = write(["fedit"])
    path.write_text(path.read_text().replace(f"{tiny}/config.toml", "own.toml"))
    with pytest.raises(ConfigError, match=r"scenarios.tiny: .*own.toml sets training.budget, which"):
        load_comparison(path)
    path.write_text(path.read_text().replace('name = "c"', 'name = "c"\nbudget = "bytes"'))
    [arm] = load_comparison(path).arms
    assert arm.tables["training"]["budget"] == "paper", "bytes leave the steps to the scenario"
    with pytest.raises(ConfigError, match="adds 'ditto-paper' for 'ditto'; rename"):
        load_comparison(write(["ditto", "ditto-paper"], '[variants.ditto-paper]\nname = "fedit"\n', budget="both"))


def test_every_method_that_is_scored_after_the_aggregation_and_its_variant_are_one_run(write: Write) -> None:
    """Of the registry and of variants alike; asked for in either order."""
    pairs = [name for name, method in METHODS.items() if method.evaluates == "post_aggregation"]
    assert len(pairs) >= 12
    methods = [argument for name in pairs for argument in (f"{name}_ft", name)]
    variants = "".join(
        f'[variants.mine-{name}]\nname = "{name}"\n{setting}'
        for name in methods
        for setting in [f"{small_setting(name)}\n"]
    )
    labels = [*methods, *(f"mine-{name}" for name in methods)]
    arms = load_comparison(write(labels, variants, budget="both")).arms
    shared: dict[str, Mapping[str, str]] = {arm.name: arm.variants for arm in arms}
    for name in pairs:
        twice = [("", "")] if not METHODS[name].budgets_differ else [("", ""), ("", "-paper")]
        for before in ("", "mine-"):
            for _, after in twice:
                rows = shared.pop(f"{before}{name}{after}")
                assert rows == {f"{before}{name}{after}": name, f"{before}{name}_ft{after}": f"{name}_ft"}
    assert not shared


def small_setting(method: str) -> str:
    """A setting that differs from the default."""
    return "virtual_tokens = 3" if "prompt" in method or "ptuning" in method else "rank = 3"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rates": [0.0, 1.0]}, "learning_rates: 0 must be above 0"),
        ({"widen": -1}, "widen = -1: must be at least 0"),
        ({"search_seeds": 0}, "search_seeds = 0: must be from 1 to the number of seeds, which is 1"),
        ({"search_seeds": 2}, "search_seeds = 2: must be from 1"),
        ({"reference": "ditto-paper"}, "reference = 'ditto-paper' is not one of methods; did you mean 'ditto'"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], expected: str, write: Write) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_comparison(write(["ditto"], **settings))
