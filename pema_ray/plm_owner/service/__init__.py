"""The PLM owner's public service: API, keys, quotas, replicas, and the Serve application that joins them."""
