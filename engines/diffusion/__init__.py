"""The mathematics of the method as free functions of tensors: no files, no models, no state."""
