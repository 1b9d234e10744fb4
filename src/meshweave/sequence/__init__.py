"""How do a lane's samples lie in its sequence, and which rank holds which part of it? Pure."""
