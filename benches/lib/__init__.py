"""What the benches share: runs on drawn samples, timing, judging, rows of results."""
