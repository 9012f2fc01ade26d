"""What a user has set for the model hub, proxies and trackers reaches Ray's workers, and nothing else does."""

from __future__ import annotations

import pytest

from pema_ray.runtime.environment import worker_environment


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN", "https_proxy", "HTTPS_PROXY",
     "no_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "MLFLOW_TRACKING_URI", "WANDB_API_KEY", "PEMA_RAY_CACHE"],
)  # fmt: skip
def test_a_variable_is_forwarded(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "some value")
    assert worker_environment()[name] == "some value"


@pytest.mark.parametrize(
    "name", ["PATH", "HOME", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "RAY_ADDRESS", "XHF_TOKEN"]
)
def test_other_variables_stay_here(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "some value")
    assert name not in worker_environment()
