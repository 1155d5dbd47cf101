"""Failures of a deployment with real processes on loopback. Most tests are slow: `make test-faults`."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedamole.deployment import client_processes as client
from fedamole.deployment.security.certificates import make_certificates
from fedamole.experiment import start
from fedamole.federation.progress import ProgressListener
from tests.deployment.dishonest_client import SECRET
from tests.deployment.faults import NAMES, Command, Site, killed, site, wait_until, working

STARTING = 300.0
"""Maximum seconds to start a server and its clients on a busy machine."""
ROUND = 120.0
"""Maximum seconds for a round on a busy machine."""
LOST = 150.0
"""Maximum seconds until a lost client is noticed and has rejoined."""


class Enough(Exception):  # noqa: N818  not an error
    """The run in one process has come as far as it has to."""


def states_of(folder: Path) -> dict[str, bytes]:
    """The server's states in a run's folder, by round."""
    return {path.name: path.read_bytes() for path in sorted((folder / "checkpoints").glob("*.safetensors"))}


def undisturbed(there: Site, rounds: int) -> dict[str, bytes]:
    """The server's states after each round of the same run in one process."""
    states: dict[str, bytes] = {}
    folder = there.folder / "undisturbed"

    class Collector(ProgressListener):
        def round_done(self, round_: int, validation: Any) -> None:
            states.update(states_of(folder))
            if round_ + 1 == rounds:
                raise Enough

    with pytest.raises(Enough):
        start(there.here(), folder, Collector())
    assert len(states) == rounds
    return states


def collected(there: Site, rounds: int, seconds: float) -> dict[str, bytes]:
    """The server's states after each round of a deployed run, read before they are removed."""
    states: dict[str, bytes] = {}

    def enough() -> bool:
        committed = {f"round-{line['round']:04d}.safetensors" for line in there.events("done")}
        states.update({name: state for name, state in states_of(there.run).items() if name in committed})
        return f"round-{rounds - 1:04d}.safetensors" in states

    wait_until(enough, seconds, f"{rounds} rounds", there.told)
    return {name: state for name, state in states.items() if name <= f"round-{rounds - 1:04d}.safetensors"}


def test_a_killed_server_resumes_to_the_same_states_and_a_killed_worker_restarts(tmp_path: Path, tiny: Path) -> None:
    with site(tmp_path, tiny, "training.local_steps=30") as there:
        server = there.server()
        clients = {name: there.client(name) for name in NAMES}
        expected = undisturbed(there, 4)
        states = collected(there, 2, STARTING)
        there.event("asked", ROUND, round=2)
        server.kill_all()
        server.gone()
        done = there.events("done")
        assert len(done) in (2, 3), "killed in the round after the second"

        server, resumed = there.server(resume=True), time.time()
        states |= collected(there, 4, STARTING)
        assert states == {name: expected[name] for name in states}
        assert len(states) >= 4 - 1, "one state may come and go between two looks"
        assert there.event("round", 1, since=resumed)["round"] == len(done), "only the round in flight was lost"

        begin = time.time()
        round_ = there.event("asked", ROUND, since=begin)["round"]
        worker = clients["mood"].part("warm_worker")
        working(worker)
        killed(worker)
        line = there.failed("mood", ROUND, since=begin)
        assert line["failed"] == "its worker process stopped or is not running"
        assert round_ <= line["round"] <= round_ + 3, "rounds go on while the worker is looked for"
        clients["mood"].says("the worker has stopped; restarting it", 10)
        ended = there.event("done", ROUND, since=begin, round=line["round"])
        assert there.trained("mood", ROUND, since=ended["time"])["round"] > line["round"]
        trains = there.metrics(split="train", round=line["round"])
        assert {update["client"]: update.get("failed") for update in trains} == {
            "chat": None,
            "entail": None,
            "mood": "its worker process stopped or is not running",
        }

        assert server.interrupt() == 130
        assert "--resume" in server.text
        server.gone()
        assert clients["mood"].interrupt() == 0
        killed(psutil.Process(clients["chat"].process.pid))
        for name in ("mood", "chat"):
            clients[name].gone()


