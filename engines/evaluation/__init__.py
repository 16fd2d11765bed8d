"""Does it help? Accuracy by group, controls, and the report."""
