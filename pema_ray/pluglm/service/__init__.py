"""A PlugLM model as a service under Ray Serve."""
