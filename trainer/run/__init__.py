"""What a run consists of besides training: its folder, progress, signals, resuming and the watch over other ranks."""
