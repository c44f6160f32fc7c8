"""What notices that a run stands still, or that a process has gone."""
