"""Make the clip of a job so that nothing is lost: events out, state kept, memory that runs out survived."""
