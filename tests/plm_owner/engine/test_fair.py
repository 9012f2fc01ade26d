"""Waiting flows get equal shares, whatever others have queued and whenever they arrive."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pema_ray.plm_owner.engine.fair import FairQueue

PASSES = st.lists(st.integers(1, 100), min_size=1, max_size=30)


@given(st.dictionaries(st.text(max_size=2), PASSES, min_size=2, max_size=4))
def test_waiting_flows_differ_by_at_most_one_pass_each(flows):
    queue, served = FairQueue(), dict.fromkeys(flows, 0)
    largest = max(map(max, flows.values()))
    flows = {flow: list(passes) for flow, passes in flows.items()}
    while all(flows.values()):
        flow = queue.choose(flows)
        positions = flows[flow].pop()
        queue.charge(flow, positions)
        served[flow] += positions
        assert max(served.values()) - min(served.values()) <= 2 * largest


@given(before=st.integers(1, 50), size=st.integers(1, 100))
def test_a_flow_that_was_idle_neither_waits_long_nor_makes_others_wait(before, size):
    queue = FairQueue()
    for _ in range(before):
        assert queue.choose(["long served"]) == "long served"
        queue.charge("long served", size)
    served = []
    for _ in range(6):
        served.append(queue.choose(["long served", "new"]))
        queue.charge(served[-1], size)
    assert served[:2].count("new") >= 1
    assert served.count("new") in (3, 4)


def test_flows_of_the_past_take_no_memory():
    queue = FairQueue()
    for number in range(1000):
        queue.charge(queue.choose([number]), 10)
        queue.charge(queue.choose(["always"]), 10)
    assert len(queue._finish) < 5
