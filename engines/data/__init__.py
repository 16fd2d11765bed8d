"""Images on their way in: sources, long-tail profiles, class names, batches."""
