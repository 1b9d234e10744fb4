"""What would a run do? Starts no process."""
