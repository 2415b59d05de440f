"""Experts over the ranks of torch.distributed: who holds which part, and what is summed or sent."""
