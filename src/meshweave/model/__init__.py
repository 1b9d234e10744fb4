"""What runs? Stock transformers models, cut into modules, of which a rank materialises only its part."""
