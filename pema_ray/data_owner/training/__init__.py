"""Training an adapter on an external memory: batches, reconstruction, the joint loss, the loop, Ray Train."""
