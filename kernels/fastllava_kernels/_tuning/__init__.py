"""The configurations of the Triton kernels: how a launch finds one, how they are chosen, and the gate that compiles them."""
