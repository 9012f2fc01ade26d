"""The one module that reads and sets environment variables."""

from __future__ import annotations

import os
from pathlib import Path


def ray_address() -> str | None:
    """The cluster that `ray job submit` started this process in, if any."""
    address = os.environ.get("RAY_ADDRESS")
    is_jobs_api = address is not None and address.startswith("http")  # for `ray job submit`
    return None if is_jobs_api else address


def inherited_environment() -> dict[str, str]:
    """This process's variables, for other processes that it starts on this machine."""
    return dict(os.environ)


def quiet_libraries() -> None:
    """Keep notices of Ray and transformers off the terminal; call before they are imported."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray Data's actors log a harmless C++ error
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")


_FORWARDED = {
    "TQDM_DISABLE", "TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "RAY_TRAIN_V2_ENABLED",  # as quiet as here
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",  # in lower case too
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",  # trusted certificates behind a proxy
    "HUGGING_FACE_HUB_TOKEN", "PEMA_RAY_CACHE",
}  # fmt: skip
_FORWARDED_FAMILIES = ("HF_", "MLFLOW_", "WANDB_")  # the model hub, and tracking servers


def worker_environment() -> dict[str, str]:
    """Variables that Ray's workers inherit, also on an existing cluster."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.upper() in _FORWARDED or name.startswith(_FORWARDED_FAMILIES)
    }


def mlflow_server() -> str | None:
    """The user's MLflow server, if any."""
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def allow_mlflow_folders() -> None:
    """Let MLflow keep runs in a folder, without a database."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"


def wandb_mode() -> str:
    """`offline` unless a key or the user's own choice says otherwise."""
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def cache_folder() -> Path:
    """Where converted models are kept between runs: `$PEMA_RAY_CACHE`, else the user's cache folder."""
    if folder := os.environ.get("PEMA_RAY_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pema-ray"
