"""What :func:`fx_nvfp4.prepare` is made of: find lists of experts, record the module around them, fuse, prove."""
