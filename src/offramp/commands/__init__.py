"""The work of one command on one model, without printing: training, tuning, sweeping, decoding."""
