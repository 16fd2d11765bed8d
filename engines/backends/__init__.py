"""Runtimes behind one contract: an engine is called with (x, t, y) and never guesses a device."""
