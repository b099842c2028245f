"""Studies of many models: their runs, their statistics, and what they compare."""
