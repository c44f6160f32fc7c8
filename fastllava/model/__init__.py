"""The model: CLIP, projector and decoder built from rooms, and the formats it is read from and written to."""
