"""The hardware study: what this machine gives (probe), and what the layer takes on it and on others (model)."""
