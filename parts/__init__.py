"""What serves the scripts at the root and holds no modelling."""
