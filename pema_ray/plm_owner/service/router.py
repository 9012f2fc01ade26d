"""Sends every step of a session to the replica that holds its cache.

A request whose session id begins with a replica's name and `/` goes to that replica alone. Serve's consistent hashing
routes any other, or one whose replica has stopped. Affinity is an optimisation: another replica answers a step with
`SessionLost`, and the session is opened again. It uses private parts of Ray 2.60, so Ray is pinned.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter


class SessionAffinityRouter(ConsistentHashRouter):
    """Serve's consistent-hash router, except for requests that name a replica."""

    def _lookup_ranked_replicas(self, routing_key: str) -> list[ReplicaID]:
        name, slash, _ = routing_key.partition("/")
        if slash:
            for replica in self._replica_set_snapshot:
                if replica.unique_id == name:
                    return [replica]
        return super()._lookup_ranked_replicas(routing_key)

    def _get_pending_request_matching_internal_request_id(self, request_metadata: Any = None) -> Any:
        """The routed request itself: calls of one parent share Serve's own identifier."""
        for pending in self._pending_requests_to_fulfill:
            if not pending.future.done() and pending.metadata is request_metadata:
                return pending
        return None
