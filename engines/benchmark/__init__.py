"""How fast the engines are here, and what few steps cost in quality: measured, never remembered."""
