"""A stage connects to the PLM that `plm` names, and only if it is the one whose head was exported."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path

import pytest

from pema_ray.data_owner.remote import RemotePLM
from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import BlockingPLM
from pema_ray.line.plm_config import PLMConfig
from pema_ray.pema.plm import connect, connector
from pema_ray.plm_owner import LocalPLM


def test_a_stage_refuses_a_plm_that_is_not_the_exported_one(tiny_plm_folder):
    config, other = (PLMConfig(name=tiny_plm_folder("llama", seed), dtype="float32", device="cpu") for seed in (0, 1))
    with BlockingPLM(connect(config)) as plm, BlockingPLM(connect(other)) as other_plm:
        card, foreign = plm.describe().card, other_plm.describe().card
    actors = pickle.loads(pickle.dumps(connector(config, card, cpus=1)))  # as Ray sends it
    with BlockingPLM(actors()) as plm:
        assert plm.describe().card == card
    with BlockingPLM(connector(other, card, cpus=1)()) as plm, pytest.raises(FingerprintMismatch) as caught:
        plm.describe()
    assert (caught.value.expected, caught.value.found) == (card.fingerprint, foreign.label)
    assert f"plm.name={other.name}" in str(caught.value)


def test_a_plm_of_ones_own_is_loaded_with_the_threads_of_its_actor(tiny_plm_folder):
    own = PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu")
    client = connector(own, None, cpus=1, engine={"slots": 3})()
    assert isinstance(client, LocalPLM) and client.config.slots == 3
    assert connector(own, None, cpus=2.5).args[0].threads == 2
    assert connector(own.model_copy(update={"threads": 7}), None, cpus=2.5).args[0].threads == 7


def test_a_url_is_called_over_https_without_loading_anything(tmp_path: Path):
    (tmp_path / "key").write_text("pema-secret\n")
    client = connect(PLMConfig(url="https://plm.example.org", key_file=str(tmp_path / "key")), engine={"slots": 3})
    assert isinstance(client, RemotePLM)
    asyncio.run(client.end())


@pytest.mark.cluster
def test_a_serve_application_that_does_not_run_is_named(ray_cluster):
    with pytest.raises(UserError, match=r"plm.serve=shared: no PLM owner of this name runs in this Ray cluster"):
        connect(PLMConfig(serve="shared"))
