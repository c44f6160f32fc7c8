"""`fastllava bench gpu`: what a GPU is wanted for, in pieces. `runner` is the way in; each piece has a module."""
