"""What is read? Sources, processing into model inputs, and a loader that reads only what a rank needs."""
