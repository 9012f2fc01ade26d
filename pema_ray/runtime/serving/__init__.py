"""Shared by the Serve applications of all owners and methods: replicas, logs, HTTP, rejected settings."""
