"""What the Serve applications of all owners and methods share: replicas, logs, refused settings."""
