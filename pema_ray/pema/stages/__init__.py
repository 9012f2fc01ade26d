"""The stages of a PEMA experiment, one module each.

Every stage is `run(config) -> metrics`; `jobs/` and the command line are thin twins over it.
"""
