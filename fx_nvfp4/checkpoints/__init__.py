"""Reading NVFP4 checkpoints: one module each for files, producers' conventions, names, planning and assembly."""
