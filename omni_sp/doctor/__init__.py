"""Whether a machine is set up for ranks: what it has, what it measures, and what it proves."""
