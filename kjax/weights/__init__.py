"""Checkpoint directories in the Hugging Face layout: read, checked, placed into the parameter tree, and written."""
