"""Few examples per task: regression with a context."""
