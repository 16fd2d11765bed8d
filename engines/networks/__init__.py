"""Network architectures: the ADM U-Net, the prototype guide, the recognizers."""
