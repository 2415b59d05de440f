"""The parts of moe_layer.py, each with one task."""
