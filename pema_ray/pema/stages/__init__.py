"""The stages of a PEMA experiment, one module each. `jobs/` and the command line call its `run(config) -> metrics`."""
