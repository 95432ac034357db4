"""Run a job: yield events, save the state, and survive running out of memory."""
