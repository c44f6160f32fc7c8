"""What fastllava measures about itself, from a checkout: `fastllava bench COMMAND ...` starts the program in `__main__`."""
