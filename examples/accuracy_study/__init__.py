"""The parts of examples/accuracy.py: text, model, training, quantisation, evaluation, errors, tables and plots."""
