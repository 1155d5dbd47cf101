"""The same run over Flower and in one process: equal metrics, and a server state that is equal to the bit.

Real processes throughout: certificates, gateway, SuperLink, three clients with keys and warm workers, which stay for
one run after the other, as at an organisation.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedamole.deployment.security.certificates import make_certificates
from fedamole.experiment import start
from fedamole.federation.progress import ProgressListener
from tests.conftest import small
from tests.deployment.faults import NAMES, Site
from tests.deployment.test_remote import facts, states

pytestmark = pytest.mark.faults  # real processes, two minutes: `make test-faults`

RUNS = {
    "fedamole": [],
    "fedit": ["evaluation.pre_aggregation=true"],  # two exchanges a round, and the row fedit_ft
    "fedlease": ["method.warmup_share=0.2"],  # private state, and messages that change their form
}


@pytest.fixture(scope="module")
def site(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    created = Site(tmp_path_factory.mktemp("flower"), tiny, secure=True)
    assert created.certs is not None
    make_certificates(created.certs, ["localhost"], NAMES)
    try:
        for name in NAMES:
            created.client(name)
        yield created
    finally:
        created.close()


@pytest.mark.parametrize("method", RUNS)
def test_equals_the_run_in_one_process(method: str, site: Site) -> None:
    site.run = site.folder / method
    site.overrides = [*small(method), "federation.rounds=3", *RUNS[method]]
    assert site.server().ended(150) == 0, (site.folder / "server.out").read_text()[-2000:]
    in_process = site.folder / f"here-{method}"
    start(site.here(), in_process, ProgressListener())
    assert states(site.run) == states(in_process)
    assert facts(site.run) == facts(in_process)
    for name in NAMES:
        (own,) = (site.folder / f"c-{name}").glob(f"{method}-*")
        adapters = sorted(path.name for path in (own / "clients" / name).glob("adapter*"))
        assert adapters == sorted(path.name for path in (in_process / "clients" / name).glob("adapter*"))
        for adapter in adapters:
            weights = f"clients/{name}/{adapter}/adapter_model.safetensors"
            assert (own / weights).read_bytes() == (in_process / weights).read_bytes()
        assert not [path for path in (own / "clients").iterdir() if path.name != name]
    assert not (site.run / "clients").exists()
