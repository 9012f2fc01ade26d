"""A TRIME model as a service under Ray Serve."""
