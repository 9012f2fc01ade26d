"""One organisation: a Ray cluster of its own with one application, until its standard input ends. Run by a test."""

from __future__ import annotations

import importlib
import json
import sys


def main() -> None:
    settings = json.loads(sys.argv[1])
    import ray
    from ray import serve

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        _temp_dir=settings["temporary"],
        _node_ip_address=settings["node"],
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}},
    )
    serve.start(http_options={"host": settings["address"], "port": settings["port"], **settings.get("tls", {})})
    module, _, builder = settings["import_path"].partition(":")
    build = getattr(importlib.import_module(module), builder)
    serve.run(build(settings["args"]), name="app")
    print("up", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
