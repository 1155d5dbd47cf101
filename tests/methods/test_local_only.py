"""Local only: nobody learns from anybody."""

from pathlib import Path
from typing import Any

import torch
from tests.methods.by_hand import client, driven

from fedamole.config import load_config
from fedamole.experiment import start
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import Nothing
from fedamole.methods.fedit import FedIT
from fedamole.methods.local_only import LocalOnly, OwnLora

SHAPES = {"m": (2, 2)}
INFO = ClientInfo("a", 10)


def test_a_client_continues_from_its_own_lora_and_sends_nothing() -> None:
    method = LocalOnly(rank=1)
    work = method.update(client(SHAPES), OwnLora({"m/shared/A": torch.ones(1, 2)}), Nothing())
    (request,), (client_state, reply, _) = driven(work, {"m/shared/A": torch.full((1, 2), 5.0)})
    assert torch.equal(request.adapter.tensors["m/shared/A"], torch.ones(1, 2))
    assert reply == Nothing()
    adapter = method.adapter(client(SHAPES), client_state, Nothing())
    assert torch.equal(adapter.tensors["m/shared/A"], torch.full((1, 2), 5.0))


def test_the_server_knows_nothing() -> None:
    method, server = LocalOnly(), Server(BaseInfo(SHAPES), (INFO,), 0)
    assert method.init(server) == method.message(Nothing(), INFO) == Nothing()
    assert method.aggregate(server, Nothing(), {"a": Nothing()}) == Nothing()


def test_starts_where_fedit_starts() -> None:
    client_state = LocalOnly(rank=2).init_client_state(client(SHAPES))
    first = FedIT(rank=2).init(Server(BaseInfo(SHAPES), (INFO,), 0))
    assert client_state.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(client_state.tensors[key], first.tensors[key]) for key in client_state.tensors)


def test_a_clients_model_does_not_depend_on_who_else_is_there(runs: Any, tiny: Path, tmp_path: Path) -> None:
    """The run with all four clients, and one of its client "mood" alone, to the bit where each trains alone."""
    text = (tiny / "config.toml").read_text()
    head, sources = text.split("[[data.source]]", 1)[0], text.split("[[data.source]]")[1:]
    mood = next(source for source in sources if '"mood"' in source)
    text = head + "[[data.source]]" + mood
    text = text.replace('"base"', f'"{tiny}/base"').replace("mood.jsonl", f"{tiny}/mood.jsonl")
    (tmp_path / "mood.toml").write_text(text)
    overrides = ["method.name=local_only", "method.rank=2", "method.alpha=4", "run.group=1"]
    start(load_config(tmp_path / "mood.toml", overrides), tmp_path / "run", ProgressListener())
    file = "clients/mood/state/round-0002.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (runs("local_only", "run.group=1") / file).read_bytes()
