"""Studies of many models: runs, statistics, the seed document's tables, comparisons."""
