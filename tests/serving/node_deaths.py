"""A cluster of three nodes, whose nodes die while answers stream. Run by a test in a process of its own."""

from __future__ import annotations

import asyncio
import json
import sys
import time


async def main(settings: dict) -> dict:
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster
    from test_serving_cluster import ask, until_no_session_lives

    from pema_ray.pema.serving.local import local

    small = {"object_store_memory": 80 * 2**20}
    head = {"num_cpus": 3, "resources": {"texts": 1}, "include_dashboard": False, **small}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=2, resources={"weights": 1}, **small) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": settings["port"]})
    await asyncio.to_thread(lambda: serve.run(local(settings["args"]), name="pema"))
    url = f"http://127.0.0.1:{settings['port']}/v1"
    prompts = settings["prompts"]
    report = {"undisturbed": await asyncio.gather(*(ask(url, prompt) for prompt in prompts))}
    began: list[str] = []
    answers = asyncio.gather(*(ask(url, prompt, began=began) for prompt in prompts))
    while not began:
        await asyncio.sleep(0.005)
    started = time.monotonic()
    await asyncio.to_thread(cluster.remove_node, nodes[0], allow_graceful=False)
    report["one node died"] = await asyncio.wait_for(answers, 120)
    cluster.add_node(num_cpus=2, resources={"weights": 1}, **small)
    began.clear()
    answers = asyncio.gather(*(ask(url, prompt, began=began) for prompt in prompts))
    while not began:
        await asyncio.sleep(0.005)
    await asyncio.to_thread(cluster.remove_node, nodes[1], allow_graceful=False)
    report["the other died too"] = await asyncio.wait_for(answers, 120)
    report["seconds"] = time.monotonic() - started
    await until_no_session_lives(60)
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()
    return report


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.loads(sys.argv[1])))), flush=True)