# One long-lived run with certificates and keys, in which one thing after the other goes wrong. Each test begins when
# everybody takes part and ends when everybody takes part again.


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Site]:
    with site(
        tmp_path_factory.mktemp("secure"),
        tiny,
        "training.local_steps=20",
        "deployment.gathering=5",
        "deployment.deadline=300",
        secure=True,
    ) as there:
        assert there.certs is not None
        make_certificates(there.certs, ["localhost"], [*NAMES, "stranger"])
        there.server()
        there.client("entail")
        there.client("mood")
        yield there


@pytest.fixture
def living(secure: Site) -> Site:
    """The long-lived run, when all three have trained; chat is the one that comes late, over a network to be cut."""
    now = time.time()
    if "chat" not in {command.output.stem.removeprefix("c-") for command in secure.commands}:
        secure.event("done", STARTING, round=0)
        secure.client("chat", address=f"localhost:{secure.proxy().port}")
    for name in NAMES:
        secure.trained(name, STARTING, since=now)
    return secure


def command_of(there: Site, name: str) -> Command:
    """The command that runs a client, or the server."""
    return next(command for command in reversed(there.commands) if command.output.stem in (name, f"c-{name}"))


def all_train(there: Site, seconds: float) -> None:
    """Wait for a round in which all take part."""
    now = time.time()
    for name in NAMES:
        there.trained(name, seconds, since=now)


def test_a_late_client_joins_a_run_that_is_under_way(living: Site) -> None:
    rounds = {name: min(line["round"] for line in living.metrics(split="train", client=name)) for name in NAMES}
    assert rounds["entail"] == rounds["mood"] == 0
    assert rounds["chat"] > 0
    assert living.metrics(split="validation", client="chat", method="base")[0]["round"] > 0
    joined = living.events("joined", client="chat")
    assert len(joined) == 1


@pytest.mark.faults
def test_an_untrusted_client_gets_the_reason_and_the_run_continues(living: Site) -> None:
    assert living.certs is not None
    foreign = living.folder / "foreign"
    make_certificates(foreign, ["localhost"], ["mood"])
    handed = living.certs / "clients"
    other_ca = living.client("mood", certs=foreign / "clients" / "mood", folder="other-ca")
    elsewhere = living.proxy("127.0.0.2").address
    other_host = living.client("mood", certs=handed / "mood", address=elsewhere, folder="other-host")
    twin = living.client("mood", certs=handed / "mood", folder="twin")
    stranger = living.client("stranger", "--data", str(living.tiny / "plain.jsonl"), folder="stranger")
    begun, names = time.time(), ("other-ca", "other-host", "twin", "stranger")
    for command in (other_ca, other_host):
        assert command.ended(ROUND) == 5
        command.says("ask the coordinator for the ca.crt of this federation, and use a host name", 1)
    for command in (twin, stranger):
        command.says("the server does not accept this key", ROUND)
        command.says("retrying", 1)
    for command in (twin, stranger):
        assert command.ended(client.STALE_CONNECTION_S + ROUND) == 5
        assert time.time() - begun > client.STALE_CONNECTION_S
    for name in names:
        command = command_of(living, name)
        assert "Traceback" not in command.text
        command.gone()
    assert {line["client"] for line in living.events("joined")} == set(NAMES)
    all_train(living, ROUND)
    assert not [line for line in living.events("answered", since=begun) if "failed" in line]


def test_a_killed_client_that_is_started_again_takes_part_at_once(living: Site) -> None:
    """It deactivates its earlier node, which the server considers alive for another minute."""
    mood = command_of(living, "mood")
    working(mood.part("warm_worker"))
    mood.kill_all()
    begin = time.time()
    again = living.client("mood")
    again.says("connected", STARTING)
    assert "does not accept this key" not in again.text.rpartition("connecting to")[2]
    assert living.trained("mood", LOST, since=time.time())
    failed = [line for line in living.events("answered", since=begin, client="mood") if "failed" in line]
    assert {line["failed"] for line in failed} <= {"its connection was lost", "no answer in time"}
    all_train(living, ROUND)


@pytest.mark.faults
def test_a_network_that_is_cut_for_a_minute(living: Site) -> None:
    (proxy, *_), begin = living.proxies, time.time()
    with proxy.cut():
        time.sleep(65)
    all_train(living, LOST)
    assert command_of(living, "chat").process.poll() is None
    failed = {line["failed"] for line in living.events("answered", since=begin) if "failed" in line}
    assert failed <= {"its connection was lost", "no answer in time"}
    assert {line["client"] for line in living.events("answered", since=begin) if "failed" in line} <= {"chat"}


