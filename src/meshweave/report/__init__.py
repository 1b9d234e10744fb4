"""What happened, or would happen? Layout maps, boundary traffic, curves and summaries."""
