"""What :func:`fx_nvfp4.quantize_` is made of: which weights are packed, by which scales, and the account of it."""
