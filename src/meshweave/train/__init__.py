"""The loop: step, optimizer, metrics, verification against the single process."""
