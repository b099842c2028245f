"""Generation: decoding at full depth, with confident exits, or speculatively."""
