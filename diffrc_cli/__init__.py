"""DiffRC's command line: parses, prints, exits; computes nothing."""

__version__ = "0.1.0"
