"""Training and merge utilities behind the notebooks of the Decouple-Then-Merge companion."""
