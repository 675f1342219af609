"""Features to prompts, positions and batches of static shape. NumPy only."""
