"""A convincing first run: images drawn here, a small trained teacher, a student that catches up with it."""
