"""An engine run over a corpus into a cache: plan, cost, progress, cluster."""
