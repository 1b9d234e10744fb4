"""The loop: optimizer, evaluation, metrics."""
