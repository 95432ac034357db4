"""Turn a request into a job: everything is checked and decided here, before any heavy work begins."""
