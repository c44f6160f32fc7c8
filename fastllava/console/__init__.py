"""What the program says on a terminal, and how it is stopped and ends."""
