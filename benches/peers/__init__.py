"""What others run in our place: whole training steps (`compare`, with its variants) and single ops (`rooms`)."""
