"""Where do raw samples come from? One file a kind of source."""
