"""The training objective: loss terms on the keys of a batch, projections, queue and moving average."""
