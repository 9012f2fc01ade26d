"""Pre-training and fine-tuning from files to a model: `run(config) -> metrics`."""
