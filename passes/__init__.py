"""Graph in, graph out: recognition of packed weights and the rewriting of the matmuls that use them."""
