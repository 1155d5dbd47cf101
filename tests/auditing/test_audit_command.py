"""`fedamole audit`: its table, its file, and runs that it refuses in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.test_cli import refused

from fedamole.auditing.verdicts import verdicts
from fedamole.errors import RunError
from fedamole.experiment import prepare
from fedamole.federation.privacy.accounting import epsilon_of
from fedamole.federation.privacy.ledger import Ledger
from fedamole.reporting.page.content import content as page_content
from fedamole.reporting.page.reading import read_folders
from fedamole.runs.run_folder import RunFolder

CLIENTS = ["chat", "entail", "mood", "plain"]


@pytest.fixture
def fedit(runs: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs("fedit"), tmp_path / "run"))


def test_a_run_without_privacy(fedit: Path, fedamole: Any) -> None:
    result = fedamole("audit", fedit, "--canaries", "300")
    assert result.code == 0, result.err
    assert all(len(line) <= 80 for line in result.out.splitlines() if "─" in line or "none" in line)
    content = json.loads((fedit / "audit.json").read_text())
    assert list(content["clients"]) == CLIENTS
    for values in content["clients"].values():
        assert values["canaries"]["claimed"] is None
        assert (values["canaries"]["canaries"], values["canaries"]["steps"]) == (300, 3)
        assert values["membership"]["others"]["models"] == 3
        assert 0 <= values["membership"]["own"]["auroc"] <= 1
        assert values["inversion"]["vocabulary"] > values["inversion"]["tokens"] > 10
    assert RunFolder(fedit).read_json("audit.json") == content
    assert "Canary bound: nothing is claimed" in result.out.replace("\n", " ")
    values = content["clients"]["mood"]
    line = [values["canaries"]["bound"], values["membership"]["own"]["auroc"], values["membership"]["others"]["auroc"]]
    line += [values["inversion"]["recall"], values["inversion"]["chance"]]
    shown = page_content(read_folders([fedit]))["audits"]
    assert ["fedit", "mood", "-", *(f"{value:.2f}" for value in line)] in shown


def test_a_private_run_beside_its_claim(tiny: Path, runs: Any, fedamole: Any) -> None:
    """One client, which reads all its examples in each step, so that epsilon has a closed form."""
    source = f"data.source=[{{name='mood',path='{tiny / 'mood.jsonl'}'}}]"
    batch = f"training.batch_size={len(prepare(runs.load('fedit', source)).clients['mood'].train.rows)}"
    run = runs.fresh("fedit", "privacy.epsilon=8", "federation.rounds=2", source, batch)
    result = fedamole("audit", run, "--canaries", "300", "--json")
    assert result.code == 0, result.err
    values = json.loads(result.out)["clients"]["mood"]["canaries"]
    noised = [entry.noised for entry in Ledger(RunFolder(run), "mood").entries]
    assert values["claimed"] == epsilon_of(noised, 1e-5)
    assert values["bound"] <= values["claimed"]
    assert (values["steps"], values["noise_repeats"]) == (6, False)
    assert values["noise"] == pytest.approx(1.0, abs=0.1)


def test_another_client_is_added_to_the_file(fedit: Path, fedamole: Any) -> None:
    for client in ("mood", "chat"):
        assert fedamole("audit", fedit, "--client", client, "--canaries", "50").code == 0
        content = json.loads((fedit / "audit.json").read_text())
        assert client in content["clients"]
    assert list(content["clients"]) == ["chat", "mood"]
    assert content["attribute"] == {"not_applicable": "it compares clients, and one was audited"}


@pytest.mark.parametrize(
    ("method", "reason"), [("local_only", "nothing leaves a client"), ("fedsa_lora", ""), ("fedmoe", "")]
)
def test_other_methods(method: str, reason: str, runs: Any, tmp_path: Path, fedamole: Any) -> None:
    run = Path(shutil.copytree(runs(method), tmp_path / "run"))
    result = fedamole("audit", run, "--client", "mood", "--canaries", "50")
    assert result.code == 0, result.err
    values = json.loads((run / "audit.json").read_text())["clients"]["mood"]
    assert ("not_applicable" in values["canaries"]) is bool(reason)
    assert reason in result.out.replace("\n", " ")


def test_embeddings_of_a_run(runs: Any, tmp_path: Path, fedamole: Any) -> None:
    """The tiny federation has one client with a template and three without: no groups to tell apart."""
    run = Path(shutil.copytree(runs("fedamole"), tmp_path / "run"))
    result = fedamole("audit", run, "--canaries", "50")
    assert result.code == 0, result.err
    assert "Attribute inference: not applicable: the clients do not form groups" in result.out.replace("\n", " ")


def test_runs_that_cannot_be_audited(fedit: Path, tmp_path: Path, runs: Any, fedamole: Any) -> None:
    refused(fedamole("audit", tmp_path / "missing"), 5, "neither a run's folder")
    refused(fedamole("audit", fedit / "clients/mood/adapter"), 5, "is not a run's folder")
    unknown = fedamole("audit", fedit, "--client", "zzz")
    refused(unknown, 5, "no client 'zzz'; its clients are chat, entail, mood, plain")
    assert unknown.line.count("mood") == 1
    refused(fedamole("audit", fedit, "--canaries", "100000"), 2, "--canaries 100000", "lower it")
    assert "not in the range" in fedamole("audit", fedit, "--canaries", "1").err
    (fedit / "summary.json").rename(tmp_path / "summary.json")
    refused(fedamole("audit", fedit), 5, "is not finished", "fedamole resume")
    (tmp_path / "summary.json").rename(fedit / "summary.json")
    (fedit / "audit.json").write_text('{"format": 1, "method": "fedit", "clients": {"mood": {"canaries": 3}}}')
    refused(fedamole("audit", fedit, "--client", "mood"), 5, "audit.json is damaged")
    (fedit / "audit.json").unlink()
    config = fedit / "config.toml"
    config.write_text(config.read_text().replace("mood.jsonl", "moved.jsonl"))
    refused(fedamole("audit", fedit, "--client", "mood"), 3, "moved.jsonl")
    for adapter in fedit.glob("clients/*/adapter"):
        shutil.rmtree(adapter)
    refused(fedamole("audit", fedit), 5, "no saved model")


def test_a_config_of_another_run_is_refused(fedit: Path, runs: Any, fedamole: Any) -> None:
    shutil.copy(runs("local_only") / "config.toml", fedit)
    parts = ("run.json names the method fedit, config.toml 'local_only'", "restore it from a copy")
    for command in (("audit", fedit, "--client", "mood"), ("show", fedit)):
        refused(fedamole(*command), 5, *parts)
    assert not (fedit / "audit.json").exists()


def canaries(claimed: float | None, bound: float, noise: float | None = 1.0, repeats: bool = False) -> dict[str, Any]:
    return {"claimed": claimed, "bound": bound, "canaries": 50, "noise": noise, "noise_repeats": repeats}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (canaries(2.0, 2.5), "THE CLAIM IS WRONG for a: epsilon is at least 2.50, and 2.00 is claimed."),
        (canaries(2.0, 0.5, 0.5), "THE NOISE IS TOO SMALL for a: 50% of what is claimed."),
        (canaries(2.0, 0.5, 1.0, True), "THE NOISE REPEATS for a"),
        (canaries(2.0, 0.5), "no claim is refuted: the largest bound is 0.50 (a, which claims 2.00)."),
        (canaries(None, 4.0, None), "epsilon at least 4.00 for a"),
        (canaries(None, 0.0, None), "found no lower bound of epsilon above 0 with 50 canaries. That a bound is low"),
        ({"not_applicable": "why"}, "Canary bound: not applicable: why."),
    ],
)
def test_verdicts_on_the_bound(values: dict[str, Any], sentence: str) -> None:
    none = {"not_applicable": "no model"}
    lines = verdicts({"clients": {"a": {"canaries": values, "membership": none, "inversion": none}}, "attribute": none})
    assert sentence in lines[0]


def test_verdicts_on_attacks() -> None:
    def client(auroc: float) -> dict[str, Any]:
        own = {"auroc": auroc, "error": 0.05, "tpr": 0.1}
        inversion = {"recall": auroc - 0.5, "chance": 0.05, "highest": 0.11}
        membership = {"own": own, "others": {**own, "auroc": 0.5}}
        return {"canaries": {"not_applicable": "x"}, "membership": membership, "inversion": inversion}

    attribute = {"attribute": "task", "accuracy": 0.75, "p_value": 0.01, "chance": 0.4, "clients": 8, "values": 2}
    results = {"clients": {"a": client(0.62), "b": client(0.6)}, "attribute": attribute}
    _, line, inversion, last = verdicts(results)
    assert last.endswith("reveal a client's task (accuracy 75% for 8 clients, by chance 40%).")
    *_, last = verdicts({**results, "attribute": {**attribute, "p_value": 0.3}})
    assert "do not reveal a client's task" in last
    assert "reveals tokens of the training data for 1 of 2 clients (mean recall 11%, by chance 5%)" in inversion
    _, _, inversion, _ = verdicts({"clients": {"b": client(0.6)}, "attribute": attribute})
    assert "reveals no tokens to this cheap attack (mean recall 10%, by chance 5%)" in inversion
    assert "own model reveals which examples were trained on for 1 of 2 clients (mean AUROC 0.61)" in line
    assert "other clients reveal no training examples (mean AUROC 0.50, as by guessing)" in line


def test_a_damaged_file_of_results_is_one_error(fedit: Path) -> None:
    for content in ('{"format": 2}', "[]", '{"format": 1, "method": "x", "clients": {"a/b": {}}}'):
        (fedit / "audit.json").write_text(content)
        with pytest.raises(RunError, match=r"audit\.json"):
            RunFolder(fedit).read_json("audit.json")
