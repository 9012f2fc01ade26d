"""A cluster that scales from few nodes is waited for, as far as its autoscaler may take it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ray
from ray.cluster_utils import AutoscalingCluster
from pema_ray.cluster import ray_cluster
from pema_ray.config import RayConfig
from pema_ray.errors import UserError

large = {"resources": {"CPU": 4}, "node_config": {}, "min_workers": 0, "max_workers": 1}
cluster = AutoscalingCluster({"CPU": 2}, {"large": large}, autoscaler_v2=True)
cluster.start()
try:
    config = RayConfig(address="auto")
    try:
        with ray_cluster(config, cpus=7):
            print("not refused")
    except UserError as refused:
        print(refused)
    with ray_cluster(config, cpus=4):
        print("ran on", ray.get(ray.remote(num_cpus=4)(lambda: "a new node").remote()))
finally:
    cluster.shutdown()
"""


@pytest.mark.cluster
@pytest.mark.slow
def test_what_the_autoscaler_may_start_is_waited_for_and_more_is_refused(tmp_path):
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    said = " ".join(ran.stdout.split())
    assert "One actor asks for 7 CPU, the Ray cluster has 2 in all and its autoscaler may make it 4. Lower" in said, ran
    assert "for 4 CPU, the Ray cluster has 2 now: waiting for its autoscaler, which may make it 4." in said
    assert "ran on a new node" in said
