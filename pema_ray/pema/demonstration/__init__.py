"""Two organisations on one machine, and what each of them sees and sends. Calls the command line, as a user would."""
