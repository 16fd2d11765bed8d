"""Tail images on their way out: plan, guided sampling, PNG files, manifest."""
