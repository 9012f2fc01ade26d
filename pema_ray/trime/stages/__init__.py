"""The stages of a TRIME experiment, one module each: `run(config) -> metrics`."""
