"""What this machine can do, what was measured on it, and how its failures are told apart."""