@pytest.mark.faults
def test_a_killed_serverapp_is_submitted_again_and_loses_the_round_in_flight_at_most(living: Site) -> None:
    request = living.event("asked", ROUND, since=time.time())
    killed(psutil.Process(living.events("started")[-1]["pid"]))
    started = living.event("started", ROUND, since=request["time"])
    command_of(living, "server").says("the run's process has stopped; restarting it from the last finished round", 5)
    done = [line["round"] for line in living.events("done") if line["time"] < started["time"]]
    assert (
        living.event("round", ROUND, since=started["time"])["round"]
        == max(done) + 1
        in (request["round"], request["round"] + 1)
    )
    all_train(living, LOST)


@pytest.mark.faults
def test_a_killed_superlink_is_started_again(living: Site) -> None:
    begin, server = time.time(), command_of(living, "server")
    rounds = [line["round"] for line in living.events("done")]
    killed(server.part("fedamole.deployment.flower.superlink"))
    server.says("the SuperLink has stopped; restarting it", ROUND)
    all_train(living, LOST)
    after = [line["round"] for line in living.events("done", since=begin)]
    assert after == list(range(max(rounds) + 1, max(after) + 1)), "no round is left out or done twice"


@pytest.mark.faults
def test_a_killed_gateway_is_started_again(living: Site) -> None:
    begin, server = time.time(), command_of(living, "server")
    killed(server.part("deployment.gateway"))
    server.says("the gateway has stopped; restarting it", ROUND)
    all_train(living, LOST)
    assert {line["failed"] for line in living.events("answered", since=begin) if "failed" in line} <= {
        "its connection was lost",
        "no answer in time",
    }


@pytest.mark.faults
def test_a_server_whose_first_process_alone_was_killed_can_be_resumed_at_once(living: Site) -> None:
    begin, old = time.time(), command_of(living, "server")
    rounds = [line["round"] for line in living.events("done")]
    killed(psutil.Process(old.process.pid))
    server = living.server(resume=True)
    all_train(living, LOST + STARTING)
    assert server.process.poll() is None
    old.gone()
    after = [line["round"] for line in living.events("done", since=begin)]
    assert after == list(range(max(rounds) + 1, max(after) + 1))


@pytest.mark.faults
def test_ctrl_c_ends_server_and_clients_and_leaves_nothing_behind(living: Site) -> None:
    living.event("asked", ROUND, since=time.time())
    assert command_of(living, "mood").interrupt() == 0
    command_of(living, "mood").gone()
    server = command_of(living, "server")
    assert server.interrupt() == 130
    server.says(f"continue from the last finished round with `fedamole server --resume {living.run}`", 1)
    server.gone()
    assert "Traceback" not in server.text
    killed(psutil.Process(command_of(living, "entail").process.pid))
    command_of(living, "entail").gone()
    assert command_of(living, "chat").interrupt() == 0, "also a client that has no server any more"
    command_of(living, "chat").gone()


# One long-lived run in which chat is a client that is not what it should be.


@pytest.fixture(scope="module")
def doubtful(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Site]:
    names = 'deployment.clients=["chat", "entail", "mood", "plain"]'
    overrides = [names, "deployment.deadline=30", "deployment.gathering=5"]
    with site(tmp_path_factory.mktemp("doubtful"), tiny, *overrides) as there:
        there.server()
        there.client("entail")
        there.client("mood")
        there.client("chat", lies=True)
        for name in NAMES:
            there.trained(name, STARTING, since=0.0)
        yield there


