"""The plot of `benchmarks.attention`: how time and memory grow with the sequence."""

def plot(console, rows, path, meta):
    pass
