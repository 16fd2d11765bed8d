"""One loop and the stages that it drives: source, target, guide, recognizer."""
