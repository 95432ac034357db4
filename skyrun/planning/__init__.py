"""From a request to a job: everything is checked and decided here, before anything heavy begins."""
