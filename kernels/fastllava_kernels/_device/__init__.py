"""What rooms share: parts of kernels, kernels that several rooms launch under their own names, and how libraries' kernels are run."""
