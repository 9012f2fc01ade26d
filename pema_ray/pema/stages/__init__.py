"""The stages of an experiment, one module each: the only room that may bring both owners together.

Every stage is `run(config) -> metrics`; `jobs/` and the command line are thin twins over it.
"""
