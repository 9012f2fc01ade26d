"""What every room stands on: hardware, clusters, processes, progress, metrics, files. Knows no method."""
