"""Compare the order of methods in a finished comparison with the orders that papers publish (Kendall's tau-b).

    python scripts/published_order.py COMPARISON

COMPARISON is the TOML file of a comparison whose trials are finished. Each line is one published table: its setting,
the methods that are in both, and the rank correlation of the published values with the mean scores, and with the mean
losses (sign reversed), of the comparison: 1 for the same order, 0 for no relation, -1 for the opposite order. With four
or five methods, only values near 1 or -1 differ from chance; p is that of the exact test.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau

from fedamole.comparison.file import load_comparison
from fedamole.errors import ConfigError
from fedamole.reporting.results import read_scenarios

PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "GLUE, 20 clients, Dirichlet 0.5, RoBERTa-large": {
        "fedit": 87.20,
        "fedsa_lora": 90.04,
        "feddpa": 90.19,
        "fedalt": 90.06,
        "fedlease": 91.19,
    },
    "GLUE, 16 clients, 4 tasks": {"fedit": 82.23, "fedsa_lora": 84.60, "feddpa": 84.49, "fedlease": 87.76},
    "FLAN, 8 clients, 4 tasks, Llama-2-7B": {"fedit": 57.62, "feddpa": 60.55, "fedalt": 61.77, "fedlease": 61.71},
    "FLAN, 8 tasks, Llama-2-7B": {
        "local_only": 62.86,
        "fedit": 62.19,
        "fdlora": 65.17,
        "feddpa": 64.64,
        "fedalt": 67.55,
    },
}
"""Scores by setting and method, as the papers of FedLEASE, FedALT and FedTreeLoRA report them."""


def order(published: Mapping[str, float], measured: Mapping[str, float]) -> tuple[list[str], float, float]:
    """Return the methods that are in both, Kendall's tau-b of their values, and its p value."""
    common = [method for method in published if method in measured]
    result = kendalltau([published[method] for method in common], [measured[method] for method in common])
    return common, float(result.statistic), float(result.pvalue)


def main() -> None:
    """Print one line per scenario and published table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="the comparison's TOML file")
    try:
        comparison = load_comparison(parser.parse_args().comparison)
    except ConfigError as error:
        parser.error(str(error))
    table = Table("scenario", "published table", "methods", "tau, score", "p", "tau, loss", "p")
    for scenario in read_scenarios(comparison.results()):
        trained = scenario.trained.items()
        scores = {name: fmean(fmean(seed.scores.values()) for seed in seeds) for name, seeds in trained}
        losses = {name: -fmean(fmean(seed.losses.values()) for seed in seeds) for name, seeds in trained}
        for setting, published in PUBLISHED.items():
            methods, tau, p = order(published, scores)
            if len(methods) >= 3:
                _, tau_loss, p_loss = order(published, losses)
                figures = (f"{tau:+.2f}", f"{p:.2f}", f"{tau_loss:+.2f}", f"{p_loss:.2f}")
                table.add_row(scenario.name, setting, " ".join(methods), *figures)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
