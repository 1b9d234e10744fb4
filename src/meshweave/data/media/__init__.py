"""What is a medium, before a processor sees it? One file a kind."""
