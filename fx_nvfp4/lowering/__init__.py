"""What ties the package to Inductor's internals."""
