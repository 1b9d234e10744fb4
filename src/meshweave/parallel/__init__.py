"""How is a module split inside its own mesh?"""
