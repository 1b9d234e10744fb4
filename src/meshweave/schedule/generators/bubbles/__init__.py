"""How does encoder work fit into the language model's bubbles? What `nested` is made of."""