REFUSED = "its answer is damaged or does not fit the request"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("kind", "reason", "logged"),
    [
        ("nan", REFUSED, "holds NaN or infinity"),
        ("huge", REFUSED, "is above deployment.max_norm"),
        ("wrong shape", REFUSED, "was expected"),
        ("foreign expert", REFUSED, "refused: "),
        ("truncated", REFUSED, "refused: "),
        ("too large", "its answer is larger than allowed", "bytes where at most"),
        ("raise", "an unexpected error; see the client's log", ""),
        (
            "full disk",
            "its worker process stopped or is not running",
            "",
        ),  # nothing leaves that is not in the audit log
        ("slow", "no answer in time", ""),
    ],
)
def test_a_client_that_is_not_what_it_should_be_is_left_out_of_the_round(
    kind: str, reason: str, logged: str, doubtful: Site
) -> None:
    doubtful.trained("chat", ROUND, since=time.time())
    log_length, now = len(doubtful.log()), time.time()
    doubtful.lie("chat", kind)
    line = doubtful.failed("chat", ROUND, since=now)
    doubtful.lie("chat", "honest")
    round_ = line["round"]
    assert line["failed"] == reason
    if logged:
        prefix = f"client chat, round {round_}, update: "
        wait_until(
            lambda: prefix in doubtful.log()[log_length:] and logged in doubtful.log()[log_length:],
            5,
            "the log says why",
            lambda: doubtful.log()[log_length:],
        )
    doubtful.event("done", ROUND, since=now, round=round_)
    back = doubtful.trained("chat", ROUND, since=line["time"])["round"]
    doubtful.event("done", ROUND, round=back)
    trains = {update["client"]: update.get("failed") for update in doubtful.metrics(split="train", round=round_)}
    assert trains == {"chat": reason, "entail": None, "mood": None}
    assert "chat" not in {update["client"] for update in doubtful.metrics(split="validation", round=round_)}
    answers = {path.stem for path in (doubtful.folder / "c-chat").glob("*/clients/chat/answers/*")}
    assert f"round-{back:04d}" in answers
    assert f"round-{round_:04d}" not in answers, "what it did in a round that did not count is undone"


@pytest.mark.faults
def test_no_word_of_a_clients_error_reaches_the_server(doubtful: Site) -> None:
    doubtful.trained("chat", ROUND, since=time.time())
    now = time.time()
    doubtful.lie("chat", "raise")
    doubtful.failed("chat", ROUND, since=now)
    doubtful.lie("chat", "honest")
    assert SECRET in " ".join(command_of(doubtful, "chat").text.split()), "its own log tells all"
    files = [path for path in doubtful.run.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in command_of(doubtful, "server").text


@pytest.mark.faults
def test_a_client_that_cannot_use_its_data_or_base_cannot_join_until_they_are_mended(doubtful: Site) -> None:
    begun = time.time()
    data, base = doubtful.folder / "plain.jsonl", doubtful.folder / "base"
    data.write_text('{"patient": "Ann", "diagnosis": "none"}\n' * 20)
    base.mkdir()
    options = ("--data", str(data), "--base", str(base))
    plain = doubtful.client("plain", *options)

    def logged(text: str) -> None:
        wait_until(lambda: text in doubtful.log(), STARTING, text, doubtful.told)

    logged("did not join: it cannot use its data; see the client's log")
    assert "Ann" not in doubtful.log()
    plain.says("patient", 5)  # its own log names the columns
    assert "Traceback" not in plain.text
    assert plain.interrupt() == 0
    data.write_text((doubtful.tiny / "plain.jsonl").read_text())
    plain = doubtful.client("plain", *options)
    logged("did not join: it cannot use the base model; see the client's log")
    assert "Traceback" not in plain.text
    assert plain.interrupt() == 0
    doubtful.event("done", ROUND, since=time.time())
    assert not [line for line in doubtful.events("answered", since=begun) if "failed" in line]
    doubtful.client("plain", "--data", str(data))
    doubtful.trained("plain", STARTING, since=begun)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb") as file:
        while True:
            file.write(b"0" * 4096)
            file.flush()


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_full(doubtful: Site) -> None:
    disk = doubtful.folder / "c-small"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        # mood's place is taken over by a client with a small disk
        assert command_of(doubtful, "mood").interrupt() == 0
        small = doubtful.client("mood", folder="c-small")
        doubtful.trained("mood", STARTING, since=time.time())
        now = time.time()
        filling = disk / "filling"
        with pytest.raises(OSError, match="No space left"):
            fill(filling)
        line = doubtful.failed("mood", ROUND, since=now)
        assert line["failed"] == "its worker process stopped or is not running", (
            "nothing leaves that is not in the audit log"
        )
        assert small.process.poll() is None
        filling.unlink()
        doubtful.trained("mood", ROUND, since=time.time())
        assert small.interrupt() == 0
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
