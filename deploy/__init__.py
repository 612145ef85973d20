"""How it reaches a cluster."""
