"""Demonstrations that run whole topologies on one machine. They call the command line, as a user would."""
