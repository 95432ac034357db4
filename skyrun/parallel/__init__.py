"""Several devices, one process each: the group that works on one clip, and the team of processes it runs in."""
