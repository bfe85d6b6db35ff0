"""Layer-wise training inside loops that other libraries drive; one file for each."""
