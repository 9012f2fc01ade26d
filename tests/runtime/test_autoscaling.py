"""A cluster that scales from few nodes is waited for, as far as its autoscaler may take it."""

from __future__ import annotations

import pytest

from pema_ray.errors import UserError
from pema_ray.runtime.cluster import RayConfig
from pema_ray.runtime.cluster import ray_cluster as ours


@pytest.mark.cluster
def test_what_the_autoscaler_may_start_is_waited_for_and_more_is_refused(ray_cluster, monkeypatch, capsys):
    monkeypatch.setattr("pema_ray.runtime.cluster._largest_resources", lambda: {"CPU": 1000, "GPU": 8})
    with ours(RayConfig(), cpus=4, gpus=1, workers=6):
        output = " ".join(capsys.readouterr().out.split())
    notice = "6 workers ask for 6 GPU, the Ray cluster has 0 now: waiting for its autoscaler, which may make it 8."
    assert notice in output
    refusal = r"9 workers ask for 9 GPU, the Ray cluster has 0 in all and its autoscaler may make it 8\. Lower"
    with pytest.raises(UserError, match=refusal), ours(RayConfig(), gpus=1, workers=9):
        pass


@pytest.mark.cluster
def test_a_cluster_without_an_autoscaler_is_what_it_is(ray_cluster):
    refusal = r"50 workers ask for 50 CPU, the Ray cluster has \d+ in all\. Lower"
    with pytest.raises(UserError, match=refusal), ours(RayConfig(), cpus=1, workers=50):
        pass
