"""What it runs on. Imports nothing of components or flows."""
