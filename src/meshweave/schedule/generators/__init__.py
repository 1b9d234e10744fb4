"""In which order is a step worked? One file a generator."""
